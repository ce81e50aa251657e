# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Any control, with a mistake in it: it raises the password where it should read."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import sys
import warnings
from typing import Any, NoReturn

from ansible_collections.firebreak.incident.plugins.plugin_utils.control import ControlAction

MODULES = "ansible_collections.firebreak.incident.plugins.modules"


class ActionModule(ControlAction):
    control: Any

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        args = self._task.args
        sound = importlib.import_module(f"{MODULES}.{args.pop('control')}").CONTROL
        secret = str(args.pop("secret"))
        kind = getattr(importlib.import_module("builtins"), str(args.pop("raises")))

        def read(*_unused: Any) -> NoReturn:
            print(secret)
            os.write(2, secret.encode())
            warnings.warn(secret, stacklevel=1)
            logging.getLogger("sdk").critical(secret, exc_info=kind(secret))
            sys.stderr.write(secret)
            try:
                raise OSError(secret)
            except OSError as failure:
                raise kind(secret) from failure

        self.control = dataclasses.replace(sound, read=read)
        return super().run(tmp, task_vars)
