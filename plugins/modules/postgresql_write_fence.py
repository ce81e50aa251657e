#!/usr/bin/python
# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: postgresql_write_fence
short_description: Stop every write to a PostgreSQL server
version_added: 1.0.0
author: The firebreak.incident contributors (@firebreak)
description:
  - Makes every new transaction on the server read only, ends the sessions that began before that, and leaves its mark last.
  - Reading goes on. Clients that reconnect can log in and read.
  - The three steps are C(default_transaction_read_only) for the whole server, which reaches idle sessions too; the end of the client
    sessions that began before it, since an open transaction could still write and commit; and the mark of incident and round.
  - The mark is the parameter C(firebreak.fence), set with C(ALTER SYSTEM). It survives a restart, needs no write to any database, and is
    in no dump.
  - Sessions of replication stay. So do the sessions of other controls of this collection, and idle sessions of the role in use.
notes:
  - The fence is a soft one. A session that sets C(default_transaction_read_only) to C(off) for itself can write. Roles and databases that
    are set up to do so, and sessions that write right now, are named in RV(estimate).
  - Prepared transactions (two-phase commit) can still be committed. They are counted in RV(estimate).
  - The server must be PostgreSQL 17 or newer, and the role must be allowed to use C(ALTER SYSTEM).
extends_documentation_fragment:
  - firebreak.incident.attributes
  - firebreak.incident.common
  - firebreak.incident.postgresql
options:
  state:
    description:
      - V(enabled) raises the fence. V(disabled) puts back what stood there before, and ends no session.
      - A fence that bears the mark of another incident is refused in both states.
    type: str
    choices: [enabled, disabled]
    default: enabled
  previous:
    description:
      - What stood there before the fence. M(firebreak.incident.control_release) fills it in from the journal.
      - Without it, O(state=disabled) removes the setting and the mark of this incident.
      - With it, O(state=enabled) raises a fence again that was lifted, under the mark that it had.
    type: dict
    suboptions:
      default_transaction_read_only:
        description: The value in the server's C(postgresql.auto.conf); none when it was not set there.
        type: str
      mark:
        description: The mark of an earlier round.
        type: str
seealso:
  - module: firebreak.incident.postgresql_login_lock
  - module: firebreak.incident.control_release
"""

EXAMPLES = r"""
- name: Stop all writes to the database
  firebreak.incident.postgresql_write_fence:
    state: enabled
    incident_id: INC-2026-1120-001
    postgresql_host: 192.0.2.10
    postgresql_user: firebreak
    postgresql_password: "{{ lookup('ansible.builtin.env', 'PGPASSWORD') }}"

- name: Let the database write again
  firebreak.incident.postgresql_write_fence:
    state: disabled
    incident_id: INC-2026-1120-001
    postgresql_host: 192.0.2.10
    postgresql_user: firebreak
    postgresql_password: "{{ lookup('ansible.builtin.env', 'PGPASSWORD') }}"
"""

RETURN = r"""
changes:
  description: What was changed, or would be in check mode, in this order.
  returned: always
  type: list
  elements: dict
  sample: [{"action": "enable", "target": "default_transaction_read_only of the server", "reversible": true}]
estimate:
  description: Counts and names that traffic moves. They are shown, never compared.
  returned: always
  type: dict
  sample: {"sessions": 12}
state_before:
  description: What this control manages, before.
  returned: always
  type: dict
state_after:
  description: What this control manages, after; in check mode as planned.
  returned: always
  type: dict
diff:
  description: The part that differs.
  returned: always
  type: dict
incident_id:
  description: The incident.
  returned: always
  type: str
  sample: INC-2026-1120-001
mark:
  description: The mark that the control leaves in the service, naming incident and round.
  returned: always
  type: str
  sample: INC-2026-1120-001/1
outcome:
  description:
    - V(verified) when the target was read again and nothing was left to do, V(applied) when a slow target has not settled yet, V(unproven)
      when the effect could not be shown, V(planned) in check mode, and V(ok) when there was nothing to do.
  returned: always
  type: str
  sample: verified
