# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The leaky control in Ansible's worker. What the engine keeps back, this file gives away beside the engine."""

from __future__ import annotations

import logging
import sys
from typing import Any

from ansible.errors import AnsibleError
from ansible.utils.display import Display

from ansible_collections.firebreak.incident.plugins.plugin_utils.control import ControlAction
from tests.leaky.library.leaky import CONTROL


class ActionModule(ControlAction):
    control = CONTROL

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        given = dict(self._task.args)
        way, password = given["way"], str(given.get("password"))
        result = super().run(tmp, task_vars)
        if way == "print":
            print(password, file=sys.stderr)
        elif way == "display":
            Display().display(password)
        elif way == "warning":
            Display().warning(f"it did not work with {password}")
        elif way == "deprecation":
            Display().deprecated(f"it will not work with {password}", version="99.0.0")
        elif way == "log":
            logging.getLogger("leaky").error(password)
        elif way == "exception":
            raise AnsibleError(f"it did not work with {password}")
        elif way == "options for callbacks":
            self._task.args = given
        elif way == "environment for callbacks":
            self._task.environment = [{"GIVEN": password}]
        elif way == "diff":
            result["diff"] = {"before": "", "after": password}
        elif way == "fact":
            result["ansible_facts"] = {"given": password}
        elif way == "text on the host":
            self._low_level_execute_command(f"echo {password} > {given['place']}/on-the-host")
        return result
