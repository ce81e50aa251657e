# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""``setting`` in Ansible's worker, with the SDKs of a whole containment loaded in the parent; ``setting_module`` has no action."""

from __future__ import annotations

from ansible_collections.firebreak.bench.plugins.modules.setting import CONTROL
from ansible_collections.firebreak.bench.plugins.plugin_utils import null_store

from ansible_collections.firebreak.incident.plugins.module_utils import _cloudflare, _vault
from ansible_collections.firebreak.incident.plugins.plugin_utils.control import ControlAction, preload

_cloudflare.preload()
_vault.preload()
preload(CONTROL)
null_store.install()


class ActionModule(ControlAction):
    """setting in Ansible's worker."""

    control = CONTROL
