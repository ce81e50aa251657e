# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The login lock: its plans, and a run against the lab's primary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from hypothesis import strategies as st
from psycopg import sql

from tests.controls.postgresql_write_fence import connection, observe, session
from tests.foreign import Database
from tests.rows import Case, Reach, Row, Spoil, State

INCIDENT = "INC-2026-1120-001"
MARK = f"{INCIDENT}/1"
OTHER = "INC-2026-0101-007/1"
OPEN = {"login": True, "mark": None}
SHUT = {"login": False, "mark": None}
LOCKED = {"login": False, "mark": MARK}


def _params(*roles: str, state: str = "enabled", previous: dict[str, Any] | None = None) -> dict[str, Any]:
    own = {"roles": list(roles), "state": state, "previous": previous, "postgresql_user": "firebreak"}
    return {**own, "incident_id": INCIDENT, "mark": MARK, "round": 1}


def _facts(estimate: dict[str, Any] | None = None, **roles: Any) -> dict[str, Any]:
    return {"roles": roles, "estimate": {"own_role": "firebreak", "other_login_roles": 3, **(estimate or {})}}


def _steps(role: str) -> list[tuple[str, str]]:
    return [
        ("disable", f"login of role {role}"),
        ("terminate", f"sessions of role {role}"),
        ("create", f"mark of role {role}"),
    ]


UNLOCK = [("enable", "login of role reporting"), ("delete", "mark of role reporting")]

PLANS = [
    Case(
        "a stolen role",
        _params("reporting"),
        _facts(reporting=OPEN),
        _steps("reporting"),
        {"roles": {"reporting": LOCKED}},
    ),
    Case(
        "several, refused logins first",
        _params("reporting", "batch"),
        _facts(reporting=OPEN, batch=OPEN),
        [step for pair in zip(_steps("reporting"), _steps("batch"), strict=True) for step in pair],
        {"roles": {"reporting": LOCKED, "batch": LOCKED}},
    ),
    Case("already locked", _params("reporting"), _facts(reporting=LOCKED), [], {"roles": {"reporting": LOCKED}}),
    Case(
        "could not log in before",
        _params("readers"),
        _facts(readers=SHUT),
        _steps("readers")[1:],
        {"roles": {"readers": LOCKED}},
    ),
    Case("cut off after the first step", _params("reporting"), _facts(reporting=SHUT), _steps("reporting")[1:]),
    Case(
        "let in by a person under our mark",
        _params("reporting"),
        _facts(reporting={**LOCKED, "login": True}),
        _steps("reporting")[:2],
    ),
    Case("no such role", _params("nobody"), _facts(nobody=None), raises="no role nobody"),
    Case("no role at all", _params(), _facts(), raises="at least one"),
    Case("our own role", _params("firebreak"), _facts(firebreak=OPEN), raises="role in use"),
    Case(
        "our own role by another name", _params("duty"), _facts({"own_role": "duty"}, duty=OPEN), raises="role in use"
    ),
    Case("another incident's lock", _params("reporting"), _facts(reporting={**LOCKED, "mark": OTHER}), raises=OTHER),
    Case(
        "not ours to unlock",
        _params("reporting", state="disabled"),
        _facts(reporting={**LOCKED, "mark": OTHER}),
        raises=OTHER,
    ),
    Case(
        "undo where it could log in",
        _params("reporting", state="disabled", previous=OPEN),
        _facts(reporting=LOCKED),
        UNLOCK,
        {"roles": {"reporting": OPEN}},
    ),
    Case(
        "undo where it could not",
        _params("reporting", state="disabled", previous=SHUT),
        _facts(reporting=LOCKED),
        UNLOCK[1:],
        {"roles": {"reporting": SHUT}},
    ),
    Case(
        "undo without a mark", _params("reporting", state="disabled", previous=OPEN), _facts(reporting=SHUT), UNLOCK[:1]
    ),
    Case("undo twice", _params("reporting", state="disabled", previous=OPEN), _facts(reporting=OPEN), []),
    Case(
        "by hand",
        _params("reporting", state="disabled"),
        _facts(reporting=LOCKED),
        UNLOCK,
        {"roles": {"reporting": OPEN}},
    ),
    Case(
        "nothing of ours", _params("readers", state="disabled"), _facts(readers=SHUT), [], {"roles": {"readers": SHUT}}
    ),
]


