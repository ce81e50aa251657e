#!/usr/bin/python
# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: incident_info
short_description: Show what became of an incident so far
version_added: 1.0.0
description:
  - Folds the case's entries into what was done, how long each phase took, what is open, and what a release would undo.
  - It changes nothing.
author: The firebreak.incident contributors (@firebreak)
extends_documentation_fragment:
  - firebreak.incident.attributes
  - firebreak.incident.common
options:
  left_out:
    description: What the run left out, by C(--limit) or by tags, each as host, colon, reason. It counts as open.
    type: list
    elements: str
    default: []
  failures:
    description: What the run itself knows to have failed. It is told where the case store cannot be reached.
    type: list
    elements: str
    default: []
  released:
    description: Whether the screen is that of a release, which tells what is still in force.
    type: bool
    default: false
  inventory:
    description: The inventory of the run, so that the screen names commands that can be pasted.
    type: list
    elements: str
    default: []
  show:
    description: Whether the last screen of a run is printed.
    type: bool
    default: false
  require_contained:
    description: Fail while anything is unconfirmed, refused, failed or kept on one machine only.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Read the incident
  firebreak.incident.incident_info:
    incident_id: INC-2026-1120-001
  register: seen

- name: Show the screen, and fail while something is open
  firebreak.incident.incident_info:
    incident_id: INC-2026-1120-001
    show: true
    require_contained: true
"""

RETURN = r"""
incident:
  description: The record.
  returned: always
  type: dict
phases:
  description: The phases of the round, with seconds and the seconds that they should take at most.
  returned: always
  type: list
  elements: dict
done:
  description: What was done, with host, control, action and target.
  returned: always
  type: list
  elements: dict
open:
  description: What is unconfirmed, refused, failed or not yet verified, with the reason.
  returned: always
  type: list
  elements: dict
irreversible:
  description: What a release cannot put back, with the reason.
  returned: always
  type: list
  elements: dict
overrides:
  description: Guards that were overridden, with the reason.
  returned: always
  type: list
  elements: dict
turns:
  description: The turns that hold something to undo, newest first.
  returned: always
  type: list
  elements: int
spooled:
  description: Streams whose entries are on this machine only.
  returned: always
  type: list
  elements: str
seal:
  description: The newest seal, with its turn and hash.
  returned: always
  type: dict
incident_id:
  description: The incident.
  returned: always
  type: str
  sample: INC-2026-1120-001
"""

from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils import _case, _status
from ansible_collections.firebreak.incident.plugins.module_utils._control import Info
from ansible_collections.firebreak.incident.plugins.module_utils._errors import FirebreakError, StoreUnavailable
from ansible_collections.firebreak.incident.plugins.module_utils._module import run_module

SPEC: dict[str, Any] = {
    "argument_spec": {
        "left_out": {"type": "list", "elements": "str", "default": []},
        "failures": {"type": "list", "elements": "str", "default": []},
        "released": {"type": "bool", "default": False},
        "inventory": {"type": "list", "elements": "str", "default": []},
        "show": {"type": "bool", "default": False},
        "require_contained": {"type": "bool", "default": False},
    },
}


def read(client: _case.Case, params: dict[str, Any]) -> dict[str, Any]:
    try:
        seen = _status.status(client, params["left_out"])
    except StoreUnavailable as failure:
        known = [*params["failures"], *params["left_out"]]
        shown = {"screen": _status.lost_screen(client, failure.msg, known) if params["show"] else []}
        raise FirebreakError(f"{client.id} is not safe: {failure.msg}", effect="none", **shown) from None
    if params["show"]:
        seen["screen"] = _status.screen(seen, params["inventory"], params["released"])
    if params["require_contained"] and (seen["open"] or seen["spooled"]):
        what = ", ".join(f"{one['host']} {one['control']}" for one in seen["open"])
        shown = {"screen": seen.get("screen", [])}
        raise FirebreakError(f"{client.id} is not contained: {what or 'the case store was lost'}", **shown)
    return seen


CONTROL = Info(name="incident_info", service=_case, spec=SPEC, read=read)


def main() -> None:
    run_module(CONTROL)


if __name__ == "__main__":
    main()
