# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The login fence: its plans, and a run on the lab's primary, which refuses what the standby lets in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from hypothesis import strategies as st

from tests.controls.postgresql_write_fence import connection, session
from tests.controls.postgresql_write_fence import observe as observe_server
from tests.foreign import Database
from tests.rows import Case, Reach, Row, Spoil, State

INCIDENT = "INC-2026-1120-001"
MARK = f"{INCIDENT}/1"
OTHER = "INC-2026-0101-007"


def options(*roles: str, state: str = "enabled", number: int = 1, **changed: Any) -> dict[str, Any]:
    own = {"roles": list(roles), "state": state, "previous": None, "incident_id": INCIDENT}
    return {**own, "mark": f"{INCIDENT}/{number}", "round": number, "postgresql_user": "firebreak", **changed}


def facts(*roles: str, mark: str | None = MARK, incident: str = INCIDENT, **estimate: Any) -> dict[str, Any]:
    own = {"roles": list(roles), "incident": incident, "mark": mark} if roles else dict(OPEN)
    return {**own, "estimate": {"own_role": "firebreak", "missing": [], "superusers": [], "sessions": 2, **estimate}}


OPEN: dict[str, Any] = {"roles": None, "incident": None, "mark": None}
FENCED = {"roles": ["app"], "incident": INCIDENT, "mark": MARK}
RAISE, LIFT = ("create", "login fence for app"), ("delete", "login fence for app")
END, CREATE = ("terminate", "sessions of app"), ("create", f"mark {MARK} of the login fence")
NOTHING = {"roles": None, "mark": None}

PLANS = [
    Case("nobody is refused", options("app"), facts(), [RAISE, END, CREATE], FENCED),
    Case("nothing to do", options("app"), facts("app"), [], FENCED),
    Case("in any order", options("b", "app", "b"), facts("app", "b"), []),
    Case("cut off after the fence", options("app"), facts("app", mark=None), [END, CREATE], FENCED),
    Case("changed by a person", options("app"), facts("(edited)"), [RAISE, END], FENCED),
    Case(
        "one more role",
        options("app", "b"),
        facts("app"),
        [("create", "login fence for app, b"), ("terminate", "sessions of app, b")],
    ),
    Case(
        "a second round",
        options("app", number=2),
        facts("app"),
        [END, ("create", f"mark {INCIDENT}/2 of the login fence")],
    ),
    Case("another incident's", options("app"), facts("app", incident=OTHER, mark=f"{OTHER}/1"), raises=OTHER),
    Case("not ours to lift", options("app", state="disabled"), facts("app", incident=OTHER), raises=OTHER),
    Case("no role", options(), facts(), raises="at least one role"),
    Case("no such role", options("app"), facts(missing=["app"]), raises="no role app"),
    Case("a superuser", options("app"), facts(superusers=["app"]), raises="app is the role in use, or a superuser"),
    Case("our own role", options("firebreak"), facts(), raises="firebreak is the role in use"),
    Case("undo", options("app", state="disabled", previous=NOTHING), facts("app"), [LIFT], OPEN),
    Case("undo without a mark", options("app", state="disabled", previous=NOTHING), facts("app", mark=None), [LIFT], OPEN),
    Case("undo twice", options("app", state="disabled", previous=NOTHING), facts(), [], OPEN),
    Case(
        "undo of one more role",
        options("app", "b", state="disabled", previous={"roles": ["app"], "mark": MARK}),
        facts("app", "b"),
        [RAISE],
        FENCED,
    ),
    Case(
        "undo of a second round",
        options("app", state="disabled", previous={"roles": ["app"], "mark": MARK}),
        facts("app", mark=f"{INCIDENT}/2"),
        [CREATE],
        FENCED,
    ),
    Case("by hand", options("app", state="disabled"), facts("app"), [LIFT], OPEN),
    Case(
        "back again under its mark",
        options("app", number=2, previous={"roles": ["app"], "mark": MARK}),
        facts(),
        [RAISE, END, CREATE],
        FENCED,
    ),
]  # fmt: skip


