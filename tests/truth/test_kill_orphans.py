# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A run that was held up (its process stopped, its answer late) while another machine took over and finished, and goes on then.

The case is in S3, where nothing but time tells that it is over: it must change neither the service nor the case any more.
(With the case on a disk it holds the lock: ``test_kill`` shows that nobody takes over before it has ended.)

Bound: what was sent before the deadline and is still on its way nobody can call back; ``test_kill`` shows that it changes
nothing while the incident stands (``LATE``). Between a client's look at the deadline and its request there are microseconds.
A run that was held up before its first entry has begun nothing, and begins when it goes on, as a command given then would.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lab.client import Lab
from tests import helpers
from tests.rows import Row
from tests.truth import budget
from tests.truth.far_store import FarStore
from tests.truth.killing import (
    ALL,
    AT_A_POINT,
    FORKS,
    STOPPED,
    WAY,
    Child,
    Points,
    Round,
    Wire,
    held_up,
    on,
    unordered,
    walk,
)

# Stopped at a point and before an answer, each with a takeover, and with a release after it.
MOST = budget([1, 0, 0, 4], [ALL] * 4)
ROWS = helpers.every_row()
TAKE_OVER, RELEASE = "another machine takes over", "another machine takes over, and releases"
pytestmark = pytest.mark.filterwarnings(FORKS)


@pytest.mark.parametrize("row", ROWS, ids=helpers.name_of)
def test_a_run_that_was_held_up_changes_nothing_more(
    lab: Lab, row: Row, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    wire = Wire(tmp_path)
    with FarStore(lab, "orphans") as store:
        first = Round(lab, row, wire, store.options)
        points = Child(first.name, first.again, Points(), first.machine("first"), wire.writing).ends()
        answers = wire.seen(WAY[STOPPED])
        first.releases(first.look())

        def attempt(one_of: tuple[tuple[str, int], str]) -> bool:
            moment, then = one_of
            one = Round(lab, row, wire, store.options)
            one.more = {"clock": store.clock}
            orphan = held_up(one, wire, moment)
            if orphan is None:
                return False
            store.passes()
            try:
                with on(one.machine("second")):
                    begun = any("/_run/" not in entry for entry in one.entries())
                    done = one.again()
                    assert not done.get("failed"), done["msg"]
                    seen = one.look()
                    if then == RELEASE and begun:
                        one.releases(seen)
                        seen = one.look()
                entries = one.entries()
            finally:
                orphan.goes_on()
                wire.let_go()
                orphan.ends()
            assert unordered(one.look()) == unordered(seen), "the service was changed"
            assert one.entries() == entries, "the case was changed"
            one.is_whole()
            if then == TAKE_OVER or not begun:
                one.stays(one.look())
                one.releases(seen)
            return True

        stops = {AT_A_POINT: points or 0, STOPPED: answers}
        kinds = [
            [((what, number), then) for number in range(1, count + 1)]
            for what, count in stops.items()
            for then in (TAKE_OVER, RELEASE)
        ]
        walk(kinds, MOST, attempt, record_property)
    wire.close()
