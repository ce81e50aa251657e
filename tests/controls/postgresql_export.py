# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The export: its plans, and a run against the lab's primary."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

from ansible_collections.firebreak.incident.plugins.modules.postgresql_export import _digest, _query
from tests.controls.postgresql_write_fence import connection, observe, session
from tests.foreign import Database
from tests.rows import Case, Reach, Row

OWN: dict[str, Any] = {
    "name": "incident_sessions.csv",
    "table": "sessions",
    "columns": [],
    "since": None,
    "since_column": "created_at",
    "user_ids": ["17", "42"],
    "user_ids_column": "user_id",
    "covers": ["sessions"],
}
COUNTED = {"rows": 6, "counted": True}


def _params(**own: Any) -> dict[str, Any]:
    return {**OWN, "incident_id": "INC-2026-1120-001", "mark": "INC-2026-1120-001/1", "round": 1, **own}


def _exported(**own: Any) -> dict[str, Any]:
    params = _params(**own)
    return {"exported": {"covers": sorted(params["covers"]), "query": _digest(_query(params))}}


NONE: dict[str, Any] = {"exported": None, "estimate": COUNTED}
NEW = [("create", "evidence incident_sessions.csv")]

PLANS = [
    Case("not exported yet", _params(), NONE, NEW, _exported()),
    Case("exported in this round", _params(), _exported(), [], _exported()),
    Case("the same users in another order", _params(user_ids=["42", "17", "17"]), _exported(), []),
    Case(
        "the same moment, written otherwise",
        _params(since="2026-11-20T03:40+01:00"),
        _exported(since="2026-11-20T02:40Z"),
        [],
    ),
    Case(
        "a moment without an offset is UTC",
        _params(since="2026-11-20T02:40:00"),
        _exported(since="2026-11-20T02:40Z"),
        [],
    ),
    Case("the same table with its schema", _params(table="public.sessions"), _exported(), []),
    Case("other users under the same name", _params(user_ids=["1"]), _exported(), raises="another export"),
    Case("other kinds under the same name", _params(covers=["sessions", "rows"]), _exported(), raises="another export"),
    Case("SQL for a time", _params(since="'; DROP TABLE users"), NONE, raises="since"),
    Case("no time", _params(since=""), NONE, raises="since"),
    Case("no user", _params(user_ids=[]), NONE, raises="user_ids"),
    Case("a name that leads out of the case", _params(name="../incident.csv"), NONE, raises="name"),
    Case("a hidden name", _params(name=".csv"), NONE, raises="name"),
    Case("no table", _params(table=""), NONE, raises="table"),
    Case("too many parts", _params(table="divan.public.sessions"), NONE, raises="table"),
    Case("all rows", _params(user_ids=None), NONE, NEW, _exported(user_ids=None)),
]


class Lab(Row):
    control = "postgresql_export"
    host = "pg1"
    reversible = False

    def params(self, lab: Any) -> dict[str, Any]:
        return {**{key: value for key, value in OWN.items() if value not in (None, [])}, **connection(lab)}

    def prepare(self, lab: Any) -> None:
        """The lab's own rows are enough."""

    def observe(self, lab: Any) -> dict[str, Any]:
        """The server is as before, whatever is exported; the case holds one more artefact."""
        return {**observe(lab), "evidence": sorted(self._manifests(lab))}

    def contained(self, lab: Any, before: dict[str, Any], seen: dict[str, Any]) -> None:
        assert {**seen, "evidence": 0} == {**before, "evidence": 0}
        made = set(seen["evidence"]) - set(before["evidence"])
        assert len(made) == 1
        place = made.pop()
        manifest = json.loads(Path(place).read_text())
        store = Path(place.split(f"{manifest['incident']}/evidence/")[0])
        data = (store / manifest["key"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == manifest["sha256"]
        assert len(data) == manifest["bytes"]
        rows = list(csv.DictReader(data.decode().splitlines()))
        assert len(rows) == manifest["rows"]
        assert {row["user_id"] for row in rows} == {"17", "42"}
        assert {row["revoked"] for row in rows} == {"f"}
        with session(lab) as database:
            counted = database.execute("SELECT count(*) FROM sessions WHERE user_id IN (17, 42)").fetchone()
        assert counted == (len(rows),)

    @staticmethod
    def _manifests(lab: Any) -> list[str]:
        """Of every case under the lab's folder, wherever a test puts its store."""
        return [str(path) for path in Path(lab.dir).rglob("incident_sessions.csv.json")]

    def reach(self, lab: Any) -> Reach:
        return Reach()

    def foreign(self, lab: Any) -> Database:
        return Database(lab)

    def secrets(self, lab: Any) -> list[str]:
        return [lab.hostvars("pg1")["firebreak_postgresql_password"]]
