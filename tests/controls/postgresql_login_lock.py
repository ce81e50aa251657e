# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The login lock: its plans, and a run against the lab's primary."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.controls.postgresql_write_fence import connection, observe, session
from tests.foreign import Database
from tests.rows import Case, Reach, Row

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


class Lab(Row):
    control = "postgresql_login_lock"
    host = "pg1"

    def params(self, lab: Any) -> dict[str, Any]:
        return {"state": "enabled", "roles": ["reporting", "readers"], **connection(lab)}

    def prepare(self, lab: Any) -> None:
        with session(lab, default_transaction_read_only="off") as database:
            database.execute("ALTER ROLE reporting LOGIN VALID UNTIL '2031-01-01'")
            database.execute("ALTER ROLE reporting RESET ALL")
            # A setting of the role's own stays beside our mark.
            database.execute("ALTER ROLE reporting SET work_mem = '8MB'")
            database.execute("ALTER ROLE readers NOLOGIN")
            database.execute("ALTER ROLE readers RESET ALL")

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
