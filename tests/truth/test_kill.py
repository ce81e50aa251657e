# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""kill -9 around every entry of the journal and around every request inside a control's writes, then the same command again.

The state must be that of an undisturbed run, the case valid, and a release must still put everything back.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from ansible_collections.firebreak.incident.plugins.module_utils import _cloudflare, _postgresql, _redis, _store, _vault
from ansible_collections.firebreak.incident.plugins.module_utils._case import Case, open_case
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context, Control
from ansible_collections.firebreak.incident.plugins.module_utils._verify import verify
from lab.client import Lab
from tests import helpers
from tests.contract.rotation_walk import LocalHost
from tests.rows import Row
from tests.truth import budget

SECONDS = budget(8.0, 60.0)  # for one control
RELEASE_SECONDS = budget(5.0, 30.0)
FEWEST = 6
KILLED = 9
# The lowest place that a request to each service goes through.
REQUESTS: dict[Any, list[tuple[Any, str]]] = {
    _cloudflare: [(_cloudflare.Client, "_send")],
    _postgresql: [(_postgresql.Client, "rows"), (_postgresql.Client, "run")],
    _redis: [(_redis, "_ask"), (_redis._Work, "_send")],
    _vault: [(_vault.Client, "_send"), (LocalHost, "run")],
}
ENTRIES = [(_store.FileStore, "create"), (_store.FileStore, "put_file")]


ROWS = helpers.every_row()


class Points:
    """Counts the places where a run can be killed, and dies at one of them."""

    def __init__(self, victim: int) -> None:
        self.victim = victim
        self.seen = 0
        self.writing = False

    def here(self) -> None:
        self.seen += 1
        if self.seen == self.victim:
            os._exit(KILLED)

    def around(self, place: Any, name: str, always: bool) -> None:
        real = getattr(place, name)

        def wrapped(*args: Any, **more: Any) -> Any:
            counted = always or self.writing
            if counted:
                self.here()
            answer = real(*args, **more)
            if counted:
                self.here()
            return answer

        setattr(place, name, wrapped)

    def within(self, apply: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*args: Any) -> None:
            self.writing = True
            self.here()
            apply(*args)
            self.here()
            self.writing = False

        return wrapped


