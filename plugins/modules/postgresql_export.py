#!/usr/bin/python
# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: postgresql_export
short_description: Keep rows of a PostgreSQL table as evidence
version_added: 1.0.0
author: The firebreak.incident contributors (@firebreak)
description:
  - Copies rows of one table into the case, as CSV with a header, from one snapshot of the database and without writing to it.
  - The manifest, written last, holds SHA-256, size and number of rows. It is the mark.
    An export that has one is not made again in this round.
  - It works on a standby, and on a server under M(firebreak.incident.postgresql_write_fence).
  - Rows that a row policy would hide are an error, never a shorter file.
extends_documentation_fragment:
  - firebreak.incident.attributes
  - firebreak.incident.common
  - firebreak.incident.postgresql
options:
  name:
    description: Name of the file in the case, for example V(incident_sessions.csv).
    type: str
    required: true
  table:
    description: The table or view, with its schema where that is not V(public).
    type: str
    required: true
  columns:
    description: The columns. All where this is not set.
    type: list
    elements: str
    default: []
  since:
    description:
      - Only rows later than this time, in ISO 8601, ordered by it. UTC where it names no offset.
    type: str
  since_column:
    description: The column that O(since) is compared with.
    type: str
    default: created_at
  user_ids:
    description: Only rows of these users.
    type: list
    elements: str
  user_ids_column:
    description: The column that O(user_ids) is compared with.
    type: str
    default: user_id
  covers:
    description: The kinds of evidence that this export keeps, for example V(sessions). Controls that destroy one of them ask for it.
    type: list
    elements: str
    default: []
  deadline:
    description:
      - Seconds that the export may take; 120 at least. Give more for a large table.
      - With an S3 case store, whoever goes on after a killed run waits until this time is over.
    type: int
    default: 120
seealso:
  - module: firebreak.incident.redis_session_revocation
"""

EXAMPLES = r"""
- name: Keep the audit log since the incident began
  firebreak.incident.postgresql_export:
    name: incident_audit_logs.csv
    table: audit_logs
    since: '2026-11-20T02:40:00Z'
    covers: [audit_logs]
    incident_id: INC-2026-1120-001
    postgresql_host: 192.0.2.10
    postgresql_user: firebreak
    postgresql_database: shop

- name: Keep the sessions of the affected users before they are revoked
  firebreak.incident.postgresql_export:
    name: incident_sessions.csv
    table: sessions
    user_ids: ['17', '42']
    covers: [sessions]
    incident_id: INC-2026-1120-001
    postgresql_host: 192.0.2.10
    postgresql_user: firebreak
    postgresql_database: shop
"""

RETURN = r"""
changes:
  description: What was changed, or would be in check mode, in this order.
  returned: always
  type: list
  elements: dict
  sample: [{"action": "create", "target": "evidence incident_sessions.csv", "reversible": false, "irreversible": "evidence is kept"}]
estimate:
  description: Counts and names that traffic moves. They are shown, never compared.
  returned: always
  type: dict
  sample: {"rows": 312, "counted": true}
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
evidence:
  description: What the option O(evidence) of a control that destroys takes, as host, round and name.
  returned: always
  type: list
  elements: str
  sample: [db1/1/incident_sessions.csv]
outcome:
  description:
    - V(verified) when the target was read again and nothing was left to do, V(applied) when a slow target has not settled yet, V(unproven)
      when the effect could not be shown, V(planned) in check mode, and V(ok) when there was nothing to do.
  returned: always
  type: str
  sample: verified
