# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A release puts back what stood there: in whatever state, after whatever came in between, and leaves others' work as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from ansible_collections.firebreak.incident.plugins.module_utils._case import open_case
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context
from ansible_collections.firebreak.incident.plugins.module_utils._verify import verify
from ansible_collections.firebreak.incident.plugins.modules import control_release
from lab.client import Lab
from tests import dumps, helpers
from tests.contract.rotation_walk import LocalHost
from tests.rows import Row, State
from tests.truth import budget
from tests.truth.playbooks import SCENARIOS, Story
from tests.truth.table import PLAYBOOKS
from tests.truth.walk import Walk, for_examples, for_states, refused_alike, succeeded

ROWS = helpers.every_row()
REVERSIBLE = [row for row in ROWS if row.reversible]
EXAMPLES = budget(4, 60)
SEQUENCES = budget(4, 40)
Tell = Callable[[str, object], None]


@pytest.mark.parametrize("row", ROWS, ids=helpers.name_of)
def test_a_release_puts_the_state_back(lab: Lab, row: Row, walk_home: Path, record_property: Tell) -> None:
    """Or changes nothing, and says so, where nothing can be put back."""

    def attempt(state: State) -> None:
        if row.refusal(lab, state) is None:
            Walk(lab, row, state, walk_home).goes_back()

    record_property("tried", for_states(row, EXAMPLES, attempt))


# --- several controls, incidents and people on one lab


@dataclasses.dataclass(frozen=True)
class Move:
    """Something that happens: a control in an incident and round, an edit of others' things, or a release."""

    what: str
    row: Row
    state: State
    incident: int = 0
    round: int = 1

    def __repr__(self) -> str:
        """As much as is needed to do it again by hand."""
        return f"{self.what} {self.row.control} {self.state} in incident {self.incident}, round {self.round}"


def moves(row: Row) -> st.SearchStrategy[list[Move]]:
    """The row's control comes first, whatever follows."""

    def of(one: Row) -> st.SearchStrategy[Move]:
        asked = st.one_of(st.just(one.usual), one.states())
        known = st.sampled_from(["apply", "apply", "apply", "edit", "release the control", "release the host"])
        return st.builds(Move, known, st.just(one), asked, st.integers(0, 1), st.integers(1, 2))

    first = st.builds(Move, st.just("apply"), st.just(row), st.just(row.usual))
    more = st.lists(st.one_of(*(of(one) for one in [row, *REVERSIBLE])), min_size=1, max_size=6)
    return st.builds(lambda one, others: [one, *others], first, more)


class Together:
    """Two incidents on one lab, and another client at work beside them."""

    def __init__(self, lab: Lab, row: Row) -> None:
        self.lab = lab
        for one in [*REVERSIBLE, row]:
            one.prepare(lab)
        self.other = row.foreign(lab)
        self.store = helpers.store_of(lab)
        self.incidents = [helpers.open_incident(lab, self.store, host) for host in ("pg1", "cf")]
        self.before = dumps.everything(lab)
        self.rest = self.other.rest()
        self.edited = False

    def apply(self, move: Move) -> None:
        around = helpers.surroundings(self.lab, self.store, move.row.host, self.incidents[move.incident])
        options = {**move.row.asked(self.lab, move.state), **around, "host": move.row.host, "round": move.round}
        control = helpers.module_of(move.row.control).CONTROL
        checked = helpers.execute(control, options, host=LocalHost(), check_mode=True)
        result = helpers.execute(control, options, host=LocalHost())
        if result.get("failed"):  # of a generated state, or of the other incident's
            assert refused_alike(checked, result), (checked, result)
            assert not result["changed"], result
        else:
            assert not checked.get("failed") and checked["changes"] == result["changes"], (checked, result)

    def edit(self) -> None:
        self.edited = True
        self.other.edit()

    def release(self, host: str, incident: int, **more: Any) -> dict[str, Any]:
        known = self.lab.hostvars(host)
        options = {**helpers.surroundings(self.lab, self.store, host, self.incidents[incident]), "host": host, **more}
        names = control_release.SPEC["argument_spec"]
        options |= {name: known[f"firebreak_{name}"] for name in names if f"firebreak_{name}" in known}
        planned = helpers.execute(control_release.CONTROL, options, host=LocalHost(), check_mode=True)
        result = helpers.execute(control_release.CONTROL, options, host=LocalHost())
        same = ("changed", "changes", "conflicts", "failures", "diff")
        assert {name: planned.get(name) for name in same} == {name: result.get(name) for name in same}, (
            planned,
            result,
        )
        return result

    def make(self, move: Move) -> None:
        if move.what == "apply":
            self.apply(move)
        elif move.what == "edit":
            self.edit()
        elif move.what == "release the control":
            self.release(move.row.host, move.incident, controls=[move.row.control])
        else:
            self.release(move.row.host, move.incident)
        if self.edited:
            self.other.holds()

    def end(self) -> None:
        """Everything is released, in two passes: what one incident made may hold things of the other."""
        hosts = sorted({row.host for row in REVERSIBLE})
        for _pass in range(2):
            results = [self.release(host, number) for number in (1, 0) for host in hosts]
        for result in results:
            succeeded(result)
        for host in hosts:
            assert [self.release(host, number)["changed"] for number in (0, 1)] == [False, False]
        if self.edited:
            self.other.holds()
            assert self.other.rest() == self.rest
        else:
            assert dumps.everything(self.lab) == self.before
        for incident in self.incidents:
            around = helpers.surroundings(self.lab, self.store, "pg1", incident)
            proof = verify(open_case(around, Context(run_id="reader")))
            assert proof["valid"], proof["first_bad"]