def run(control: str, work: Callable[[], Any], victim: int = 0) -> int | None:
    """Work in a child that dies at this point; how many points it came by, or None where it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            points = Points(victim)
            module = helpers.module_of(control)
            for place, name in ENTRIES:
                points.around(place, name, always=True)
            for place, name in REQUESTS[module.CONTROL.service]:
                points.around(place, name, always=False)
            module.CONTROL = dataclasses.replace(module.CONTROL, apply=points.within(module.CONTROL.apply))
            work()
            os.write(writing, str(points.seen).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        seen = answer.read()
    _pid, status = os.waitpid(child, 0)
    killed = os.waitstatus_to_exitcode(status) == KILLED
    assert killed != bool(seen)
    return None if killed else int(seen)


class Round:
    """One incident of its own, from the state before to the release."""

    def __init__(self, lab: Lab, row: Row) -> None:
        self.lab = lab
        self.name = row.control
        self.row = row
        self.row.prepare(lab)
        self.store = helpers.store_of(lab)
        self.incident = helpers.open_incident(lab, self.store, self.row.host)
        around = helpers.surroundings(lab, self.store, self.row.host, self.incident)
        self.params = {**self.row.params(lab), **around, "host": self.row.host}
        helpers.begin(lab, self.row, self.store, self.incident)
        self.before = self.look()

    def look(self) -> dict[str, Any]:
        return self.row.observe(self.lab)

    @property
    def control(self) -> Control:
        control: Control = helpers.module_of(self.name).CONTROL
        return control

    def again(self) -> dict[str, Any]:
        return helpers.execute(self.control, self.params, host=LocalHost())

    def release(self) -> dict[str, Any]:
        return helpers.release(self.lab, self.store, self.name, self.params, self.incident)

    def case(self) -> Case:
        return open_case(self.params, Context(run_id="reader"))

    def ends_as_undisturbed(self) -> dict[str, Any]:
        """The same command once more, and all that has to hold then."""
        result = self.again()
        assert not result.get("failed"), result["msg"]
        seen = self.look()
        self.row.contained(self.lab, self.before, seen)
        last = self.again()
        assert (last["changed"], last["outcome"]) == (False, "ok"), last
        assert self.look() == seen
        stream = self.case().stream(self.row.host, self.control.evidence)
        stream.load()
        assert stream.live and all(item["state"] != "open" for item in stream.live)
        assert verify(self.case())["valid"], verify(self.case())["first_bad"]
        return seen

    def releases(self, seen: dict[str, Any]) -> None:
        released = self.release()
        assert not released.get("failed"), released["msg"]
        assert self.look() == (self.before if self.row.reversible else seen)

    def is_released(self) -> None:
        """A release once more, and all that has to hold then."""
        self.releases({})
        last = self.release()
        assert not last.get("failed") and not last["changed"], last
        assert self.look() == self.before
        stream = self.case().stream(self.row.host)
        stream.load()
        assert stream.live == []
        assert verify(self.case())["valid"], verify(self.case())["first_bad"]


def spread(points: int) -> list[int]:
    """All points in an order whose every beginning is spread over the whole: as many as there is time for are tried."""
    width = points.bit_length()
    return sorted(range(1, points + 1), key=lambda point: f"{point:0{width}b}"[::-1])


def comparable(seen: Any, incident_id: str) -> str:
    """What is seen, without the ids and times that a server makes up."""
    text = json.dumps(helpers.same_incident(seen, incident_id), sort_keys=True)
    return re.sub(r"\b[0-9a-f]{32}\b|\d{4}-\d\d-\d\dT[0-9:.]+Z", "*", text)


def test_points_are_spread() -> None:
    assert spread(6) == [4, 2, 6, 1, 5, 3]


class Attempts:
    """As many points as there is time for; whatever fails says where, and leaves the servers as they were."""

    def __init__(self, points: int | None, seconds: float) -> None:
        assert points and points >= FEWEST  # an entry before and one after, and a change
        self.points = points
        self.give_up = time.monotonic() + seconds
        self.killed = 0

    def each(self, attempt: Callable[[int], int | None]) -> None:
        for number, point in enumerate(spread(self.points)):
            if number >= FEWEST and time.monotonic() > self.give_up:
                break
            try:
                # A run that waits less often than the first one may be over before this point.
                self.killed += attempt(point) is None
            except AssertionError as failure:
                raise AssertionError(f"killed at point {point} of {self.points}: {failure}") from failure
        assert self.killed >= FEWEST - 1

    def tell(self, record_property: Callable[[str, object], None]) -> None:
        record_property("tried", self.killed)
        record_property("of", self.points)


@pytest.mark.parametrize("row", ROWS, ids=helpers.name_of)
def test_killed_then_run_again(lab: Lab, row: Row, record_property: Callable[[str, object], None]) -> None:
    first = Round(lab, row)
    points = run(row.control, first.again)
    undisturbed = first.ends_as_undisturbed()
    first.releases(undisturbed)

    def attempt(point: int) -> int | None:
        one = Round(lab, row)
        try:
            came_by = run(row.control, one.again, point)
            seen = one.ends_as_undisturbed()
            if one.row.reversible:
                assert comparable(seen, one.incident) == comparable(undisturbed, first.incident)
        finally:
            released = one.release()
        assert not released.get("failed"), released["msg"]
        assert one.look() == (one.before if one.row.reversible else seen)
        return came_by

    attempts = Attempts(points, SECONDS)
    attempts.each(attempt)
    attempts.tell(record_property)


@pytest.mark.parametrize("row", [row for row in ROWS if row.reversible], ids=helpers.name_of)
def test_release_killed_then_run_again(lab: Lab, row: Row, record_property: Callable[[str, object], None]) -> None:
    first = Round(lab, row)
    first.again()
    points = run(row.control, first.release)
    first.is_released()

    def attempt(point: int) -> int | None:
        one = Round(lab, row)
        assert one.again()["changed"]
        came_by = run(row.control, one.release, point)
        one.is_released()
        return came_by

    attempts = Attempts(points, RELEASE_SECONDS)
    attempts.each(attempt)
    attempts.tell(record_property)