"""

from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils import _postgresql
from ansible_collections.firebreak.incident.plugins.module_utils._control import Control
from ansible_collections.firebreak.incident.plugins.module_utils._errors import Refused, Unproven
from ansible_collections.firebreak.incident.plugins.module_utils._module import run_module
from ansible_collections.firebreak.incident.plugins.module_utils._plan import Change, Facts, Plan

SETTING = "default_transaction_read_only"
MARK = "firebreak.fence"
SPEC: dict[str, Any] = {
    "argument_spec": {
        "state": {"type": "str", "choices": ["enabled", "disabled"], "default": "enabled"},
        "previous": {"type": "dict", "options": {SETTING: {"type": "str"}, "mark": {"type": "str"}}},
    },
}


def read(client: _postgresql.Client, params: dict[str, Any]) -> Facts:
    client.require_version(17, "a write fence")
    return {
        SETTING: client.configured(SETTING),
        "loaded": client.loaded(SETTING),
        "mark": client.configured(MARK),
        "estimate": client.writers(SETTING),
    }


def plan(params: dict[str, Any], facts: Facts) -> Plan:
    before = {key: facts[key] for key in (SETTING, "loaded", "mark")}
    mark = before["mark"]
    if mark and mark.rpartition("/")[0] != params["incident_id"]:
        raise Refused(f"This server is fenced under {mark}. Release that incident's fence first.", guard="ownership")
    after = _wanted(params, before)
    # Only what lifts a fence is put back by raising it.
    lifts = before[SETTING] == "on" != after[SETTING]
    undo = {"state": "enabled" if lifts else "disabled", "previous": {SETTING: before[SETTING], "mark": mark}}
    changes = []
    if (after[SETTING], after["loaded"]) != (before[SETTING], before["loaded"]):
        action, data = (
            "enable" if after[SETTING] == "on" else "disable",
            {"parameter": SETTING, "value": after[SETTING]},
        )
        changes.append(Change(action, f"{SETTING} of the server", (SETTING,), undo, data=data))
    if params["state"] == "enabled" and after != before:
        # Its element is the mark, which is written when no such session is left.
        changes.append(Change("terminate", "client sessions begun before the fence", ("mark",), undo))
    if after["mark"] != mark:
        action, data = "create" if after["mark"] else "delete", {"parameter": MARK, "value": after["mark"]}
        changes.append(Change(action, f"mark {after['mark'] or mark}", ("mark",), undo, data=data))
    return Plan(before, after, tuple(changes), estimate=facts.get("estimate", {}))


def _wanted(params: dict[str, Any], before: Facts) -> Facts:
    if params["state"] == "enabled":
        mark = params["previous"]["mark"] if params["previous"] else params["mark"]
        return {SETTING: "on", "loaded": True, "mark": mark}
    if not params["previous"] and not before["mark"]:
        return before
    if params["previous"]:
        return {SETTING: params["previous"][SETTING], "loaded": True, "mark": params["previous"]["mark"]}
    # A value that is not the fence's is somebody else's by now.
    return {SETTING: None if before[SETTING] == "on" else before[SETTING], "loaded": True, "mark": None}


def apply(client: _postgresql.Client, params: dict[str, Any], change: Change) -> None:
    if change.action == "terminate":
        client.end_sessions_before_now()
    else:
        client.alter_system(change.data["parameter"], change.data["value"])


def prove(client: _postgresql.Client, params: dict[str, Any], change: Change) -> None:
    if change.action == "enable" and not client.write_is_refused():
        raise Unproven(
            f"The server took the setting, but a new session can write. See whether {SETTING} is set for the role "
            "of postgresql_user, for the database of postgresql_database, or on the server's command line."
        )
    if change.action == "terminate" and client.sessions_before():
        raise Unproven("Client sessions from before the fence are still there.")


CONTROL = Control(
    name="postgresql_write_fence", service=_postgresql, spec=SPEC, read=read, plan=plan, apply=apply, prove=prove
)


def main() -> None:
    run_module(CONTROL)


if __name__ == "__main__":
    main()
