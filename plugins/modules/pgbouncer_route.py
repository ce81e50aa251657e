#!/usr/bin/python
# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: pgbouncer_route
short_description: Lead the clients of a PgBouncer database to a replica, or nowhere
version_added: 1.0.0
author: The firebreak.incident contributors (@firebreak)
description:
  - Changes host and port in the line of a database in PgBouncer's own file, on the pool's host, and makes the running pool take it up.
  - A replica refuses every write, whatever a session sets for itself. That is what M(firebreak.incident.postgresql_write_fence) cannot say.
  - The mark comes first. It is a comment before the line, which names incident and round and keeps the line as it was, so that the way
    back is exact to the byte, and a password in the line leaves neither the file nor the host.
  - The switch is C(RELOAD), then C(WAIT_CLOSE). Clients keep their connections, and each goes on where the line leads when its transaction
    is over. Nobody is held, here or in another database of the pool, and a run that is killed leaves nobody held.
  - A server that hangs ends no transaction. After O(transaction_patience) the connections of this database are dropped with C(KILL), and
    C(RESUME) lets its clients come again.
  - Other lines of the file, its mode and its owner stay. It is replaced at once, never half written.
notes:
  - C(RELOAD) takes up whatever else was changed in the pool's files.
  - A run that was killed between C(KILL) and C(RESUME) leaves the database paused. The same command, or its release, ends that.
  - A database that somebody else has paused is refused.
  - Clients in session pooling are in a transaction, as the pool sees it, until they disconnect; they are dropped.
extends_documentation_fragment:
  - firebreak.incident.attributes
  - firebreak.incident.common
  - firebreak.incident.pgbouncer