@pytest.mark.parametrize("row", REVERSIBLE, ids=helpers.name_of)
def test_whatever_happened_is_put_back(lab: Lab, row: Row, record_property: Tell) -> None:
    """Random sequences of this control and others, in two rounds of two incidents, while somebody edits things of their own."""

    def attempt(made: list[Move]) -> None:
        together = Together(lab, row)
        try:
            for move in made:
                together.make(move)
            together.end()
        finally:
            together.other.close()

    record_property("tried", for_examples(moves(row), SEQUENCES, attempt))


# --- what is ours, changed by somebody else, or by half


SPOILS = [(row, name) for row in REVERSIBLE for name in row.spoils(None)]


@pytest.mark.parametrize(("row", "name"), SPOILS, ids=[f"{helpers.name_of(row)} {name}" for row, name in SPOILS])
def test_somebody_elses_change_is_reported_and_kept(lab: Lab, row: Row, name: str, walk_home: Path) -> None:
    """And everything else is released all the same; who forces it gets back what stood there."""
    beside = next(one for one in REVERSIBLE if one.host == row.host and one is not row)
    beside.prepare(lab)
    walk = Walk(lab, row, row.usual, walk_home)
    before = walk.touched()
    succeeded(walk.run())
    options = {
        **beside.params(lab),
        **helpers.surroundings(lab, walk.store, beside.host, walk.incident),
        "host": row.host,
    }
    assert succeeded(helpers.execute(helpers.module_of(beside.control).CONTROL, options, host=LocalHost()))["changed"]
    spoil = row.spoils(lab)[name]
    spoil.make()
    assert spoil.stands()
    parts = {*row.touches, *beside.touches}
    together = dumps.everything(lab, *parts)

    planned = walk.checked(walk.release)
    released = walk.release()
    for result in (planned, released):
        told = [line["control"] for line in [*result["conflicts"], *result["failures"]]]
        assert set(told) == ({row.control} if spoil.conflict else set()), result
        assert bool(result.get("failed")) == spoil.conflict
        assert beside.control in {change["control"] for change in result["changes"]}
    assert dumps.everything(lab, *parts) != together
    if spoil.conflict:
        assert spoil.stands()
        forced = walk.release(force=True)
        assert bool(forced.get("failed")) == spoil.theirs and spoil.stands() == spoil.theirs, forced
    assert (walk.touched() == before) != spoil.theirs
    assert not walk.release()["changed"]


HALF = [row for row in REVERSIBLE if row.half(None) is not None]


@pytest.mark.parametrize("row", HALF, ids=helpers.name_of)
def test_a_half_applied_bulk_is_released(lab: Lab, row: Row, walk_home: Path) -> None:
    walk = Walk(lab, row, row.usual, walk_home)
    before, half = walk.touched(), row.half(lab)
    assert half
    with half:
        failed = walk.run()
    assert failed["failed"] and "unconfirmed" in {one["outcome"] for one in failed["outcomes"]}, failed
    between = walk.touched()
    assert between != before
    planned = succeeded(walk.checked(walk.release))
    released = succeeded(walk.release())
    assert {**planned, "screen": 0} == {**released, "screen": 0}
    assert walk.touched() == before
    # The rest of what was asked goes on from there.
    again = Walk(lab, row, row.usual, walk_home)
    before = again.touched()
    half = row.half(lab)
    assert half
    with half:
        assert again.run()["failed"]
    assert succeeded(again.run())["changed"]
    assert succeeded(again.release())["changed"] and again.touched() == before


# --- whole playbooks


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_a_release_after_the_playbook_puts_everything_back(playbook: str, stories: dict[str, Story]) -> None:
    """But for what tests/irreversible.yml lists."""
    told = stories[playbook]
    assert told.runs["release"].code == 0, told.runs["release"].output
    # What comes after a breach is undone with it.
    first = "data_breach" if "data_breach" in SCENARIOS[playbook].before else playbook
    start = stories[first].dumps["before"]
    before = dumps.but_for_what_is_final(start, start)
    after = dumps.but_for_what_is_final(told.dumps["release"], start, everybody=True)
    for part in before:
        assert after[part] == before[part], part


def test_a_breach_changes_what_is_put_back(stories: dict[str, Story]) -> None:
    told = stories["data_breach"].dumps
    assert all(told["real"][part] != told["before"][part] for part in ("postgresql", "edge"))


def test_what_a_playbook_cannot_undo_is_what_is_listed(stories: dict[str, Story]) -> None:
    reported = stories["data_breach"].runs["real"].of("incident_info")[-1]["irreversible"]
    assert helpers.unlisted(reported) == []
    assert helpers.unreported(reported) == []
