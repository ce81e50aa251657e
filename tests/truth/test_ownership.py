# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Nobody else's work is touched: another client edits what is its own all the time, and between any two of our requests.

What it last wrote is the truth. Afterwards all of that stands as it wrote it, in its order; what is ours is in force, as in a
run that nobody disturbed; and a release takes away exactly ours.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.client import Lab
from tests import helpers
from tests.contract.rotation_walk import LocalHost
from tests.foreign import EnvFile, Foreign
from tests.rows import Row
from tests.truth import budget
from tests.truth.killing import Round, spread
from tests.truth.lowest import REQUESTS

ROWS = helpers.every_row()
SECONDS = budget(2.0, 16.0)  # for one control, held between its requests
ROUNDS = budget(2, 20)  # of one control, with edits all the time
ATTEMPTS = 8
# What a control says where somebody else was faster at the very thing that it was about to write.
OVERTAKEN = re.compile(
    r"in between|somebody else changed it at the same time|another session|run the same command again"
)


class Points:
    """Lets the other client edit before the requests that ``chosen`` takes; counts them all."""

    def __init__(self, other: Foreign | None, chosen: Callable[[int], bool]) -> None:
        self.other = other
        self.chosen = chosen
        self.seen = 0
        self._lock = threading.RLock()

    def here(self) -> None:
        with self._lock:
            self.seen += 1
            if self.other is not None and self.chosen(self.seen):
                self.other.edit()

    @contextlib.contextmanager
    def around(self, control: str) -> Iterator[Points]:
        with pytest.MonkeyPatch.context() as patch:
            for place, name in REQUESTS[helpers.module_of(control).CONTROL.service]:
                patch.setattr(place, name, self._within(getattr(place, name)))
            yield self

    def _within(self, real: Any) -> Any:
        def wrapped(*args: Any, **more: Any) -> Any:
            self.here()
            return real(*args, **more)

        return wrapped


def neutral(rest: Any, one: Round) -> Any:
    return json.loads(json.dumps(rest, sort_keys=True, default=str).replace(one.incident, "INC"))


def in_force(one: Round) -> int:
    """Run it until it holds; each time that it does not, it says that somebody else was faster. How often that was."""
    for attempt in range(ATTEMPTS):
        result = one.again()
        if not result.get("failed"):
            return attempt
        assert OVERTAKEN.search(result["msg"]), result["msg"]
    raise AssertionError(f"{ATTEMPTS} times in a row somebody else was faster")


def released(one: Round) -> None:
    for _attempt in range(ATTEMPTS):
        result = one.release()
        if not result.get("failed"):
            return
        assert OVERTAKEN.search(result["msg"]), result["msg"]
    raise AssertionError(f"{ATTEMPTS} times in a row somebody else was faster")


class Undisturbed:
    """A control in force and released with nobody else at work: how many requests that takes, and what is seen then."""

    def __init__(self, lab: Lab, row: Row) -> None:
        self.lab, self.row = lab, row
        one = Round(lab, row)
        self.other = row.foreign(lab)
        self.other.incident = one.incident
        try:
            self.before = neutral(self.other.rest(), one)
            with Points(None, bool).around(row.control) as points:
                assert in_force(one) == 0
                self.requests = points.seen
            self.after = neutral(self.other.rest(), one)
            with Points(None, bool).around(row.control) as points:
                released(one)
                self.requests_of_release = points.seen
            self.end = neutral(self.other.rest(), one)
            self.other.holds()
        finally:
            self.other.close()
        assert self.requests >= 3 and self.after != self.before
        assert self.end == (self.before if row.reversible else self.after)

    @contextlib.contextmanager
    def disturbed(self) -> Iterator[tuple[Round, Foreign]]:
        one = Round(self.lab, self.row)
        other = self.row.foreign(self.lab)
        other.incident = one.incident
        try:
            yield one, other
        finally:
            with contextlib.suppress(Exception):
                one.release()
            other.close()


@pytest.fixture
def undisturbed(lab: Lab, row: Row) -> Undisturbed:
    return Undisturbed(lab, row)


