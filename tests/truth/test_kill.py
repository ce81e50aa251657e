# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""kill -9 around every entry of the journal and every change, and on the wire inside every request of a control's writes.

Then the same command, on this machine or on another: the state must be that of an undisturbed run, the case valid, and no
secret left behind; or a release at once: everything must be as before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.client import Lab
from tests import helpers
from tests.rows import Row
from tests.truth import budget
from tests.truth.killing import (
    ALL,
    AT_A_POINT,
    FORKS,
    HALF_A_REQUEST,
    HALF_AN_ANSWER,
    LATE,
    NO_ANSWER,
    WAY,
    Child,
    Points,
    Round,
    Wire,
    comparable,
    held_up,
    on,
    spread,
    unordered,
    walk,
)

# How many points: before the same command, before a release at once; and of a release.
MOST = budget([6, 2], [ALL] * 2)
MOST_OF_RELEASE = budget([6], [ALL])
KILLS = (HALF_A_REQUEST, NO_ANSWER, HALF_AN_ANSWER, LATE)
# The same of each kind of kill inside a request.
MOST_REQUESTS = budget([1, 1, 0, 2, 0, 1, 0, 0], [ALL] * 8)
MOST_REQUESTS_OF_RELEASE = budget([1, 1, 1, 1], [ALL] * 4)
GO_ON, RELEASE = "the same command", "a release"
ROWS = helpers.every_row()
REVERSIBLE = [row for row in ROWS if row.reversible]
Tell = Callable[[str, object], None]
pytestmark = pytest.mark.filterwarnings(FORKS)


def test_points_are_spread() -> None:
    assert spread(6) == [4, 2, 6, 1, 5, 3]


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Wire]:
    between = Wire(tmp_path)
    yield between
    between.close()


# --- what has to hold after a kill


class Undisturbed:
    """What a run leaves that nobody disturbs."""

    def __init__(self, one: Round) -> None:
        self.seen = one.ends_as_undisturbed()
        self.text = comparable(self.seen, one.incident)
        one.releases(self.seen)


def goes_on(one: Round, undisturbed: Undisturbed, number: int) -> None:
    """The same command, every other time on another machine."""
    try:
        with on(one.machine("first" if number % 2 else "second")):
            seen = one.ends_as_undisturbed()
        if not one.final:
            assert comparable(seen, one.incident) == undisturbed.text
    finally:
        released = one.release()
    assert not released.get("failed"), released["msg"]
    assert one.look() == (seen if one.final else one.before)


def is_put_back(one: Round) -> None:
    """A release, without running the command again. What cannot be undone stays as the kill left it."""
    left = one.look()
    released = one.release()
    assert not released.get("failed"), released["msg"]
    if not one.final:
        assert one.look() == one.before
        one.is_whole()
        return
    assert not released["changed"] and one.look() == left
    one.ends_as_undisturbed()


# --- at every entry, every change, every command of a host


@pytest.mark.parametrize("row", ROWS, ids=helpers.name_of)
def test_killed_then_run_again(lab: Lab, row: Row, record_property: Tell) -> None:
    first = Round(lab, row)
    points = Child(first.name, first.again, Points(), first.machine("first")).ends()
    undisturbed = Undisturbed(first)

    def attempt(moment: tuple[int, str]) -> bool:
        point, then = moment
        one = Round(lab, row)
        killed = Child(one.name, one.again, Points(point), one.machine("first")).ends() is None
        if then == RELEASE:
            is_put_back(one)
        else:
            goes_on(one, undisturbed, point)
        return killed

    walk(
        [[(point, then) for point in range(1, (points or 0) + 1)] for then in (GO_ON, RELEASE)],
        MOST,
        attempt,
        record_property,
    )


@pytest.mark.parametrize("row", REVERSIBLE, ids=helpers.name_of)
def test_release_killed_then_run_again(lab: Lab, row: Row, record_property: Tell) -> None:
    first = Round(lab, row)
    first.again()
    points = Child(first.name, first.release, Points(), first.machine("first")).ends()
    first.is_released()

    def attempt(point: int) -> bool:
        one = Round(lab, row)
        assert one.again()["changed"]
        killed = Child(one.name, one.release, Points(point), one.machine("first")).ends() is None
        one.is_released()
        return killed

    walk([list(range(1, (points or 0) + 1))], MOST_OF_RELEASE, attempt, record_property)


