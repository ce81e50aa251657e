#!/usr/bin/python
# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_session_revocation
short_description: Revoke sessions that are kept in Redis or Valkey
version_added: 1.0.0
author: The firebreak.incident contributors (@firebreak)
description:
  - Unlinks the keys of sessions, of all users or of some, in one scan that other clients hardly notice. C(KEYS) is never sent.
  - With O(issued_before) only sessions that began before that time go. A full scan is repeated until it finds none, while the server
    tells which session keys are written meanwhile, so that a session that is renewed during the scan does not slip through.
  - The last step is a mark, the key C(firebreak:revocation:INCIDENT/ROUND:DIGEST), which expires when the incident does. While it is there,
    running the same task again changes nothing, so that users who logged in since keep their sessions.
  - A crash before the mark is harmless. The same task finds the rest.
notes:
  - It cannot be undone. The evidence of the sessions is exported before, or the engine refuses.
  - The user of Redis needs C(HELLO), C(DBSIZE), C(SCAN), C(GET), C(MGET), C(EXISTS), C(SET) and C(UNLINK). For sessions that are renewed
    during the scan it needs C(CLIENT TRACKING) and the channel C(__redis__:invalidate) too.
  - A replica, a sentinel and a node of a cluster are refused.
extends_documentation_fragment:
  - firebreak.incident.attributes
  - firebreak.incident.common
  - firebreak.incident.redis
options:
  key_template:
    description:
      - How the key of a session is made. V({user}) and V({id}) stand for one or more characters without a separator, where separators are
        the characters of the template that are neither letters nor digits.
      - Keys that do not match as a whole are not touched.
    type: str
    default: "session:refresh:{user}:{id}"
  scope:
    description:
      - V(users) revokes the sessions of O(users). V(all) revokes everybody's, and needs O(break_glass) for C(all_sessions).
      - V(all) spares the accounts that are protected.
    type: str
    choices: [users, all]
    default: users
  users:
    description: The users as they stand in the key, compared as a whole.
    type: list
    elements: str
  issued_before:
    description:
      - Only sessions that began before this time are revoked. Seconds since 1970, or ISO 8601 with a time zone.
      - It must be the same time when the task runs again. An earlier one is covered by the mark, a later one sweeps again.
      - Without it, the sessions of one full scan go, whenever they began, and their values are not read.
    type: str
  issued_at:
    description:
      - The field of the session's JSON value that says when it began, for a session that is renewed when the first one did. Seconds or
        milliseconds since 1970, or ISO 8601.
      - A session without this field counts as old. When none of the sampled sessions has it, nothing is revoked and the task fails.
    type: str
    default: iat
  batch:
    description: How many keys the server looks at in one step, up to 1000. More makes other clients wait.
    type: int
    default: 500
  deadline:
    description: Seconds after which the sweep gives up. What was revoked until then stays so, and running the task again goes on.
    type: int
    default: 110
seealso:
  - module: firebreak.incident.postgresql_login_lock
  - module: firebreak.incident.health_gate
"""

EXAMPLES = r"""
- name: End the sessions of two users that began before the thief was locked out
  firebreak.incident.redis_session_revocation:
    incident_id: INC-2026-1120-001
    redis_host: 192.0.2.20
    users: ["1001", "1002"]
    issued_before: "2026-11-20T03:10:00Z"
    evidence: [sessions]

- name: End every session; users log in again, there is no way back
  firebreak.incident.redis_session_revocation:
    incident_id: INC-2026-1120-001
    redis_host: 192.0.2.20
    scope: all
    issued_before: "2026-11-20T03:10:00Z"
    evidence: [sessions]
    break_glass:
      - guard: all_sessions
        reason: the signing secret was stolen
        date: "2026-11-20"
"""

RETURN = r"""
changes:
  description: What was changed, or would be in check mode, in this order.
  returned: always
  type: list
  elements: dict
  sample: [{"action": "revoke", "target": "all sessions session:refresh:{user}:{id}", "reversible": false}]
estimate:
  description: Counts and names that traffic moves. They are shown, never compared. The sessions are projected from a sample.
  returned: always
  type: dict
  sample: {"keys": 2000000, "sessions": 1000000, "sampled_sessions": 2500, "without_time": 0}
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

import hashlib
import json
from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils import _redis
from ansible_collections.firebreak.incident.plugins.module_utils._control import Control
from ansible_collections.firebreak.incident.plugins.module_utils._errors import Refused, Unproven
from ansible_collections.firebreak.incident.plugins.module_utils._module import run_module
from ansible_collections.firebreak.incident.plugins.module_utils._plan import Change, Facts, Plan
from ansible_collections.firebreak.incident.plugins.module_utils._sessions import (
    Template,
    begun_before,
    epoch,
    iso,
    issued,
)

SAMPLED_PAGES = 5
SAMPLED_VALUES = 200
SPEC: dict[str, Any] = {
    "argument_spec": {
        "key_template": {"type": "str", "default": "session:refresh:{user}:{id}", "no_log": False},
        "scope": {"type": "str", "choices": ["users", "all"], "default": "users"},
        "users": {"type": "list", "elements": "str"},
        "issued_before": {"type": "str"},
        "issued_at": {"type": "str", "default": "iat"},
        "batch": {"type": "int", "default": 500},
        "deadline": {"type": "int", "default": 110},
    },
    "required_if": [("scope", "users", ["users"])],
}