"""

import datetime
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils import _postgresql
from ansible_collections.firebreak.incident.plugins.module_utils._control import Control
from ansible_collections.firebreak.incident.plugins.module_utils._errors import Refused
from ansible_collections.firebreak.incident.plugins.module_utils._module import run_module
from ansible_collections.firebreak.incident.plugins.module_utils._plan import Change, Facts, Plan

DEADLINE = 120
COUNT_SECONDS = 2
BLOCK = 256 * 1024
SPEC: dict[str, Any] = {
    "argument_spec": {
        "name": {"type": "str", "required": True},
        "table": {"type": "str", "required": True},
        "columns": {"type": "list", "elements": "str", "default": []},
        "since": {"type": "str"},
        "since_column": {"type": "str", "default": "created_at"},
        "user_ids": {"type": "list", "elements": "str"},
        "user_ids_column": {"type": "str", "default": "user_id"},
        "covers": {"type": "list", "elements": "str", "default": []},
        "deadline": {"type": "int", "default": DEADLINE},
    },
}


def _query(params: dict[str, Any]) -> dict[str, Any]:
    """What is asked of the table; a value that cannot be one is refused here, before any of it reaches the server."""
    table = params["table"].split(".")
    if not all(table) or len(table) > 2:
        raise Refused("table: give the table, or schema.table")
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", params["name"]):
        raise Refused("name: use letters, digits, dots, dashes and underscores, for example incident_sessions.csv")
    if params["user_ids"] is not None and not params["user_ids"]:
        raise Refused("user_ids: name at least one user, or leave it out for all rows")
    return {
        "table": table if len(table) == 2 else ["public", *table],
        "columns": params["columns"],
        "after": None if params["since"] is None else [params["since_column"], _time(params["since"])],
        "among": None if params["user_ids"] is None else (params["user_ids_column"], sorted(set(params["user_ids"]))),
    }


def _time(text: str) -> str:
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise Refused("since: this is no ISO 8601 timestamp, for example 2026-11-20T02:40:00Z") from None
    return (time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).astimezone(datetime.UTC).isoformat()


def _digest(query: dict[str, Any]) -> str:
    """Tells one question from another without naming whom it is about."""
    return hashlib.sha256(json.dumps(query, sort_keys=True).encode()).hexdigest()[:16]


def read(client: _postgresql.Client, params: dict[str, Any]) -> Facts:
    query = _query(params)
    manifest = client.evidence.exists(params["name"])
    if manifest:
        known = {key: manifest[key] for key in ("rows", "bytes", "sha256")}
        return {"exported": {"covers": manifest["covers"], "query": manifest["query"]}, "estimate": known}
    client.read_only()
    return {"exported": None, "estimate": client.count("count the rows", client.select(**query), COUNT_SECONDS)}


def plan(params: dict[str, Any], facts: Facts) -> Plan:
    wanted = {"covers": sorted(params["covers"]), "query": _digest(_query(params))}
    before = {"exported": facts["exported"]}
    estimate = facts.get("estimate", {})
    if facts["exported"] == wanted:
        return Plan(before, before, estimate=estimate)
    if facts["exported"]:
        raise Refused("name: in this round the case holds another export of this name; take another name")
    change = Change("create", f"evidence {params['name']}", ("exported",), irreversible="evidence is kept")
    return Plan(before, {"exported": wanted}, (change,), estimate)


def apply(client: _postgresql.Client, params: dict[str, Any], change: Change) -> None:
    query = _query(params)
    manifest = {
        "kind": "postgresql_export",
        "covers": sorted(params["covers"]),
        "query": _digest(query),
        "table": ".".join(query["table"]),
        "since": query["after"] and query["after"][1],
    }
    seconds = max(DEADLINE, params.get("deadline") or 0)
    client.evidence.write(params["name"], _blocks(client, query, manifest, seconds), manifest)


def _blocks(
    client: _postgresql.Client, query: dict[str, Any], manifest: dict[str, Any], seconds: float
) -> Iterator[bytes]:
    """The CSV in large pieces. At the end the manifest, which is written after it, learns the number of rows."""
    block, lines = bytearray(), 0
    for line in client.copy("export the rows", client.select(**query), seconds):
        block += line
        lines += 1
        if len(block) >= BLOCK:
            yield bytes(block)
            block.clear()
    yield bytes(block)
    manifest["rows"] = lines - 1


CONTROL = Control(
    name="postgresql_export",
    service=_postgresql,
    spec=SPEC,
    read=read,
    plan=plan,
    apply=apply,
    deadline=DEADLINE,
    evidence=True,
    private=("user_ids",),
)


def main() -> None:
    run_module(CONTROL)


if __name__ == "__main__":
    main()