# --- inside every request


def undisturbed_moments(one: Round, wire: Wire, work: Callable[[], Any]) -> list[list[tuple[str, int]]]:
    """A run that nobody disturbs; each of its requests and answers, by what can happen to them."""
    wire.arm()
    strike(one, wire, work)
    return [[(what, number) for number in range(1, wire.seen(WAY[what]) + 1)] for what in KILLS]


def strike(one: Round, wire: Wire, work: Callable[[], Any]) -> bool:
    child = Child(one.name, work, Points(), one.machine("first"), wire.writing)
    wire.victim = child.pid
    return child.ends() is None


@pytest.mark.parametrize("row", ROWS, ids=helpers.name_of)
def test_killed_inside_a_request(lab: Lab, row: Row, wire: Wire, record_property: Tell) -> None:
    first = Round(lab, row, wire)
    moments = undisturbed_moments(first, wire, first.again)
    undisturbed = Undisturbed(first)

    def attempt(moment: tuple[tuple[str, int], str]) -> bool:
        (what, number), then = moment
        wire.arm()
        one = Round(lab, row, wire)
        wire.arm((what, number))
        killed = strike(one, wire, one.again)
        if killed and what == LATE:
            comes_late(one, wire)
        if then == RELEASE:
            is_put_back(one)
        else:
            goes_on(one, undisturbed, number)
        return killed

    kinds = [[(moment, then) for moment in kind] for then in (GO_ON, RELEASE) for kind in moments]
    walk(kinds, MOST_REQUESTS, attempt, record_property)


def comes_late(one: Round, wire: Wire) -> None:
    """Another machine has done everything when the dead run's request comes to its service: it changes nothing."""
    with on(one.machine("second")):
        done = one.again()
    assert not done.get("failed"), done["msg"]
    seen = one.look()
    wire.comes_late()
    assert unordered(one.look()) == unordered(seen)
    one.stays(one.look())


@pytest.mark.parametrize("row", REVERSIBLE, ids=helpers.name_of)
def test_release_killed_inside_a_request(lab: Lab, row: Row, wire: Wire, record_property: Tell) -> None:
    first = Round(lab, row, wire)
    first.again()
    moments = undisturbed_moments(first, wire, first.release)
    first.is_released()

    def attempt(moment: tuple[str, int]) -> bool:
        wire.arm()
        one = Round(lab, row, wire)
        assert one.again()["changed"]
        wire.arm(moment)
        killed = strike(one, wire, one.release)
        if killed and moment[0] == LATE:
            one.releases({})
            wire.comes_late()
        one.is_released()
        return killed

    walk(moments, MOST_REQUESTS_OF_RELEASE, attempt, record_property)


# --- a run that is alive


class Ahead:
    """A clock that only waiting moves."""

    def __init__(self) -> None:
        self.slept = 0.0

    def clock(self) -> float:
        return time.time() + self.slept

    def sleep(self, seconds: float) -> None:
        self.slept += seconds


@pytest.mark.parametrize("row", ROWS, ids=helpers.name_of)
def test_on_a_disk_nobody_takes_over_from_a_run_that_is_alive(lab: Lab, row: Row, wire: Wire) -> None:
    first = Round(lab, row, wire)
    points = Child(first.name, first.again, Points(), first.machine("first"), wire.writing).ends()
    first.releases(first.look())
    one = Round(lab, row, wire)
    orphan = held_up(one, wire, (AT_A_POINT, (points or 0) // 2))
    assert orphan is not None
    try:
        ahead = Ahead()
        one.more = {"clock": ahead.clock, "sleep": ahead.sleep}
        refused = one.again()
        assert refused.get("failed") and "another run" in refused["msg"] and not refused["changed"], refused
        assert 30 < ahead.slept < 200
    finally:
        one.more = {}
        orphan.goes_on()
        orphan.ends()
    one.releases(one.ends_as_undisturbed())