def read(client: _redis.Client, params: dict[str, Any]) -> Facts:
    _check_options(params)
    client.primary()
    entry = client.get(mark_key(params))
    estimate = {"keys": client.size()}
    if entry is None:
        estimate |= _sampled(client, params, estimate["keys"])
    return {"revoked": None if entry is None else json.loads(entry), "estimate": estimate}


def _sampled(client: _redis.Client, params: dict[str, Any], keys: int) -> dict[str, int]:
    names, complete = client.sample(SAMPLED_PAGES, params["batch"])
    found = template(params).pick(names)
    estimate = {"sessions": len(found) if complete else round(keys * len(found) / max(1, len(names)))}
    if params.get("issued_before") is None:
        return estimate
    times = issued(client.values(found[:SAMPLED_VALUES]), params["issued_at"])
    return {**estimate, "sampled_sessions": len(times), "without_time": times.count(None)}


def plan(params: dict[str, Any], facts: Facts) -> Plan:
    _check_options(params)
    moment = None if params.get("issued_before") is None else epoch("issued_before", params["issued_before"])
    users = len(set(params["users"])) if params["scope"] == "users" else None
    estimate, revoked = facts.get("estimate", {}), facts["revoked"]
    before = {"revoked": revoked}
    if revoked and _covers(revoked["issued_before"], moment):
        return Plan(before, before, estimate=estimate)
    if moment is not None and 0 < estimate.get("sampled_sessions", 0) == estimate["without_time"]:
        raise Refused("issued_at: no sampled session has this field; name the right one, or leave issued_before out")
    entry = {"issued_before": None if moment is None else iso(moment), "scope": params["scope"], "users": users}
    whose = _everybody(params) if users is None else f"sessions of {users} user{'s' if users != 1 else ''}"
    when = f", begun before {entry['issued_before']}" if moment is not None else ""
    changes = (
        Change("revoke", f"{whose}: {params['key_template']}{when}", ("revoked",), irreversible="users log in again"),
        Change("create", f"mark {mark_key(params)}", ("revoked",), irreversible="it records what cannot be undone"),
    )
    return Plan(
        before,
        {"revoked": entry},
        changes,
        estimate=estimate,
        covers={"accounts": sorted(set(params["users"]))} if users is not None else {},
        destroys=("sessions",),
        wide=("all_sessions",) if users is None else (),
    )


def _spared(params: dict[str, Any]) -> list[str]:
    """Protected accounts keep their sessions whoever else is signed out."""
    return sorted(set((params.get("protected") or {}).get("accounts") or [])) if params["scope"] == "all" else []


def _everybody(params: dict[str, Any]) -> str:
    spared = len(_spared(params))
    return (
        f"all sessions but those of {spared} protected account{'s' if spared != 1 else ''}"
        if spared
        else "all sessions"
    )


def _check_options(params: dict[str, Any]) -> None:
    template(params)
    if not 1 <= params["batch"] <= 1000 or params["deadline"] < 1:
        raise Refused("batch, deadline: batch is 1 to 1000 keys, deadline at least one second")


def _covers(done: str | None, asked: float | None) -> bool:
    if done is None or asked is None:
        return done is None and asked is None
    return epoch("issued_before", done) >= asked


def template(params: dict[str, Any]) -> Template:
    return Template(params["key_template"], params["users"] if params["scope"] == "users" else None, _spared(params))


def mark_key(params: dict[str, Any]) -> str:
    """One mark for each incident, round, and set of sessions. It names no user."""
    users = sorted(set(params["users"])) if params["scope"] == "users" else None
    spared = _spared(params)
    what = json.dumps([params["mark"], params["key_template"], users, *([spared] if spared else [])])
    return f"firebreak:revocation:{params['mark']}:{hashlib.sha256(what.encode()).hexdigest()[:12]}"


def apply(client: _redis.Client, params: dict[str, Any], change: Change) -> None:
    names, moment, field = template(params), params.get("issued_before"), params["issued_at"]
    if change.action == "create":
        entry = plan(params, {"revoked": None}).after["revoked"]
        expires = params.get("expires") and int(epoch("expires", params["expires"]))
        client.put(mark_key(params), json.dumps(entry), expires)
    elif moment is None:
        client.sweep(names.match, names.pick, None, params["batch"], params["deadline"])
    else:
        limit = epoch("issued_before", moment)
        client.sweep_until_none(
            names.match,
            names.pick,
            lambda keys, values: begun_before(keys, values, field, limit),
            params["batch"],
            params["deadline"],
            names.prefix,
        )


def prove(client: _redis.Client, params: dict[str, Any], change: Change) -> None:
    """Look again at keys that went, and, where sessions tell their time, at a sample of those that are there."""
    if change.action == "create":
        return
    keys = client.held.get("swept", [])
    if params.get("issued_before") is None:
        # Users log in again meanwhile, perhaps under the same name.
        if 2 * client.existing(keys) > len(keys):
            raise Unproven("most of the revoked sessions are there again: the application writes them back")
        return
    keys = keys + template(params).pick(client.sample(SAMPLED_PAGES, params["batch"])[0])[:SAMPLED_VALUES]
    there = {key: value for key, value in zip(keys, client.values(keys), strict=True) if value is not None}
    limit = epoch("issued_before", params["issued_before"])
    if begun_before(list(there), list(there.values()), params["issued_at"], limit):
        raise Unproven("sessions from before issued_before are there again: the application writes them back")


CONTROL = Control(
    name="redis_session_revocation",
    service=_redis,
    spec=SPEC,
    read=read,
    plan=plan,
    apply=apply,
    prove=prove,
    deadline=120,
    private=("users",),
)


def main() -> None:
    run_module(CONTROL)


if __name__ == "__main__":
    main()
