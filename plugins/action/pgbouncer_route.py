# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from ansible_collections.firebreak.incident.plugins.modules.pgbouncer_route import CONTROL
from ansible_collections.firebreak.incident.plugins.plugin_utils.control import ControlAction, preload

preload(CONTROL)


class ActionModule(ControlAction):
    """pgbouncer_route in Ansible's worker."""

    control = CONTROL