def login(lab: Any, role: str, host: str = "pg1", **settings: Any) -> psycopg.Connection[Any]:
    """A login as the application or a thief makes one."""
    lines = (lab.dir / "app" / "app.env").read_text().splitlines()
    words = {"reporting": lab.stolen["reporting_password"]}
    words |= {"app": next(one.partition("=")[2] for one in lines if one.startswith("DATABASE_PASSWORD="))}
    return session(lab, role, host, password=words[role], **settings)


def observe(lab: Any) -> dict[str, Any]:
    with session(lab) as database:
        triggers = database.execute(
            "SELECT evtname, evtevent, evtenabled, obj_description(oid, 'pg_event_trigger') FROM pg_event_trigger ORDER BY 1"
        ).fetchall()
        functions = database.execute(
            "SELECT n.nspname, p.proname, p.prosrc, obj_description(p.oid, 'pg_proc') FROM pg_proc p"
            " JOIN pg_namespace n ON n.oid = pronamespace WHERE prorettype = 'event_trigger'::regtype ORDER BY 1, 2"
        ).fetchall()
        schemas = database.execute("SELECT nspname FROM pg_namespace ORDER BY 1").fetchall()
    own = {"triggers": triggers, "functions": functions, "schemas": schemas}
    lists = {
        name: [list(row) for row in rows if not str(row[0]).startswith(("pg_temp", "pg_toast_temp"))]
        for name, rows in own.items()
    }
    return {**observe_server(lab), **lists}


