# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The write fence: its plans, and a run against the lab's primary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import strategies as st
from psycopg import sql

from tests import dumps
from tests.foreign import Database
from tests.rows import Case, Reach, Row, Spoil, State

INCIDENT = "INC-2026-1120-001"
MARK = f"{INCIDENT}/1"
SETTING = "default_transaction_read_only"


def _params(state: str = "enabled", previous: dict[str, Any] | None = None, number: int = 1) -> dict[str, Any]:
    mark = f"{INCIDENT}/{number}"
    return {"state": state, "previous": previous, "incident_id": INCIDENT, "mark": mark, "round": number}


def _facts(setting: str | None, mark: str | None, loaded: bool = True) -> dict[str, Any]:
    return {SETTING: setting, "loaded": loaded, "mark": mark}


ENABLE = ("enable", f"{SETTING} of the server")
DISABLE = ("disable", f"{SETTING} of the server")
END = ("terminate", "client sessions begun before the fence")
CREATE = ("create", f"mark {MARK}")
DELETE = ("delete", f"mark {MARK}")
FENCED = _facts("on", MARK)
NOTHING = {SETTING: None, "mark": None}

PLANS = [
    Case("an open server", _params(), _facts(None, None), [ENABLE, END, CREATE], FENCED),
    Case("explicitly off", _params(), _facts("off", None), [ENABLE, END, CREATE], FENCED),
    Case("spelled otherwise", _params(), _facts("true", None), [ENABLE, END, CREATE], FENCED),
    Case("already fenced", _params(), FENCED, [], FENCED),
    Case("read only before the incident", _params(), _facts("on", None), [END, CREATE], FENCED),
    Case("cut off before the reload", _params(), _facts("on", None, loaded=False), [ENABLE, END, CREATE], FENCED),
    Case("cut off before the mark", _params(), _facts("on", None), [END, CREATE], FENCED),
    Case("lifted by a person under our mark", _params(), _facts("off", MARK), [ENABLE, END], FENCED),
    Case(
        "a second round",
        _params(number=2),
        FENCED,
        [END, ("create", f"mark {INCIDENT}/2")],
        _facts("on", f"{INCIDENT}/2"),
    ),
    Case("another incident's fence", _params(), _facts("on", "INC-2026-0101-007/1"), raises="INC-2026-0101-007/1"),
    Case("not ours to lift", _params("disabled"), _facts("on", "INC-2026-0101-007/1"), raises="INC-2026-0101-007/1"),
    Case("an id that ours begins", _params(), _facts("on", f"{INCIDENT}9/1"), raises=f"{INCIDENT}9/1"),
    Case("undo where it was absent", _params("disabled", NOTHING), FENCED, [DISABLE, DELETE], _facts(None, None)),
    Case(
        "undo where it was off",
        _params("disabled", {SETTING: "off", "mark": None}),
        FENCED,
        [DISABLE, DELETE],
        _facts("off", None),
    ),
    Case(
        "undo where it was on", _params("disabled", {SETTING: "on", "mark": None}), FENCED, [DELETE], _facts("on", None)
    ),
    Case("undo without a mark", _params("disabled", NOTHING), _facts("on", None), [DISABLE], _facts(None, None)),
    Case(
        "undo cut off before the reload",
        _params("disabled", NOTHING),
        _facts(None, MARK, False),
        [DISABLE, DELETE],
        _facts(None, None),
    ),
    Case(
        "undo of a second round",
        _params("disabled", {SETTING: "on", "mark": MARK}, 2),
        _facts("on", f"{INCIDENT}/2"),
        [("create", f"mark {MARK}")],
        FENCED,
    ),
    Case("undo twice", _params("disabled", NOTHING), _facts(None, None), [], _facts(None, None)),
    Case("a person's value stays", _params("disabled"), _facts("off", MARK), [DELETE], _facts("off", None)),
    Case(
        "undo by force over a person's value",
        _params("disabled", NOTHING),
        _facts("off", MARK),
        [DISABLE, DELETE],
        _facts(None, None),
    ),
    Case("by hand", _params("disabled"), FENCED, [DISABLE, DELETE], _facts(None, None)),
    Case("nothing of ours", _params("disabled"), _facts("on", None), [], _facts("on", None)),
    Case(
        "nothing of ours, a reload due", _params("disabled"), _facts("on", None, False), [], _facts("on", None, False)
    ),
]


