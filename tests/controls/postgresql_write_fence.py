# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The write fence: its plans, and a run against the lab's primary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.foreign import Database
from tests.rows import Case, Reach, Row

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
    Case("a person's value stays", _params("disabled", NOTHING), _facts("off", MARK), [DELETE], _facts("off", None)),
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

    def params(self, lab: Any) -> dict[str, Any]:
        return {"state": "enabled", **connection(lab)}

    def prepare(self, lab: Any) -> None:
        with session(lab, default_transaction_read_only="off") as database:
            database.execute("ALTER SYSTEM RESET ALL")
            # Something of somebody else's in the same file.
            database.execute("ALTER SYSTEM SET log_min_duration_statement = '7s'")
            database.execute("SELECT pg_reload_conf()")
        lab.until(lambda: observe(lab)["read_only"] == ["off"], "the server does not reload")
        self.begun = session(lab)  # somebody who was there before the fence, and could write

    def observe(self, lab: Any) -> dict[str, Any]:
        return observe(lab)

    def contained(self, lab: Any, before: dict[str, Any], seen: dict[str, Any]) -> None:
        added = sorted(set(seen["configuration"].splitlines()) - set(before["configuration"].splitlines()))
        assert [line.split(" = ")[0] for line in added] == [SETTING, "firebreak.fence"]
        assert seen["read_only"] == ["on"]
        assert {**seen, "configuration": "", "read_only": ""} == {**before, "configuration": "", "read_only": ""}
        with session(lab) as database, pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            database.execute("UPDATE users SET note = 'tampered' WHERE id = 1")
        with pytest.raises(psycopg.OperationalError):
            self.begun.execute("UPDATE users SET note = 'tampered' WHERE id = 1")

    def reach(self, lab: Any) -> Reach:
        return Reach()

    def foreign(self, lab: Any) -> Database:
        return Database(lab)

    def secrets(self, lab: Any) -> list[str]:
        return [lab.hostvars("pg1")["firebreak_postgresql_password"]]