options:
  routes:
    description: The databases. Each must have a line of its own in O(conffile).
    type: list
    elements: dict
    required: true
    suboptions:
      database: {description: The database as the pool's clients know it., type: str, required: true}
      host:
        description:
          - Where its clients are led, as the pool's host knows it. A standby of the same server, with the same roles and databases.
          - Without it the route is closed, and clients are refused. That needs a pool without a line for any other database (C(*)).
        type: str
      port: {description: The port there., type: int, default: 5432}
  state:
    description:
      - V(enabled) leads the clients there. V(disabled) puts back the line that stood there before.
      - A line that bears the mark of another incident is refused in both states.
    type: str
    choices: [enabled, disabled]
    default: enabled
  conffile:
    description: The file with the lines, on the pool's host. The one that PgBouncer was started with, where this is not set.
    type: str
  transaction_patience: {description: Seconds that transactions get to end by themselves., type: float, default: 3}
  previous:
    description: What stood there before. M(firebreak.incident.control_release) fills it in from the journal.
    type: dict
    suboptions:
      mark: {description: The mark of an earlier round., type: str}
seealso:
  - module: firebreak.incident.postgresql_write_fence
  - module: firebreak.incident.control_release
"""

EXAMPLES = r"""
- name: Let the application read from the replica
  firebreak.incident.pgbouncer_route:
    routes: [{database: orders, host: 192.0.2.11}]
    incident_id: INC-2026-1120-001
    pgbouncer_host: 192.0.2.20
    pgbouncer_user: firebreak

- name: Lead it back to the primary
  firebreak.incident.pgbouncer_route:
    routes: [{database: orders}]
    state: disabled
    incident_id: INC-2026-1120-001
    pgbouncer_host: 192.0.2.20
    pgbouncer_user: firebreak
"""

RETURN = r"""
changes:
  description: What was changed, or would be in check mode, in this order.
  returned: always
  type: list
  elements: dict
  sample: [{"action": "update", "target": "route of orders", "reversible": true}]
estimate:
  description: Counts that traffic moves, by database. They are shown, never compared.
  returned: always
  type: dict
  sample: {"orders": {"clients": 40, "in_transactions": 3}}
state_before: {description: "What this control manages, before.", returned: always, type: dict}
state_after: {description: What this control manages afterwards; in check mode as planned., returned: always, type: dict}
diff: {description: The part that differs., returned: always, type: dict}
incident_id: {description: The incident., returned: always, type: str, sample: INC-2026-1120-001}
mark: {description: "The mark in the file, which names incident and round.", returned: always, type: str, sample: INC-2026-1120-001/1}
outcome:
  description:
    - V(verified) when the target was read again and nothing was left to do, V(applied) when a slow target has not settled yet, V(unproven)
      when the effect could not be shown, V(planned) in check mode, and V(ok) when there was nothing to do.
  returned: always
  type: str
  sample: verified
"""

import re
from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils import _pgbouncer, _pgbouncer_ini
from ansible_collections.firebreak.incident.plugins.module_utils._control import Control
from ansible_collections.firebreak.incident.plugins.module_utils._errors import FirebreakError, Refused, Unproven
from ansible_collections.firebreak.incident.plugins.module_utils._module import run_module
from ansible_collections.firebreak.incident.plugins.module_utils._plan import Change, Facts, Plan

ROUTE: dict[str, Any] = {
    "database": {"type": "str", "required": True},
    "host": {"type": "str"},
    "port": {"type": "int", "default": 5432},
}
SPEC: dict[str, Any] = {
    "argument_spec": {
        "routes": {"type": "list", "elements": "dict", "required": True, "options": ROUTE},
        "state": {"type": "str", "choices": ["enabled", "disabled"], "default": "enabled"},
        "conffile": {"type": "str"},
        "transaction_patience": {"type": "float", "default": 3.0},
        "previous": {"type": "dict", "options": {"mark": {"type": "str"}}},
    },
}


def read(client: _pgbouncer.Client, params: dict[str, Any]) -> Facts:
    """For each database where the file leads, where it did before, under which mark; and what the running pool does."""
    _check_options(params)
    names = [route["database"] for route in params["routes"]]
    routes = {name: _read(client, params, name) for name in names}
    return {"routes": routes, "estimate": {name: client.clients(name) for name in names}}


def _read(client: _pgbouncer.Client, params: dict[str, Any], name: str) -> Facts:
    """A route that the pool has not taken up yet has a holder, and no mark."""
    line = client.look(_conffile(client, params), name)
    runs = client.runs(name)
    route = line.get("route")
    settled = (route == runs["to"] and not runs["paused"]) or route == line.get("original")
    return {
        "holder": line.get("mark"),
        "mark": line.get("mark") if settled else None,
        "route": f"{route} (edited)" if "edited" in line else route,
        "original": line.get("original"),
        "fallback": "fallback" in line,
        "running": runs["to"],
        "paused": runs["paused"],
    }


def _conffile(client: _pgbouncer.Client, params: dict[str, Any]) -> str:
    path: str = params["conffile"] or client.conffile()
    if not path.startswith("/"):
        raise Refused("conffile: give the full path of PgBouncer's file on the host; the pool does not know it")
    return path


def plan(params: dict[str, Any], facts: Facts) -> Plan:
    _check_options(params)
    before: Facts = facts["routes"]
    after: Facts = {}
    changes: list[Change] = []
    for route in params["routes"]:
        name = route["database"]
        after[name] = _wanted(params, route, before[name])
        changes += _changes(params, route, before[name], after[name])
    return Plan({"routes": before}, {"routes": after}, tuple(changes), estimate=facts.get("estimate", {}))


def _wanted(params: dict[str, Any], route: dict[str, Any], now: Facts) -> Facts:
    name, holder = route["database"], now["holder"]
    if holder and holder.rpartition("/")[0] != params["incident_id"]:
        raise Refused(
            f"{name} is led elsewhere under {holder}. Release that incident's route first.", guard="ownership"
        )
    mark = (params["previous"] or {}).get("mark")
    if params["state"] == "disabled":
        if not holder:
            return now
        if mark:
            return {**now, "holder": mark, "mark": mark}
        back = {"route": now["original"], "running": now["original"], "original": None}
        return {**now, **back, "paused": False, "holder": None, "mark": None}
    if now["paused"] and not holder:
        raise Refused(f"{name} is paused by somebody else; give RESUME {name} on the pool's console first", "ownership")
    if now["route"] is None:
        raise Refused(f"routes: {name} has no line of its own in conffile; add one to lead it elsewhere")
    to = f"{route['host']}:{route['port']}" if route["host"] else _pgbouncer_ini.CLOSED
    if to == _pgbouncer_ini.CLOSED and now["fallback"]:
        raise Refused(f"routes: {name} cannot be closed, the line for * would take its clients; give a host")
    mark = mark or params["mark"]
    led = {"route": to, "running": to, "original": now["original"] or now["route"]}
    return {**now, **led, "paused": False, "holder": mark, "mark": mark}


def _changes(params: dict[str, Any], route: dict[str, Any], before: Facts, after: Facts) -> list[Change]:
    """The mark is first when a route is enabled and last when it is put back: under it, what is half done is ours."""
    name = route["database"]
    lifts = bool(before["holder"]) and not after["holder"]
    undo = _undo(params, name, before, after)
    data = {"database": name, "from": before["route"], "to": after["route"]}
    marks, steps = [], []
    if after["holder"] != before["holder"]:
        do, target = "unmark" if lifts else "mark", f"mark {after['holder'] or before['holder']} at {name}"
        told = {**data, "do": do, "mark": after["holder"]}
        marks.append(Change("delete" if lifts else "create", target, ("routes", name, "mark"), undo, data=told))
    if moves := after["route"] != before["route"]:
        do = "lift" if lifts else "close" if after["route"] == _pgbouncer_ini.CLOSED else "route"
        steps.append(Change("update", f"route of {name}", ("routes", name, "route"), undo, data={**data, "do": do}))
    if (after["running"], after["paused"]) != (before["running"], before["paused"]):
        # Without a move of its own it completes one that was cut off, which has no mark until then.
        path = ("routes", name, "route" if moves else "mark")
        steps.append(Change("run", f"switch of {name}", path, undo, data={**data, "do": "switch"}))
    return [*steps, *marks] if lifts else [*marks, *steps]


def _undo(params: dict[str, Any], name: str, before: Facts, after: Facts) -> dict[str, Any]:
    """Back to the line as it was; or to a route that stood under a mark of ours, and that a person or a release had changed."""
    options = {"conffile": params["conffile"]} if params["conffile"] else {}
    host, _colon, port = str(before["route"]).removesuffix(" (edited)").rpartition(":")
    there = {"host": host, "port": int(port)} if host else {}
    stood = before["holder"] and before["route"] not in (before["original"], after["route"])
    if stood or (before["holder"] and not after["holder"]):
        options |= {"state": "enabled", "routes": [{"database": name, **there}]}
    else:
        options |= {"state": "disabled", "routes": [{"database": name}]}
    earlier = before["mark"] if before["holder"] != after["holder"] or stood else None
    return {**options, "previous": {"mark": earlier}}


def _check_options(params: dict[str, Any]) -> None:
    names = [route["database"] for route in params["routes"]]
    if not names or len(set(names)) < len(names):
        raise Refused("routes must name at least one database, and each once")
    if not all(re.fullmatch(r"[A-Za-z0-9_-]+", name) and name != "pgbouncer" for name in names):
        raise Refused("routes: the name of a database in the pool consists of letters, digits, underscores and hyphens")
    if not all(re.fullmatch(r"[A-Za-z0-9_.,:/-]+", route["host"]) for route in params["routes"] if route["host"]):
        raise Refused("routes: host is a name or an address")
    if not 0 < params["transaction_patience"] <= 10:
        raise Refused("transaction_patience is more than 0 and at most 10 seconds")


def apply(client: _pgbouncer.Client, params: dict[str, Any], change: Change) -> None:
    data, conffile = change.data, _conffile(client, params)
    if data["do"] == "switch":
        client.switch(data["database"], params["transaction_patience"])
        if client.runs(data["database"])["to"] != data["to"]:
            raise FirebreakError("PgBouncer did not take up its file; its log names the line that is wrong")
        return
    line = client.look(conffile, data["database"])
    stood = data["to"] if data["do"] == "unmark" else data["from"]
    if line.get("route") != stood and line.get("route") != str(stood).removesuffix(" (edited)"):
        raise FirebreakError("conffile: somebody else changed it at the same time", effect="none")
    host, _colon, port = str(data["to"]).rpartition(":")
    told = {"do": data["do"], "mark": data.get("mark") or "", "host": host, "port": port}
    client.change(conffile, data["database"], line["seen"], told)


def prove(client: _pgbouncer.Client, params: dict[str, Any], change: Change) -> None:
    if change.data["do"] != "switch" or params["state"] != "enabled" or params["previous"]:
        return  # what is put back is what stood there, wherever that led
    name, seen = change.data["database"], client.arrives(change.data["database"])
    if change.data["to"] == _pgbouncer_ini.CLOSED:
        if seen is not None:
            raise Unproven(f"The route of {name} is closed, but a new client still gets in.")
    elif seen is None:
        raise Unproven(
            f"{name} is led to the replica, but pgbouncer_user does not get in there: is the replica up, and is "
            "pgbouncer_user one of its roles?"
        )
    elif not seen["standby"] or seen["writes"]:
        raise Unproven(f"{name} is led to another server, but that is no standby: a new client could write there.")


CONTROL = Control("pgbouncer_route", _pgbouncer, SPEC, read, plan, apply, prove, needs_host=True)


def main() -> None:
    run_module(CONTROL)


if __name__ == "__main__":
    main()