def session(lab: Any, user: str = "postgres", host: str = "pg1", **settings: Any) -> psycopg.Connection[Any]:
    """A session as anybody opens it. ``settings`` go to the server with the login."""
    words = {"postgres": lab.env["PGPASSWORD"], "firebreak": lab.hostvars("pg1")["firebreak_postgresql_password"]}
    return psycopg.connect(
        host="127.0.0.1",
        port=lab.hostvars(host)["firebreak_postgresql_port"],
        dbname="divan",
        user=user,
        password=words.get(user, settings.pop("password", None)),
        options=" ".join(f"-c {name}={value}" for name, value in settings.items()),
        autocommit=True,
    )


def connection(lab: Any, host: str = "pg1") -> dict[str, Any]:
    """The options that the inventory gives to the controls of this host."""
    values = lab.hostvars(host).items()
    return {key.removeprefix("firebreak_"): value for key, value in values if key.startswith("firebreak_postgresql_")}


def observe(lab: Any) -> dict[str, Any]:
    """Roles, their settings, rows, and the server's own configuration file."""
    with session(lab) as database:
        roles = database.execute(
            "SELECT rolname, rolcanlogin, rolsuper, rolconnlimit, rolvaliduntil::text, rolconfig FROM pg_roles ORDER BY 1"
        ).fetchall()
        secrets = database.execute(
            "SELECT md5(string_agg(rolname || rolpassword, ',' ORDER BY rolname)) FROM pg_authid"
        ).fetchone()
        own = database.execute(
            "SELECT setdatabase::int, setrole::int, setconfig FROM pg_db_role_setting ORDER BY 1, 2"
        ).fetchall()
        users = database.execute("SELECT md5(string_agg(u::text, ',' ORDER BY id)) FROM users u").fetchone()
        setting = database.execute(f"SELECT current_setting('{SETTING}')").fetchone()
    return {
        "configuration": (Path(lab.dir) / "run" / "pg1" / "postgresql.auto.conf").read_text(),
        "roles": [list(row) for row in roles],
        "passwords": list(secrets or ()),
        "settings": [list(row) for row in own],
        "users": list(users or ()),
        "read_only": list(setting or ()),
    }