ROLES = ("reporting", "readers", 'an "odd" röle')
WORD = "of-no-use-elsewhere"


class Lab(Row):
    control = "postgresql_login_lock"
    host = "pg1"
    touches = ("postgresql",)

    usual = {
        # A setting of the role's own stays beside our mark.
        "reporting": {"login": True, "until": "2031-01-01", "settings": {"work_mem": "8MB"}},
        "readers": {"login": False},
    }

    def __init__(self) -> None:
        self._sessions: list[psycopg.Connection[Any]] = []

    def params(self, lab: Any) -> dict[str, Any]:
        return {"state": "enabled", "roles": ["reporting", "readers"], **connection(lab)}

    def states(self) -> st.SearchStrategy[State]:
        settings = {
            "work_mem": st.just("8MB"),
            "search_path": st.sampled_from(["", '"a b", public', "it's"]),
            "firebreak.other": st.text("ab=/' ", max_size=4),
            "firebreak.lock": st.sampled_from(["", "", "", "INC-2020-0101-001/1"]),
        }
        role = st.fixed_dictionaries(
            {"login": st.booleans()},
            optional={
                "limit": st.sampled_from([0, 3]),
                "until": st.sampled_from(["2031-01-01", "2020-01-01", "infinity"]),
                "settings": st.fixed_dictionaries({}, optional=settings),
                "settings in divan": st.fixed_dictionaries({}, optional={"work_mem": st.just("9MB")}),
                "member of": st.sampled_from(["pg_read_all_data", "pg_monitor"]),
                "sessions": st.integers(1, 2),
            },
        )
        usual = st.lists(st.sampled_from(ROLES), min_size=1, max_size=3)
        odd = st.lists(st.sampled_from([*ROLES, "nobody", "firebreak", "postgres"]), max_size=2)
        asked = st.fixed_dictionaries({"roles": st.one_of(usual, usual, usual, odd)})
        return st.fixed_dictionaries({"options": asked, **dict.fromkeys(ROLES, role)})

    def bring(self, lab: Any, state: State) -> None:
        for one in self._sessions:
            one.close()
        self._sessions = []
        with session(lab, default_transaction_read_only="off") as database:
            known = {name for (name,) in database.execute("SELECT rolname FROM pg_roles").fetchall()}
            for name in ROLES:
                if name not in known:
                    database.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(name)))
                self._make(lab, database, name, state.get(name, {"login": False}))

    def _make(self, lab: Any, database: psycopg.Connection[Any], name: str, role: State) -> None:
        def alter(text: str, *values: Any) -> None:
            parts = [value if isinstance(value, sql.Identifier) else sql.Literal(value) for value in values]
            database.execute(sql.SQL("ALTER ROLE {} " + text).format(sql.Identifier(name), *parts))

        for group in ("pg_read_all_data", "pg_monitor"):
            verb = "GRANT {} TO {}" if role.get("member of") == group else "REVOKE {} FROM {}"
            database.execute(sql.SQL(verb).format(sql.Identifier(group), sql.Identifier(name)))
        for where in ("", "IN DATABASE divan "):
            alter(f"{where}RESET ALL")
        alter("LOGIN CONNECTION LIMIT -1 VALID UNTIL 'infinity'")
        if role.get("sessions") and name != "reporting":
            alter("PASSWORD {}", WORD)
        word = lab.stolen["reporting_password"] if name == "reporting" else WORD
        for _number in range(role.get("sessions", 0)):
            self._sessions.append(session(lab, name, password=word))
        for where, settings in (("", "settings"), ("IN DATABASE divan ", "settings in divan")):
            for parameter, value in role.get(settings, {}).items():
                alter(f"{where}SET {{}} = {{}}", sql.Identifier(*parameter.split(".")), value)
        alter(
            f"{'LOGIN' if role['login'] else 'NOLOGIN'} CONNECTION LIMIT {{}} VALID UNTIL {{}}",
            role.get("limit", -1),
            role.get("until", "infinity"),
        )

    def observe(self, lab: Any) -> dict[str, Any]:
        return observe(lab)

    def contained(self, lab: Any, before: dict[str, Any], seen: dict[str, Any]) -> None:
        old, new = ({row[0]: row[1:] for row in state["roles"]} for state in (before, seen))
        changed = {name for name in new if new[name] != old[name]}
        assert changed == {"reporting", "readers"}
        for name in changed:
            assert new[name][0] is False
            assert new[name][1:4] == old[name][1:4]
            assert [line for line in new[name][4] if not line.startswith("firebreak.lock=INC-")] == (old[name][4] or [])
        assert {**seen, "roles": 0, "settings": 0} == {**before, "roles": 0, "settings": 0}
        with pytest.raises(psycopg.OperationalError, match="not permitted to log in"):
            session(lab, "reporting", password=lab.stolen["reporting_password"])

    def reach(self, lab: Any) -> Reach:
        with session(lab) as database:
            known = database.execute(
                "SELECT rolname FROM pg_roles WHERE rolcanlogin AND rolname <> 'firebreak'"
            ).fetchall()
        everybody = {"roles": sorted(name for (name,) in known), "protected": {}}
        return Reach((({"roles": ["reporting"]}, {}),), {"all_login_roles": everybody})

    def foreign(self, lab: Any) -> Database:
        return Database(lab, shared=("reporting", "readers"))

    def secrets(self, lab: Any) -> list[str]:
        return [lab.hostvars("pg1")["firebreak_postgresql_password"], lab.stolen["reporting_password"]]

    def refusal(self, lab: Any, state: State) -> str | None:
        names = self.asked(lab, state)["roles"]
        if not names:
            return "roles: name at least one role"
        for name in names:
            if name == "nobody":
                return "roles: the server has no role nobody"
            if name == "firebreak":
                return "roles: firebreak is the role in use"
            if mark := state.get(name, {}).get("settings", {}).get("firebreak.lock"):
                return f"roles: {name} is locked under {mark}"
        return "protected: roles postgres may not be covered" if "postgres" in names else None

    def effect(self, lab: Any, state: State, before: dict[str, Any], seen: dict[str, Any]) -> None:
        before, seen = before["postgresql"], seen["postgresql"]
        names = set(self.asked(lab, state)["roles"])
        locked = [row for row in seen["role settings"] if row[0] is None and row[1] in names]
        for _database, name, settings in locked:
            marks = [one for one in settings if one.startswith("firebreak.lock=INC-") and one.endswith("/1")]
            assert len(marks) == 1, name
            settings.remove(marks[0])
        assert {row[1] for row in locked} == names
        for row in before["role settings"]:
            if row[0] is None and row[1] in names:  # an empty mark is none
                row[2] = [one for one in row[2] if one != "firebreak.lock="]
        for dump in (before, seen):
            dump["role settings"] = [row for row in dump["role settings"] if row[2]]
        for (role,) in before["roles"]:
            role["rolcanlogin"] = role["rolcanlogin"] and role["rolname"] not in names
        assert seen == before
        for one in self._sessions:
            if one.info.user in names:
                with pytest.raises(psycopg.OperationalError):
                    one.execute("SELECT 1")
            else:
                one.execute("SELECT 1")

    def spoils(self, lab: Any) -> dict[str, Spoil]:
        def alter(text: str) -> Callable[[], None]:
            def change() -> None:
                with session(lab, default_transaction_read_only="off") as database:
                    database.execute(f"ALTER ROLE reporting {text}")

            return change

        def reads(what: str, value: Any) -> Callable[[], bool]:
            def stands() -> bool:
                with session(lab) as database:
                    query = f"SELECT {what} FROM pg_roles WHERE rolname = 'reporting'"
                    return database.execute(query).fetchone() == (value,)  # type: ignore[arg-type]

            return stands

        mark = "(SELECT c FROM unnest(rolconfig) c WHERE c LIKE 'firebreak.lock=%')"
        return {
            "let in": Spoil(alter("LOGIN"), reads("rolcanlogin", True), conflict=False),
            "unmarked": Spoil(alter("RESET firebreak.lock"), reads(mark, None), conflict=False),
            "another's mark": Spoil(
                alter("SET firebreak.lock = 'x/1'"), reads(mark, "firebreak.lock=x/1"), theirs=True
            ),
        }