class Lab(Row):
    control = "postgresql_login_fence"
    host = "pg1"
    touches = ("postgresql",)
    # Somebody else's trigger at the same event, and a thief who is there before the fence.
    usual = {"sessions": ["reporting"], "trigger": True}

    def __init__(self) -> None:
        self._sessions: list[tuple[str, psycopg.Connection[Any]]] = []

    def params(self, lab: Any) -> dict[str, Any]:
        return {"state": "enabled", "roles": ["reporting", "batch"], **connection(lab)}

    def states(self) -> st.SearchStrategy[State]:
        usual = st.lists(st.sampled_from(["batch", "reporting", "analyst"]), min_size=1, max_size=3)
        odd = st.lists(st.sampled_from(["analyst", "nobody", "firebreak", "postgres"]), max_size=2)
        return st.fixed_dictionaries(
            {
                "options": st.fixed_dictionaries({"roles": st.one_of(usual, usual, odd)}),
                "sessions": st.lists(st.sampled_from(["app", "reporting"]), max_size=2),
            },
            optional={"trigger": st.booleans(), "fence": st.sampled_from([OTHER])},
        )

    def bring(self, lab: Any, state: State) -> None:
        for _role, one in self._sessions:
            one.close()
        with session(lab, default_transaction_read_only="off") as database:
            database.execute("ALTER ROLE reporting LOGIN CONNECTION LIMIT -1 VALID UNTIL 'infinity'")
            for name in ("firebreak_login_fence", "audit"):
                database.execute(f"DROP EVENT TRIGGER IF EXISTS {name}; DROP SCHEMA IF EXISTS {name} CASCADE")
            for name in ["audit"] * state.get("trigger", False) + ["firebreak_login_fence"] * ("fence" in state):
                database.execute(
                    f"CREATE SCHEMA {name}; CREATE FUNCTION {name}.login() RETURNS event_trigger LANGUAGE plpgsql"
                    f" AS $$ BEGIN END $$; CREATE EVENT TRIGGER {name} ON login EXECUTE FUNCTION {name}.login()"
                )
            if "fence" in state:
                self._tell(database, state["fence"], "login")
        self._sessions = [(role, login(lab, role)) for role in state.get("sessions", ())]

    @staticmethod
    def _tell(database: psycopg.Connection[Any], incident: str, function: str) -> None:
        told = f'{{"incident": "{incident}", "roles": ["app"]}}'
        database.execute(f"COMMENT ON FUNCTION firebreak_login_fence.{function}() IS '{told}'")

    def refusal(self, lab: Any, state: State) -> str | None:
        names = self.asked(lab, state)["roles"]
        if "fence" in state:
            return f"Logins are fenced under {OTHER}"
        if not names:
            return "roles: name at least one role"
        if "nobody" in names:
            return "roles: the server has no role nobody"
        passing = sorted({"firebreak", "postgres"} & {*names})
        return f"roles: {', '.join(passing)} is the role in use, or a superuser" if passing else None

    def effect(self, lab: Any, state: State, before: dict[str, Any], seen: dict[str, Any]) -> None:
        before, seen = before["postgresql"], seen["postgresql"]
        names = self.asked(lab, state)["roles"]
        for part in ("schemas", "functions", "event triggers"):
            added = [row for row in seen[part] if row not in before[part]]
            assert [row[0] for row in added] == ["firebreak_login_fence"], part
            seen[part] = [row for row in seen[part] if row not in added]
            if part == "event triggers":
                assert added[0][2] == "A" and added[0][3].startswith("INC-") and added[0][3].endswith("/1")
        for dump in (before, seen):  # a session that a trigger looked at has loaded its language
            dump["settings"] = [line for line in dump["settings"] if not line[0].startswith("plpgsql.")]
        assert seen == before
        for role, one in self._sessions:
            if role in names:
                with pytest.raises(psycopg.OperationalError):
                    one.execute("SELECT 1")
                with pytest.raises(psycopg.OperationalError, match="not permitted to log in"):
                    login(lab, role)
            else:
                one.execute("SELECT 1")
                login(lab, role).close()

    def spoils(self, lab: Any) -> dict[str, Spoil]:
        def run(statement: str) -> Callable[[], None]:
            def make() -> None:
                with session(lab, default_transaction_read_only="off") as database:
                    database.execute(statement)

            return make

        def shows(query: str, value: Any) -> Callable[[], bool]:
            def stands() -> bool:
                with session(lab) as database:
                    return database.execute(query).fetchone() == value

            return stands

        def foreign() -> None:
            with session(lab, default_transaction_read_only="off") as database:
                self._tell(database, OTHER, "refuse")

        ours = "FROM pg_event_trigger e JOIN pg_proc p ON p.oid = evtfoid WHERE evtname = 'firebreak_login_fence'"
        drop = "DROP EVENT TRIGGER firebreak_login_fence; DROP SCHEMA firebreak_login_fence CASCADE"
        told = f"SELECT obj_description(p.oid, 'pg_proc') LIKE '%{OTHER}%' {ours}"
        return {
            "taken away": Spoil(run(drop), shows(f"SELECT evtname {ours}", None), conflict=False),
            "disabled": Spoil(
                run("ALTER EVENT TRIGGER firebreak_login_fence DISABLE"), shows(f"SELECT evtenabled {ours}", ("D",))
            ),
            "another's": Spoil(foreign, shows(told, (True,)), theirs=True),
        }

    def observe(self, lab: Any) -> dict[str, Any]:
        return observe(lab)

    def contained(self, lab: Any, before: dict[str, Any], seen: dict[str, Any]) -> None:
        for name in ("triggers", "functions", "schemas"):
            added = [row for row in seen[name] if row not in before[name]]
            assert [row[0] for row in added] == ["firebreak_login_fence"]
            assert [row for row in seen[name] if row not in added] == before[name]
        own = ("triggers", "functions", "schemas")
        assert {key: value for key, value in seen.items() if key not in own} == {
            key: value for key, value in before.items() if key not in own
        }
        for role in ("reporting",):
            with pytest.raises(psycopg.OperationalError, match="not permitted to log in"):
                login(lab, role)
            with pytest.raises(psycopg.OperationalError, match="permission denied"):
                login(lab, role, event_triggers="off")
            lab.until(lambda role=role: _on_standby(lab, role), f"{role} does not get in on the standby")
        for _role, one in self._sessions:
            with pytest.raises(psycopg.OperationalError):
                one.execute("SELECT 1")

    def foreign(self, lab: Any) -> Database:
        return Database(lab)

    def reach(self, lab: Any) -> Reach:
        """A protected role may be named: it gets in on the standbys."""
        return Reach()

    def secrets(self, lab: Any) -> list[str]:
        return [lab.hostvars("pg1")["firebreak_postgresql_password"], lab.stolen["reporting_password"]]


def _on_standby(lab: Any, role: str) -> bool:
    with login(lab, role, "pg2") as there:
        return there.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)
