#!/usr/bin/python
# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: control_release
short_description: Undo what an incident's controls changed
version_added: 1.0.0
description:
  - Reads from the case what was changed on this host, newest first, and puts it back through the controls that changed it, so that undoing
    is checked, verified and recorded like every other change.
  - Each element is compared. What equals the state after the change is put back, what equals the state before was never applied or is
    already undone, everything else was changed by somebody else since and is left alone, and the task fails.
  - What cannot be undone is listed.
notes:
  - It carries out other controls, some of which reach the host over Ansible's own connection, so it does not work with C(async).
author: The firebreak.incident contributors (@firebreak)
extends_documentation_fragment:
  - firebreak.incident.attributes
  - firebreak.incident.common
  - firebreak.incident.postgresql
  - firebreak.incident.pgbouncer
  - firebreak.incident.redis
  - firebreak.incident.vault
  - firebreak.incident.cloudflare
options:
  turn:
    description: Release the changes of this turn only. A turn ends with a seal. Without it, everything of this host.
    type: int
  controls:
    description: Release the changes of these controls only.
    type: list
    elements: str
  force:
    description: Put back also what somebody else changed since.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: See what a release would put back on this host
  firebreak.incident.control_release:
    incident_id: INC-2026-1120-001
  check_mode: true

- name: Release all controls of this host
  firebreak.incident.control_release:
    incident_id: INC-2026-1120-001
"""

RETURN = r"""
changes:
  description: What was put back, or would be in check mode.
  returned: always
  type: list
  elements: dict
conflicts:
  description: What somebody else changed since. It was left alone.
  returned: always
  type: list
  elements: dict
failures:
  description: What could not be put back, with the reason.
  returned: always
  type: list
  elements: dict
irreversible:
  description: What cannot be put back, with the reason.
  returned: always
  type: list
  elements: dict
diff:
  description: The states before and after.
  returned: always
  type: dict
incident_id:
  description: The incident.
  returned: always
  type: str
  sample: INC-2026-1120-001
"""

from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils import (
    _case,
    _cloudflare,
    _pgbouncer,
    _postgresql,
    _redis,
    _release,
    _vault,
)
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context, Record
from ansible_collections.firebreak.incident.plugins.module_utils._module import run_module

SERVICES = (_postgresql, _pgbouncer, _redis, _vault, _cloudflare)
CONNECTION = {name: option for service in SERVICES for name, option in service.SPEC.items()}
SPEC: dict[str, Any] = {
    "argument_spec": {
        **CONNECTION,
        "turn": {"type": "int"},
        "controls": {"type": "list", "elements": "str"},
        "force": {"type": "bool", "default": False},
    },
}


def write(case: _case.Case | None, params: dict[str, Any], context: Context) -> dict[str, Any]:
    """Undo this host's changes, newest first."""
    return _release.release(case, params, context)


CONTROL = Record(
    name="control_release", service=None, spec=SPEC, write=write, needs_host=True, connection=tuple(CONNECTION)
)


def main() -> None:
    run_module(CONTROL)


if __name__ == "__main__":
    main()
