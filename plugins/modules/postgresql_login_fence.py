#!/usr/bin/python
# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: postgresql_login_fence
short_description: Refuse the application on the primary, and let it in on the standbys
version_added: 1.0.0
author: The firebreak.incident contributors (@firebreak)
description:
  - Refuses new logins of roles to O(postgresql_database) on the primary, ends their sessions there, and leaves its mark last.
  - A standby has the same roles, and no way to refuse what its primary lets in. So the refusal is an event trigger for logins, which knows
    whether its server is a standby, and lets the roles in there.
  - It is the half of a switch to the replica that M(firebreak.incident.postgresql_write_fence) is too soft for. A session cannot lift it.
  - Neither passwords nor rights of the roles are touched. The trigger and its function lie in a schema of their own, and vanish with it.
notes:
  - The server must be PostgreSQL 17 or newer, and the role in use a superuser.
  - The role in use and superusers, who could pass it, are refused. A protected role may be named, since it gets in on the standbys.
  - A standby that is promoted meanwhile refuses the roles too, until this is released.
  - In the moment of its release PostgreSQL may refuse a login that has just begun, with C(cache lookup failed). The next one works.
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
      - V(enabled) refuses them. V(disabled) puts back what stood there before.
      - A fence of another incident is refused in both states.
    type: str
    choices: [enabled, disabled]
    default: enabled
  previous:
    description: What stood there before. M(firebreak.incident.control_release) fills it in from the journal.
    type: dict
    suboptions:
      roles: {description: The roles that were refused; none when there was no fence., type: list, elements: str}
      mark: {description: The mark of an earlier round., type: str}
seealso:
  - module: firebreak.incident.pgbouncer_route
  - module: firebreak.incident.postgresql_login_lock
  - module: firebreak.incident.postgresql_write_fence
"""

EXAMPLES = r"""
- name: Refuse the application on the primary
  firebreak.incident.postgresql_login_fence:
    roles: [backend]
    incident_id: INC-2026-1120-001
    postgresql_host: 192.0.2.10
    postgresql_user: firebreak
    postgresql_database: orders

- name: Let it in again
  firebreak.incident.postgresql_login_fence:
    roles: [backend]
    state: disabled
    incident_id: INC-2026-1120-001
    postgresql_host: 192.0.2.10
    postgresql_user: firebreak
    postgresql_database: orders
"""

RETURN = r"""
changes:
  description: What was changed, or would be in check mode, in this order.
  returned: always
  type: list
  elements: dict
  sample: [{"action": "create", "target": "login fence for backend", "reversible": true}]
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

EDITED = "(edited)"
SPEC: dict[str, Any] = {
    "argument_spec": {
        "roles": {"type": "list", "elements": "str", "required": True},
        "state": {"type": "str", "choices": ["enabled", "disabled"], "default": "enabled"},
        "previous": {
            "type": "dict",
            "options": {"roles": {"type": "list", "elements": "str"}, "mark": {"type": "str"}},
        },
    },
}


def read(client: _postgresql.Client, params: dict[str, Any]) -> Facts:
    client.require_version(17, "a login fence")
    fence = client.login_fence()
    estimate = client.fenced_roles(params["roles"])
    if fence is None:
        return {"roles": None, "incident": None, "mark": None, "estimate": estimate}
    roles = fence["roles"] if fence["sound"] else [EDITED]
    return {"roles": roles, "incident": fence["incident"], "mark": fence["mark"], "estimate": estimate}


def plan(params: dict[str, Any], facts: Facts) -> Plan:
    estimate = facts.get("estimate", {})
    before = {key: facts[key] for key in ("roles", "incident", "mark")}
    _check(params, before, estimate)
    after = _wanted(params, before)
    lifts = bool(before["roles"]) and not after["roles"]
    undo = {
        "state": "enabled" if lifts else "disabled",
        "roles": params["roles"],
        "previous": {"roles": before["roles"], "mark": before["mark"]},
    }
    changes = []
    if after["roles"] != before["roles"]:
        named = ", ".join(after["roles"] or before["roles"])
        action, data = "delete" if lifts else "create", {"roles": after["roles"], "incident": after["incident"]}
        changes.append(Change(action, f"login fence for {named}", ("roles",), undo, data={"step": "fence", **data}))
    if params["state"] == "enabled" and after != before:
        # Its element is the mark, which is written when no session is left.
        target, data = f"sessions of {', '.join(after['roles'])}", {"step": "end", "roles": after["roles"]}
        changes.append(Change("terminate", target, ("mark",), undo, data=data))
    if after["mark"] != before["mark"] and not lifts:
        data = {"step": "mark", "mark": after["mark"]}
        changes.append(Change("create", f"mark {after['mark']} of the login fence", ("mark",), undo, data=data))
    return Plan(before, after, tuple(changes), estimate)


def _check(params: dict[str, Any], now: Facts, estimate: Facts) -> None:
    if now["incident"] and now["incident"] != params["incident_id"]:
        raise Refused(
            f"Logins are fenced under {now['incident']}. Release that incident's fence first.", guard="ownership"
        )
    if not params["roles"]:
        raise Refused("roles: name at least one role")
    if params["state"] == "disabled":
        return
    if missing := estimate.get("missing"):
        raise Refused(f"roles: the server has no role {', '.join(missing)}")
    if passing := {*(estimate.get("superusers") or []), *({estimate.get("own_role")} & {*params["roles"]})}:
        raise Refused(
            f"roles: {', '.join(sorted(passing))} is the role in use, or a superuser who could pass", guard="protected"
        )


def _wanted(params: dict[str, Any], now: Facts) -> Facts:
    previous = params["previous"] or {}
    if params["state"] == "disabled" and not now["incident"]:
        return now
    if params["state"] == "enabled":
        roles, mark = previous.get("roles") or params["roles"], previous.get("mark") or params["mark"]
    else:
        roles, mark = previous.get("roles"), previous.get("mark")
    if not roles:
        return {"roles": None, "incident": None, "mark": None}
    return {"roles": sorted({*roles}), "incident": params["incident_id"], "mark": mark}


def apply(client: _postgresql.Client, params: dict[str, Any], change: Change) -> None:
    if change.data["step"] == "end":
        client.end_sessions_here(change.data["roles"])
    elif change.data["step"] == "mark":
        client.mark_login_fence(change.data["mark"])
    elif change.action == "delete":
        client.lift_login_fence()
    else:
        client.raise_login_fence(change.data["roles"], change.data["incident"])


def prove(client: _postgresql.Client, params: dict[str, Any], change: Change) -> None:
    if change.data["step"] == "end" and client.fenced_roles(change.data["roles"])["sessions"]:
        raise Unproven("The roles cannot log in any more, but one of their sessions is still there.")


CONTROL = Control(
    name="postgresql_login_fence", service=_postgresql, spec=SPEC, read=read, plan=plan, apply=apply, prove=prove
)


def main() -> None:
    run_module(CONTROL)


if __name__ == "__main__":
    main()
