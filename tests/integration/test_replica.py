# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A data breach with the database frozen in mode replica: reads go on from the standby, and nobody can make a write possible."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from lab.client import Lab
from tests import dumps
from tests.controls.pgbouncer_route import client, where
from tests.controls.postgresql_login_fence import login
from tests.controls.postgresql_write_fence import session
from tests.runs import Run, extra, lab_in, run

REPLICA = extra(freeze_database_mode="replica")
IMPATIENT = extra(verify_recovery_timeout=1, firebreak_evidence_patience=2)


@dataclasses.dataclass
class Story:
    """One incident, with users at work, looked at after each run."""

    lab: Lab
    runs: dict[str, Run] = dataclasses.field(default_factory=dict)
    dumps: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    seen: dict[str, Any] = dataclasses.field(default_factory=dict)
    users: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with lab_in(tmp_path_factory.mktemp("replica") / "lab") as lab:
        told = Story(lab, dumps={"before": dumps.everything(lab)})
        begun, direct = client(lab), login(lab, "app")
        told.runs["dry"] = run(lab, "data_breach", *REPLICA, "--check", "--diff")
        told.dumps["dry"] = dumps.everything(lab)
        lab.crowd.start()
        lab.mark("start")
        told.runs["real"] = run(lab, "data_breach", *REPLICA)
        lab.mark("end")
        time.sleep(0.5)
        told.users = lab.crowd.summary()["phases"]
        lab.crowd.stop()
        told.seen["begun"], told.seen["new"] = where(begun), where(client(lab))
        told.seen["written"] = attempts(lab)
        told.seen["direct"] = [refused(lambda: direct.execute("SELECT 1")), refused(lambda: login(lab, "app"))]
        told.dumps["real"] = dumps.everything(lab)
        told.runs["again"] = run(lab, "data_breach", *REPLICA)
        told.dumps["again"] = dumps.everything(lab)
        told.runs["release"] = run(lab, "release", *extra(firebreak_incident_id=told.runs["real"].incident))
        told.dumps["release"] = dumps.everything(lab)
        told.seen["after"] = where(begun)
        yield told


def refused(attempt: Any) -> str:
    """What the server says to it; nothing when it lets it through."""
    try:
        attempt()
    except psycopg.Error as failure:
        return f"{failure.sqlstate} {failure}"
    return ""


def attempts(lab: Lab) -> list[str]:
    """Writes of the application through the pool, each after another way to ask for that."""
    told = []
    for ask in ("SET default_transaction_read_only = off", "BEGIN READ WRITE", "SET transaction_read_only = off"):
        with client(lab) as pool:
            told.append(
                refused(lambda ask=ask, pool=pool: pool.execute(f"{ask}; UPDATE users SET note = 'x' WHERE id = 1"))
            )
    return told


def test_it_ends_well_and_again(story: Story) -> None:
    for name in ("dry", "real", "again", "release"):
        assert story.runs[name].code == 0, story.runs[name].output
    assert "verything is contained" in story.runs["real"].screen
    assert story.runs["again"].changes(planned=False) == {}


def test_the_dry_run_touches_nothing_and_predicts_it(story: Story) -> None:
    assert story.dumps["dry"] == story.dumps["before"]
    for control in ("pgbouncer_route", "postgresql_login_fence", "postgresql_write_fence"):
        key = ("pg1", f"firebreak.incident.{control}")
        planned = story.runs["dry"].changes(planned=True)[key]
        assert planned and planned == story.runs["real"].changes(planned=False)[key]


def test_reads_come_from_the_standby(story: Story) -> None:
    """R-601, also for whoever was connected all the time."""
    standby = story.lab.hostvars("pg2")["firebreak_postgresql_port"]
    assert story.seen["begun"] == story.seen["new"] == [True, standby]


def test_no_setting_makes_a_write_possible(story: Story) -> None:
    codes = [told.split()[0] for told in story.seen["written"]]
    assert set(codes) <= {"25006", "0A000", "25001"} and codes[0] == "25006", story.seen["written"]


def test_the_primary_refuses_the_application(story: Story) -> None:
    ended, login = story.seen["direct"]
    assert ended and "not permitted to log in" in login


def test_users_were_served_all_the_time(story: Story) -> None:
    during = story.users["during"]
    assert during["served"] > 0
    assert during["refused"] == during["errors"] == 0, story.users


def test_the_release_leads_back_to_the_byte(story: Story) -> None:
    primary = story.lab.hostvars("pg1")["firebreak_postgresql_port"]
    assert story.seen["after"] == [False, primary]
    assert story.dumps["real"]["pool"] != story.dumps["before"]["pool"]
    before, after = story.dumps["before"], story.dumps["release"]
    for part in ("pool", "edge"):
        assert after[part] == before[part], part
    for part in ("roles", "configuration", "settings", "databases"):
        assert after["postgresql"][part] == before["postgresql"][part], part


@pytest.fixture
def own_lab(tmp_path: Any) -> Iterator[Lab]:
    with lab_in(tmp_path / "lab") as made:
        yield made


def test_a_pool_that_is_down_keeps_no_fence_from_being_raised(own_lab: Lab) -> None:
    own_lab.kill("pool1")
    first = run(own_lab, "data_breach", *REPLICA, *IMPATIENT)
    assert first.code != 0 and "pg1" in first.open, first.output
    assert dumps.fenced(own_lab)
    assert "not permitted to log in" in refused(lambda: login(own_lab, "app"))
    own_lab.start("pool1")
    again = run(own_lab, "data_breach", *REPLICA)
    assert again.code == 0 and again.incident == first.incident, again.output
    assert where(client(own_lab))[0] is True


def test_a_primary_that_is_down_keeps_nobody_from_the_standby(own_lab: Lab) -> None:
    own_lab.kill("pg1")
    first = run(own_lab, "data_breach", *REPLICA, *IMPATIENT)
    assert first.code != 0 and "pg1" in first.open, first.output
    assert where(client(own_lab))[0] is True
    own_lab.start("pg1")
    again = run(own_lab, "data_breach", *REPLICA)
    assert again.code == 0 and again.incident == first.incident, again.output
    assert dumps.fenced(own_lab)
    assert where(client(own_lab))[0] is True


def test_without_a_pool_it_says_that_it_is_fenced_only(own_lab: Lab) -> None:
    done = run(own_lab, "data_breach", *REPLICA, *extra(freeze_database_routes=[], firebreak_pgbouncer_routes=[]))
    assert done.code != 0 and "pg1" in done.open
    assert "the primary is fenced only" in done.screen
    with session(own_lab) as primary, pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        primary.execute("UPDATE users SET note = 'x' WHERE id = 1")
