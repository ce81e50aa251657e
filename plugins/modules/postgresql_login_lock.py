#!/usr/bin/python
# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: postgresql_login_lock
short_description: Lock stolen PostgreSQL roles out
version_added: 1.0.0
author: The firebreak.incident contributors (@firebreak)
description:
  - Takes C(LOGIN) from roles, ends their sessions, and leaves its mark last. New logins are refused from the first step on.
  - Password, validity, memberships and rights of the roles are not touched, and neither are other roles' sessions.
  - The mark is the parameter C(firebreak.lock) of the role, which names incident and round.
  - It works on a server under M(firebreak.incident.postgresql_write_fence), which it lifts for its own session alone.
notes:
  - Roles are changed on the primary. A standby refuses it, and follows.
  - The role in use and protected roles are refused.
extends_documentation_fragment:
  - firebreak.incident.attributes
  - firebreak.incident.common
  - firebreak.incident.postgresql
options:
  roles:
    description: The roles, exactly as the server knows them. One that is not there is refused.
    type: list
    elements: str
    required: true
  state:
    description:
      - V(enabled) locks the roles. V(disabled) puts back what stood there before.
      - A role that bears the mark of another incident is refused in both states.
    type: str
    choices: [enabled, disabled]
    default: enabled
  previous:
    description:
      - What stood there before the lock. M(firebreak.incident.control_release) fills it in from the journal.
      - Without it, O(state=disabled) gives C(LOGIN) to those of the roles that bear the mark of this incident.
      - With it, O(state=enabled) locks a role again that was let in, under the mark that it had.
    type: dict
    suboptions:
      login:
        description: Whether the role had C(LOGIN).
        type: bool
        required: true
      mark:
        description: The mark of an earlier round.
        type: str
seealso:
  - module: firebreak.incident.postgresql_write_fence
  - module: firebreak.incident.control_release
"""

EXAMPLES = r"""
- name: Lock the stolen role out
  firebreak.incident.postgresql_login_lock:
    roles: [reporting]
    state: enabled
    incident_id: INC-2026-1120-001
    postgresql_host: 192.0.2.10
    postgresql_user: firebreak

- name: Let the role in again
  firebreak.incident.postgresql_login_lock:
    roles: [reporting]
    state: disabled
    incident_id: INC-2026-1120-001
    postgresql_host: 192.0.2.10
    postgresql_user: firebreak
"""

RETURN = r"""
changes:
  description: What was changed, or would be in check mode, in this order.
  returned: always
  type: list
  elements: dict
  sample: [{"action": "disable", "target": "login of role reporting", "reversible": true}]
estimate:
  description: Counts and names that traffic moves. They are shown, never compared.
  returned: always
  type: dict
  sample: {"sessions": {"reporting": 2}}
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

MARK = "firebreak.lock"
SPEC: dict[str, Any] = {
    "argument_spec": {
        "roles": {"type": "list", "elements": "str", "required": True},
        "state": {"type": "str", "choices": ["enabled", "disabled"], "default": "enabled"},
        "previous": {"type": "dict", "options": {"login": {"type": "bool", "required": True}, "mark": {"type": "str"}}},
    },
}


def read(client: _postgresql.Client, params: dict[str, Any]) -> Facts:
    found = {name: client.role(name, MARK) for name in params["roles"]}
    return {
        "roles": {name: role and {"login": role["login"], "mark": role["value"]} for name, role in found.items()},
        "estimate": {
            "sessions": {name: client.sessions_of(name) for name in found},
            **client.login_roles(params["roles"]),
        },
    }


def plan(params: dict[str, Any], facts: Facts) -> Plan:
    estimate = facts.get("estimate", {})
    enabled = params["state"] == "enabled"
    _check(params, facts["roles"], {params["postgresql_user"], estimate.get("own_role")})
    after = {name: _wanted(params, role) for name, role in facts["roles"].items()}
    login, sessions, marks = [], [], []
    for name, role in facts["roles"].items():
        new = after[name]
        # Only what let a role in is put back by a lock.
        lets_in = new["login"] and not role["login"]
        undo = {"state": "enabled" if lets_in else "disabled", "roles": [name], "previous": role}
        if new["login"] != role["login"]:
            action = "enable" if new["login"] else "disable"
            path = ("roles", name, "login")
            login.append(Change(action, f"login of role {name}", path, undo, data={"role": name}))
        path = ("roles", name, "mark")
        if enabled and new != role:
            # Its element is the mark, which is written when no session is left.
            sessions.append(Change("terminate", f"sessions of role {name}", path, undo, data={"role": name}))
        if new["mark"] != role["mark"]:
            action, data = "create" if new["mark"] else "delete", {"role": name, "mark": new["mark"]}
            marks.append(Change(action, f"mark of role {name}", path, undo, data=data))
    return Plan(
        {"roles": facts["roles"]},
        {"roles": after},
        (*login, *sessions, *marks),
        estimate,
        covers={"roles": list(facts["roles"])} if enabled else {},
        wide=("all_login_roles",) if enabled and estimate.get("other_login_roles") == 0 else (),
    )


def _check(params: dict[str, Any], roles: Facts, own: set[str | None]) -> None:
    if not roles:
        raise Refused("roles: name at least one role")
    for name, role in roles.items():
        if role is None:
            raise Refused(f"roles: the server has no role {name}")
        if params["state"] == "enabled" and name in own:
            raise Refused(f"roles: {name} is the role in use; take another for postgresql_user", guard="protected")
        if role["mark"] and role["mark"].rpartition("/")[0] != params["incident_id"]:
            raise Refused(
                f"roles: {name} is locked under {role['mark']}. Release that incident's lock first.", guard="ownership"
            )


def _wanted(params: dict[str, Any], role: Facts) -> Facts:
    previous = params["previous"]
    if params["state"] == "enabled":
        return {"login": False, "mark": previous["mark"] if previous else params["mark"]}
    if previous is None:
        return {"login": True, "mark": None} if role["mark"] else role
    # A role that may log in was let in by somebody else by now.
    return {"login": role["login"] or previous["login"], "mark": previous["mark"]}


def apply(client: _postgresql.Client, params: dict[str, Any], change: Change) -> None:
    role = change.data["role"]
    if change.action == "terminate":
        client.end_sessions_of(role)
    elif "mark" in change.data:
        client.alter_role_setting(role, MARK, change.data["mark"])
    else:
        client.alter_login(role, change.action == "enable")


def prove(client: _postgresql.Client, params: dict[str, Any], change: Change) -> None:
    role = change.data["role"]
    if params["state"] == "enabled" and "mark" in change.data and client.sessions_of(role):
        raise Unproven(f"Role {role} cannot log in any more, but one of its sessions is still there.")


CONTROL = Control(
    name="postgresql_login_lock", service=_postgresql, spec=SPEC, read=read, plan=plan, apply=apply, prove=prove
)


def main() -> None:
    run_module(CONTROL)


if __name__ == "__main__":
    main()
