# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The export: its plans, and a run against the lab's primary."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from psycopg import sql

from ansible_collections.firebreak.incident.plugins.modules.postgresql_export import _digest, _query
from tests.controls.postgresql_write_fence import connection, observe, session
from tests.foreign import Database
from tests.rows import Case, Reach, Row, State

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


# Types, each with values as the server reads them.
TYPES = {
    "integer": ["1", "17", "-5"],
    "text": ["", "a,b", 'q"uote', "two\nlines", "ünï\t\\.", "\\N", "NULL", "\r"],
    "bytea": ["\\x00ff", ""],
    "jsonb": ['{"a": [1, "ü", null]}', "null"],
    "timestamptz": ["2026-11-20T02:40:00+01:00", "infinity", "0044-03-15 BC"],
    "text[]": ['{"a,b",NULL,""}', "{}"],
    "numeric": ["NaN", "1.50", "1e30"],
    "boolean": ["t", "f"],
    "inet": ["2001:db8::/32", "192.0.2.1"],
    "interval": ["1 mon -3 days"],
    "double precision": ["0.1", "-Infinity"],
}
COLUMNS = ("id", "user_id", "created_at", 'an "odd" name', "ünï", "select", "a b", "dotted.name")
TABLES = ("generated", 'An "odd" täble', "select")
SCHEMAS = ("public", "Another schema")


class Lab(Row):
    control = "postgresql_export"
    host = "pg1"
    reversible = False
    _seen: frozenset[str] = frozenset()

    def params(self, lab: Any) -> dict[str, Any]:
        return {**{key: value for key, value in OWN.items() if value not in (None, [])}, **connection(lab)}

    def states(self) -> st.SearchStrategy[State]:
        def rows(columns: dict[str, str]) -> st.SearchStrategy[State]:
            row = st.tuples(*(st.sampled_from([None, *TYPES[kind]]) for kind in columns.values()))
            return st.fixed_dictionaries({"columns": st.just(columns), "rows": st.lists(row.map(list), max_size=4)})

        fixed = {"user_id": st.sampled_from(["integer", "text"]), "created_at": st.just("timestamptz")}
        free = {name: st.sampled_from(sorted(TYPES)) for name in COLUMNS if name not in fixed}
        table = st.fixed_dictionaries({}, optional={**free, **fixed}).flatmap(rows)
        asked = {
            "columns": st.lists(st.sampled_from(["id", "user_id", 'an "odd" name', "ünï"]), max_size=3, unique=True),
            "since": st.sampled_from(["2026-11-20T00:00:00Z", "2000-01-01", "yesterday"]),
            "user_ids": st.lists(st.sampled_from(["17", "-5", "it's", "a,b"]), max_size=2),
        }
        return st.fixed_dictionaries(
            {"table": table, "name": st.sampled_from(TABLES), "schema": st.sampled_from(SCHEMAS)},
            optional={"options": st.fixed_dictionaries({}, optional=asked), "gone": st.booleans()},
        )

    def bring(self, lab: Any, state: State) -> None:
        """In the usual state the lab's own rows are enough."""
        with session(lab, default_transaction_read_only="off") as database:
            database.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(SCHEMAS[1])))
            database.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(SCHEMAS[1])))
            for name in TABLES:
                database.execute(sql.SQL("DROP TABLE IF EXISTS public.{} CASCADE").format(sql.Identifier(name)))
            if "table" in state and not state.get("gone"):
                self._make(database, state)
        self._seen = frozenset(self._manifests(lab))

    @staticmethod
    def _make(database: Any, state: State) -> None:
        table, columns = sql.Identifier(state["schema"], state["name"]), state["table"]["columns"]
        made = [sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(kind)) for name, kind in columns.items()]
        database.execute(sql.SQL("CREATE TABLE {} ({})").format(table, sql.SQL(", ").join(made)))
        values = [sql.SQL("%s::{}").format(sql.SQL(kind)) for kind in columns.values()]
        for row in state["table"]["rows"]:
            some = sql.SQL("VALUES ({})").format(sql.SQL(", ").join(values)) if row else sql.SQL("DEFAULT VALUES")
            database.execute(sql.SQL("INSERT INTO {} {}").format(table, some), row)

    def asked(self, lab: Any, state: State) -> dict[str, Any]:
        if "table" not in state:
            return self.params(lab)
        options = {"name": OWN["name"], "covers": OWN["covers"], **connection(lab), **state.get("options", {})}
        return {**options, "table": f"{state['schema']}.{state['name']}"}

    def refusal(self, lab: Any, state: State) -> str | None:
        options = state.get("options", {})
        if options.get("user_ids") == []:
            return "user_ids: name at least one user"
        if options.get("since") == "yesterday":
            return "since: this is no ISO 8601 timestamp"
        if "table" not in state:
            return None
        columns = state["table"]["columns"]
        needed = {*options.get("columns", []), *(["created_at"] if "since" in options else [])}
        needed |= {"user_id"} if "user_ids" in options else set()
        if state.get("gone") or needed - columns.keys():
            return "a name does not exist there, or does not fit its type"
        odd = not {*options.get("user_ids", [])} <= {"17", "-5"}
        return "a value does not fit its column" if odd and columns["user_id"] == "integer" else None

    def effect(self, lab: Any, state: State, before: dict[str, Any], seen: dict[str, Any]) -> None:
        """Nothing on the server changes. The file is what the server's own copy is."""
        (place,) = set(self._manifests(lab)) - self._seen
        manifest = json.loads(Path(place).read_text())
        data = (Path(place.split(f"{manifest['incident']}/evidence/")[0]) / manifest["key"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == manifest["sha256"] and len(data) == manifest["bytes"]
        if "table" not in state:
            return
        options = state.get("options", {})
        names = sql.SQL(", ").join(map(sql.Identifier, options.get("columns", [])))
        where, order = [sql.SQL("true")], sql.SQL("")
        if "since" in options:
            moment = options["since"] + ("" if "T" in options["since"] else " UTC")
            where.append(sql.SQL("created_at > {}").format(sql.Literal(moment)))
            order = sql.SQL("ORDER BY created_at")
        if "user_ids" in options:
            where.append(sql.SQL("user_id::text = ANY ({})").format(sql.Literal(options["user_ids"])))
        query = sql.SQL("COPY (SELECT {} FROM {} WHERE {} {}) TO STDOUT WITH (FORMAT csv, HEADER)").format(
            names if options.get("columns") else sql.SQL("*" if state["table"]["columns"] else ""),
            sql.Identifier(state["schema"], state["name"]),
            sql.SQL(" AND ").join(where),
            order,
        )
        with session(lab, TimeZone="UTC", DateStyle="ISO") as database, database.cursor().copy(query) as copied:
            lines = [bytes(line) for line in copied]
        assert sorted(data.splitlines()) == sorted(b"".join(lines).splitlines())
        assert data.startswith(lines[0]) and manifest["rows"] == len(lines) - 1

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