@pytest.mark.parametrize("row", ROWS, ids=helpers.name_of)
def test_edits_between_any_two_requests_stay(
    row: Row, undisturbed: Undisturbed, record_property: Callable[[str, object], None]
) -> None:
    points = [undisturbed.requests, undisturbed.requests_of_release]
    give_up = time.monotonic() + SECONDS
    tried = 0
    for point in [0, *spread(max(points))]:  # 0 stands for all of them
        with undisturbed.disturbed() as (one, other):
            where = f"held before request {point or 'each'} of {points}"

            def chosen(number: int, point: int = point) -> bool:
                return point in (0, number)

            with Points(other, chosen).around(row.control):
                result = one.again()
                assert not result.get("failed") or OVERTAKEN.search(result["msg"]), f"{where}: {result['msg']}"
            in_force(one)
            other.holds()
            assert neutral(other.rest(), one) == undisturbed.after, where
            with Points(other, chosen).around(row.control):
                result = one.release()
                assert not result.get("failed") or OVERTAKEN.search(result["msg"]), f"{where}: {result['msg']}"
            released(one)
            other.holds()
            assert neutral(other.rest(), one) == undisturbed.end, where
        tried += 2
        if time.monotonic() > give_up:
            break
    record_property("tried", tried)
    record_property("of", 2 * (1 + max(points)))


class AllTheTime:
    """Edits in a thread, until the context is left."""

    def __init__(self, other: Foreign) -> None:
        self.other = other
        self.failure: BaseException | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> AllTheTime:
        self._thread.start()
        return self

    def _work(self) -> None:
        try:
            while not self._over.wait(self.other.random.uniform(*self.other.pauses)):
                self.other.edit()
        except BaseException as failure:
            self.failure = failure

    def __exit__(self, *_more: object) -> None:
        self._over.set()
        self._thread.join(30)
        if self.failure is not None:
            raise self.failure


@pytest.mark.parametrize("row", ROWS, ids=helpers.name_of)
def test_edits_all_the_time_stay(
    lab: Lab, row: Row, undisturbed: Undisturbed, record_property: Callable[[str, object], None]
) -> None:
    for _round in range(ROUNDS):
        with undisturbed.disturbed() as (one, other):
            if other.steady:
                began = other.number
                with AllTheTime(other):
                    in_force(one)
                    lab.until(lambda other=other, began=began: other.number > began, "nobody else is at work")
            else:
                with Points(other, lambda number: number % 3 == 1).around(row.control):
                    one.again()
                in_force(one)
            other.holds()
            assert neutral(other.rest(), one) == undisturbed.after
            with AllTheTime(other) if other.steady else contextlib.nullcontext():
                released(one)
            other.holds()
            assert neutral(other.rest(), one) == undisturbed.end
    record_property("tried", 2 * ROUNDS)


@pytest.mark.parametrize("row", [row for row in ROWS if row.control == "secret_delivery"], ids=helpers.name_of)
def test_an_edit_while_the_new_file_is_made_stays(lab: Lab, row: Row, tmp_path: Path) -> None:
    """Inside our own command on the host: after the new file was written, before it takes the old one's place."""
    one, other = Round(lab, row), row.foreign(lab)
    assert isinstance(other, EnvFile)
    shim, done = tmp_path / "sync", tmp_path / "done"
    shim.write_text(
        f'#!/bin/sh\n[ -e {done} ] || {{ touch {done}; echo FOREIGN=1 >> {other.path}; }}\nexec {shutil.which("sync")} "$@"\n'
    )
    shim.chmod(0o755)
    host = LocalHost()
    host.path = f"{tmp_path}:{host.path}"
    try:
        result = helpers.execute(one.control, one.params, host=host)
        assert done.exists() and result.get("failed"), result
        assert "somebody else changed it at the same time" in result["msg"]
        assert b"FOREIGN=1\n" in other.found()
        assert in_force(one) == 0
        assert b"FOREIGN=1\n" in other.found() and other.rest()["as at the start"] == []
    finally:
        other.close()
