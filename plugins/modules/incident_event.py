#!/usr/bin/python
# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: incident_event
short_description: Write an entry into an incident's case
version_added: 1.0.0
description:
  - Records what no control records by itself, as notes, decisions, the phases of a playbook, and seals.
  - A seal names the newest entry of every stream. Its number is the turn, and its hash goes out with messages, so that a case that was
    written anew is noticed.
author: The firebreak.incident contributors (@firebreak)
extends_documentation_fragment:
  - firebreak.incident.attributes
  - firebreak.incident.common
options:
  kind:
    description: The kind of entry.
    type: str
    required: true
    choices: [note, decision, phase, seal, failed, notified]
  text:
    description: What happened. Required for V(note), V(decision) and V(notified).
    type: str
  begins:
    description: For V(seal) and V(phase), the phase that begins now.
    type: str
  approves:
    description: The controls that a V(decision) approves, for O(two_person).
    type: list
    elements: str
  role:
    description: For V(failed), the role that failed. Nothing is written where the engine has told the failure already.
    type: str
  audience:
    description: For V(notified), who was told, or should be.
    type: str
  sent:
    description: For V(notified), whether it was sent. V(false) leaves it to a person.
    type: bool
    default: false
  recovered:
    description: For V(note), the role whose earlier failure on this host is over.
    type: str
"""

EXAMPLES = r"""
- name: Record a decision
  firebreak.incident.incident_event:
    kind: decision
    text: The customers are told today.
    incident_id: INC-2026-1120-001

- name: Seal what was done so far
  firebreak.incident.incident_event:
    kind: seal
    incident_id: INC-2026-1120-001
"""

RETURN = r"""
entry:
  description: Where the entry stands, as stream and number. Empty in check mode.
  returned: always
  type: str
  sample: _run/4
digest:
  description: The entry's hash, which for a seal proves the case up to here. Empty in check mode.
  returned: always
  type: str
incident_id:
  description: The incident.
  returned: always
  type: str
  sample: INC-2026-1120-001
"""

import contextlib
from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils import _case, _incident, _verify
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context, Record
from ansible_collections.firebreak.incident.plugins.module_utils._errors import StoreUnavailable
from ansible_collections.firebreak.incident.plugins.module_utils._module import run_module

SPEC: dict[str, Any] = {
    "argument_spec": {
        "kind": {
            "type": "str",
            "required": True,
            "choices": ["note", "decision", "phase", "seal", "failed", "notified"],
        },
        "text": {"type": "str"},
        "begins": {"type": "str"},
        "approves": {"type": "list", "elements": "str"},
        "role": {"type": "str"},
        "audience": {"type": "str"},
        "sent": {"type": "bool", "default": False},
        "recovered": {"type": "str"},
    },
    "required_if": [
        ("kind", "note", ["text"]),
        ("kind", "decision", ["text"]),
        ("kind", "phase", ["begins"]),
        ("kind", "failed", ["role"]),
        ("kind", "notified", ["text", "audience"]),
    ],
}
BODIES: dict[str, list[str]] = {
    "note": ["text"],
    "decision": ["text", "approves"],
    "notified": ["text", "audience", "sent"],
    "phase": ["begins"],
}


def write(case: _case.Case | None, params: dict[str, Any], context: Context) -> dict[str, Any]:
    """Append the entry that was asked for."""
    nothing = {"changed": False, "entry": "", "digest": ""}
    if case is None or context.check_mode:
        return {**nothing, "changed": params["kind"] != "failed"}
    if params["kind"] == "failed":
        return _failed(case, params, context) or nothing
    _incident.state_of(case)
    if params["kind"] == "seal":
        entry = _verify.seal(case, params["begins"])
        _incident.view(case)
    else:
        body = {name: params[name] for name in BODIES[params["kind"]]} | {"at": context.clock()}
        stream = _case.RUN
        if params.get("recovered"):
            body["recovered"] = params["recovered"]
            stream = case.stream(str(params["host"])).name
        entry = case.record(stream, params["kind"], body)
    return {"changed": True, "entry": f"{entry.doc['stream']}/{entry.seq}", "digest": entry.digest}


def _failed(case: _case.Case, params: dict[str, Any], context: Context) -> dict[str, Any] | None:
    """The last word on a role that failed, unless the engine has spoken in this run."""
    stream = case.stream(str(params["host"]))
    body = {"role": params["role"], "why": params["text"] or "see the task's output"}
    for name in (stream.name, f"{stream.name}.evidence"):
        one = _case.Stream(case, name)
        with contextlib.suppress(StoreUnavailable):
            one.load()
        told = one.head is not None and one.head.run == context.run_id and one.head.kind in ("failed", "refused")
        if told and one.head is not None and str(one.head.body.get("why")) in body["why"]:
            return None
    entry = case.keep(stream, "failed", body)
    if entry is None:
        return {"changed": True, "entry": "", "digest": "", "spooled": stream.spooled}
    return {"changed": True, "entry": f"{stream.name}/{entry.seq}", "digest": entry.digest}


CONTROL = Record(name="incident_event", service=None, spec=SPEC, write=write)


def main() -> None:
    run_module(CONTROL)


if __name__ == "__main__":
    main()
