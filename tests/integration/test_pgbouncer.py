# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The pool's route against the lab: a primary that hangs, a person's hand in the file, a closed route, another host."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from ansible_collections.firebreak.incident.plugins.modules import control_release, pgbouncer_route
from lab.client import Lab
from tests import helpers
from tests.contract.rotation_walk import LocalHost
from tests.controls.pgbouncer_route import Lab as Route
from tests.controls.pgbouncer_route import client, connection, console, reset, settings_file, untouched, where
from tests.helpers_play import Play, task


class Trial:
    """One incident at the lab's pool."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.row = Route()
        self.row.prepare(lab)
        self.store = helpers.store_of(lab)
        self.incident = helpers.open_incident(lab, self.store, "pg1")
        self.around = helpers.surroundings(lab, self.store, "pg1", self.incident)
        self.params = {**self.row.params(lab), **self.around, "host": "pg1"}

    def run(self, **more: Any) -> dict[str, Any]:
        check = more.pop("check_mode", False)
        return helpers.execute(pgbouncer_route.CONTROL, {**self.params, **more}, host=LocalHost(), check_mode=check)

    def release(self, **more: Any) -> dict[str, Any]:
        options = {**self.around, **connection(self.lab), "host": "pg1", **more}
        return helpers.execute(control_release.CONTROL, options, host=LocalHost())


@pytest.fixture
def trial(lab: Lab) -> Iterator[Trial]:
    one = Trial(lab)
    yield one
    one.row.begun.close()
    reset(lab)


def ok(result: dict[str, Any]) -> dict[str, Any]:
    assert not result.get("failed"), result["msg"]
    return result


def test_a_primary_that_hangs_holds_nobody(lab: Lab, trial: Trial) -> None:
    """PAUSE would wait for ever for a transaction that nothing ends: it is dropped, in time."""
    trial.row.begun.execute("BEGIN")
    lab.pause("pg1")
    try:
        began = time.monotonic()
        result = ok(trial.run(transaction_patience=1))
        assert result["outcome"] == "verified" and time.monotonic() - began < 12
        with pytest.raises(psycopg.OperationalError):
            trial.row.begun.execute("SELECT 1")
        with client(lab, "firebreak") as session:
            assert where(session)[0] is True
    finally:
        lab.resume("pg1")
    ok(trial.release())
    assert settings_file(lab).read_text() == untouched(lab)
    with client(lab) as session:
        assert where(session)[0] is False


def test_a_transaction_may_end_by_itself(lab: Lab, trial: Trial) -> None:
    """Within the patience, and what it wrote is there."""
    trial.row.begun.execute("BEGIN")
    trial.row.begun.execute("UPDATE users SET note = 'in time' WHERE id = 30")
    trial.row.begun.execute("COMMIT")
    ok(trial.run())
    lab.until(lambda: note(trial.row.begun) == "in time", "the standby does not follow")
    ok(trial.release())


def note(session: psycopg.Connection[Any]) -> str:
    row = session.execute("SELECT note FROM users WHERE id = 30").fetchone()
    return str(row[0] if row else "")


def test_a_pool_that_a_dead_run_left_paused_goes_on(lab: Lab, trial: Trial) -> None:
    ok(trial.run())
    with console(lab) as pool:
        pool.execute("PAUSE divan")
    again = ok(trial.run())
    assert [change["action"] for change in again["changes"]] == ["run"]
    assert where(trial.row.begun)[0] is True
    with console(lab) as pool:
        pool.execute("PAUSE divan")
    ok(trial.release())
    assert where(trial.row.begun)[0] is False


def test_what_a_person_paused_stays_paused(lab: Lab, trial: Trial) -> None:
    with console(lab) as pool:
        pool.execute("PAUSE divan")
    result = trial.run()
    assert result["failed"] and "RESUME divan" in result["msg"]
    assert settings_file(lab).read_text() == untouched(lab)
    assert paused(lab)


def paused(lab: Lab) -> bool:
    with console(lab) as pool:
        return next(bool(row[11]) for row in pool.execute("SHOW DATABASES").fetchall() if row[0] == "divan")


def test_a_closed_route_refuses_everybody_and_comes_back(lab: Lab, trial: Trial) -> None:
    routes = [{"database": "divan"}]
    ok(trial.run(routes=routes))
    with pytest.raises(psycopg.OperationalError):
        trial.row.begun.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError):
        client(lab)
    with client(lab, "firebreak", "reports") as other:
        assert where(other)[0] is True
    assert not ok(trial.run(routes=routes))["changed"]
    ok(trial.release())
    assert settings_file(lab).read_text() == untouched(lab)
    with client(lab) as session:
        assert where(session)[0] is False


@pytest.mark.parametrize("change", ["port", "more"])
def test_what_a_person_changed_since_is_not_put_back_unless_forced(lab: Lab, trial: Trial, change: str) -> None:
    ok(trial.run())
    file = settings_file(lab)
    standby = lab.hostvars("pg2")["firebreak_postgresql_port"]
    line = f"\ndivan = host=127.0.0.1 port={standby} auth_user=pooler"
    by_hand = line.replace(str(standby), "1") if change == "port" else line + " pool_size=3"
    file.write_text(file.read_text().replace(line, by_hand))
    result = trial.release()
    assert result["failed"] and "changed by somebody else since" in result["msg"]
    assert by_hand in file.read_text()
    ok(trial.release(force=True))
    assert file.read_text() == untouched(lab)


def test_a_file_with_a_mistake_is_told_and_the_pool_goes_on(lab: Lab, trial: Trial) -> None:
    file = settings_file(lab)
    file.write_text(untouched(lab).replace("[databases]\n", "[databases]\nwrong = nonsense\n"))
    result = trial.run()
    assert result["failed"] and "did not take up its file" in result["msg"]
    assert not paused(lab) and where(trial.row.begun)[0] is False
    file.write_text(file.read_text().replace("wrong = nonsense\n", ""))
    ok(trial.run())
    assert where(trial.row.begun)[0] is True
    ok(trial.release())
    assert file.read_text() == untouched(lab)


def test_another_primary_is_no_replica(lab: Lab, trial: Trial) -> None:
    primary = lab.hostvars("pg1")["firebreak_postgresql_port"]
    result = trial.run(routes=[{"database": "reports", "host": "127.0.0.1", "port": primary}])
    assert result["failed"] and "no standby" in result["msg"]
    ok(trial.release())
    assert settings_file(lab).read_text() == untouched(lab)


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no such line": ({"routes": [{"database": "other", "host": "127.0.0.1"}]}, ["routes", "other", "conffile"]),
    "no such file": ({"conffile": "/nonexistent/pgbouncer.ini"}, ["conffile"]),
    "wrong password": ({"pgbouncer_password": "wrong-word"}, ["pgbouncer_password"]),
    "wrong port": ({"pgbouncer_port": 1}, ["pgbouncer_port"]),
    "off loopback": ({"pgbouncer_host": "192.0.2.1"}, ["loopback"]),
    "a user without rights": ({"pgbouncer_user": "pooler"}, ["pgbouncer_user"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_and_touches_nothing(lab: Lab, trial: Trial, name: str) -> None:
    changed, words = BAD[name]
    for check in (True, False):
        result = trial.run(**changed, check_mode=check)
        assert result["failed"] and not result["changed"]
        assert [word for word in words if word not in result["msg"]] == [], result["msg"]
        assert "wrong-word" not in json.dumps(result)
    assert settings_file(lab).read_text() == untouched(lab)


def test_over_ssh_and_nothing_is_shown(lab: Lab, trial: Trial, tmp_path: Path) -> None:
    """The file lies on another host, which tells nothing of it; a line may hold a password."""
    options = {**trial.params, "host": "app", "routes": [{"database": "archive", "host": "127.0.0.1", "port": 2}]}
    around = {"host": "app", **connection(lab), **trial.around}
    tasks = [
        task("check", "pgbouncer_route", options, check_mode=True, diff=True),
        task("route", "pgbouncer_route", options, diff=True),
        task("release", "control_release", around, diff=True),
    ]
    with Play(lab, tmp_path, "app", tasks, "-vvvv") as play:
        assert play.next("check")["changes"] == [
            {"action": "create", "target": f"mark {trial.incident}/1 at archive", "reversible": True},
            {"action": "update", "target": "route of archive", "reversible": True},
            {"action": "run", "target": "switch of archive", "reversible": True},
        ]
        routed = play.next("route")
        assert routed["status"] == "failed" and "is the replica up" in routed["msg"]  # nothing listens there
        assert "archive = host=127.0.0.1 port=2 password='it''s old'" in settings_file(lab).read_text()
        assert play.next("release")["status"] == "ok"
    assert settings_file(lab).read_text() == untouched(lab)
    assert "s old" not in play.console.read_text()