class Lab(Row):
    control = "postgresql_write_fence"
    host = "pg1"
    touches = ("postgresql",)
    # Something of somebody else's in the same file, and somebody who is there before the fence.
    usual = {"file": {"log_min_duration_statement": "7s"}, "sessions": ["idle"]}

    def __init__(self) -> None:
        self._sessions: list[tuple[str, psycopg.Connection[Any]]] = []

    def params(self, lab: Any) -> dict[str, Any]:
        return {"state": "enabled", **connection(lab)}

    def states(self) -> st.SearchStrategy[State]:
        beside = {
            "log_min_duration_statement": st.just("7s"),
            "application_name": st.sampled_from(["it's", 'a "name"', "tëxt"]),
            "firebreak.other": st.text("abc/' ", max_size=5),
            SETTING: st.sampled_from(["on", "off", "true", "TRUE", "f", "yes", "1", "0", "tr"]),
            "firebreak.fence": st.sampled_from(["", "", "INC-2020-0101-001/1", "nonsense"]),
        }
        return st.fixed_dictionaries(
            {"file": st.fixed_dictionaries({}, optional=beside)},
            optional={
                "main file": st.sampled_from(["on", "off"]),
                "lifted for app": st.booleans(),
                "sessions": st.lists(st.sampled_from(["idle", "reading", "writing", "responder"]), max_size=3),
            },
        )

    def bring(self, lab: Any, state: State) -> None:
        for _kind, one in self._sessions:
            one.close()
        data = Path(lab.dir) / "run" / "pg1"
        lines = [line for line in (data / "postgresql.conf").read_text().splitlines() if not line.startswith(SETTING)]
        lines += [f"{SETTING} = {state['main file']}"] if "main file" in state else []
        (data / "postgresql.conf").write_text("\n".join([*lines, ""]))
        with session(lab, default_transaction_read_only="off") as database:
            database.execute("ALTER SYSTEM RESET ALL")
            for name, value in state["file"].items():
                parameter = sql.Identifier(*name.split("."))
                database.execute(sql.SQL("ALTER SYSTEM SET {} = {}").format(parameter, sql.Literal(value)))
            lifted = f"SET {SETTING} = off" if state.get("lifted for app") else f"RESET {SETTING}"
            database.execute(f"ALTER ROLE app {lifted}")
            (asked,) = database.execute("SELECT clock_timestamp()").fetchone() or ()
            database.execute("SELECT pg_reload_conf()")
        lab.until(lambda: self._loaded(lab, asked), "the server does not reload")
        self._sessions = [(kind, self._session(lab, kind)) for kind in state.get("sessions", ())]

    @staticmethod
    def _loaded(lab: Any, asked: Any) -> bool:
        with session(lab) as database:
            return database.execute("SELECT pg_conf_load_time() >= %s", [asked]).fetchone() == (True,)

    @staticmethod
    def _session(lab: Any, kind: str) -> psycopg.Connection[Any]:
        """The responder's own idle session is the only one that a fence leaves."""
        one = session(lab, "firebreak" if kind == "responder" else "postgres", default_transaction_read_only="off")
        if kind in ("reading", "writing"):
            one.execute("BEGIN")
            one.execute("SELECT 1" if kind == "reading" else "CREATE TABLE written_by_a_thief ()")
        return one

    def observe(self, lab: Any) -> dict[str, Any]:
        return observe(lab)

    def contained(self, lab: Any, before: dict[str, Any], seen: dict[str, Any]) -> None:
        added = sorted(set(seen["configuration"].splitlines()) - set(before["configuration"].splitlines()))
        assert [line.split(" = ")[0] for line in added] == [SETTING, "firebreak.fence"]
        assert seen["read_only"] == ["on"]
        assert {**seen, "configuration": "", "read_only": ""} == {**before, "configuration": "", "read_only": ""}
        with session(lab) as database, pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            database.execute("UPDATE users SET note = 'tampered' WHERE id = 1")
        for _kind, one in self._sessions:
            with pytest.raises(psycopg.OperationalError):
                one.execute("UPDATE users SET note = 'tampered' WHERE id = 1")

    def reach(self, lab: Any) -> Reach:
        return Reach()

    def foreign(self, lab: Any) -> Database:
        return Database(lab)

    def secrets(self, lab: Any) -> list[str]:
        return [lab.hostvars("pg1")["firebreak_postgresql_password"]]

    def refusal(self, lab: Any, state: State) -> str | None:
        mark = state["file"].get("firebreak.fence")
        return f"This server is fenced under {mark}" if mark else None

    def effect(self, lab: Any, state: State, before: dict[str, Any], seen: dict[str, Any]) -> None:
        before, seen = before["postgresql"], seen["postgresql"]
        mark = seen["configuration"].pop("firebreak.fence")
        assert mark.startswith("INC-") and mark.endswith("/1")
        before["configuration"].pop("firebreak.fence", None)
        before["configuration"][SETTING] = "on"
        for dump in (before, seen):
            dump["settings"] = [line for line in dump["settings"] if line[0] not in (SETTING, "firebreak.fence")]
        assert seen == before
        for kind, one in self._sessions:
            if kind == "responder":
                one.execute("SELECT 1")
            else:
                with pytest.raises(psycopg.OperationalError):
                    one.execute("COMMIT")
        with session(lab) as database, pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            database.execute("UPDATE users SET note = 'tampered' WHERE id = 1")

    def spoils(self, lab: Any) -> dict[str, Spoil]:
        def alter(text: str) -> Callable[[], None]:
            def change() -> None:
                with session(lab, default_transaction_read_only="off") as database:
                    database.execute(f"ALTER SYSTEM {text}")
                    database.execute("SELECT pg_reload_conf()")
                lab.until(lambda: self._reloaded(lab, text), "the server does not reload")

            return change

        def holds(name: str, value: str | None) -> Callable[[], bool]:
            return lambda: dumps.postgresql(lab)["configuration"].get(name) == value

        return {
            "lifted": Spoil(alter(f"SET {SETTING} = off"), holds(SETTING, "off")),
            "taken away": Spoil(alter(f"RESET {SETTING}"), holds(SETTING, None), conflict=False),
            "another's mark": Spoil(alter("SET firebreak.fence = 'x/1'"), holds("firebreak.fence", "x/1"), theirs=True),
        }

    @staticmethod
    def _reloaded(lab: Any, text: str) -> bool:
        with session(lab) as database:
            seen = database.execute(f"SELECT current_setting('{SETTING}')").fetchone()
        return seen == ("on",) if "fence" in text else seen == ("off",)
