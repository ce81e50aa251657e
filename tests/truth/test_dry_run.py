# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A dry run says what the real run does, and writes nothing anywhere: in whatever state the servers are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.client import Lab
from tests import dumps, helpers
from tests.rows import Row, State
from tests.runs import NOTHING, Run, neutral
from tests.truth import budget
from tests.truth.playbooks import Story
from tests.truth.table import PLAYBOOKS
from tests.truth.walk import Walk, for_states

EXAMPLES = budget(6, 60)


@pytest.mark.parametrize("row", helpers.every_row(), ids=helpers.name_of)
def test_a_dry_run_tells_what_the_real_run_does(
    lab: Lab, row: Row, walk_home: Path, record_property: Callable[[str, object], None]
) -> None:
    def attempt(state: State) -> None:
        walk = Walk(lab, row, state, walk_home)
        refusal = row.refusal(lab, state)
        if refusal is None:
            walk.tells_the_truth()
        else:
            walk.is_refused(refusal)

    record_property("tried", for_states(row, EXAMPLES, attempt))


# --- whole playbooks


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_each_stage_ends_well(playbook: str, stories: dict[str, Story]) -> None:
    assert {stage: run.output for stage, run in stories[playbook].runs.items() if run.code} == {}


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_a_dry_run_writes_nothing_anywhere(playbook: str, stories: dict[str, Story]) -> None:
    told = stories[playbook]
    for dry, before in (("check", "before"), ("check again", "again")):
        assert told.dumps[dry] == told.dumps[before]
        assert told.cases[dry] == told.cases[before]
    assert all(files == [] for files in told.written.values())


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_a_dry_run_tells_what_the_playbook_does(playbook: str, stories: dict[str, Story]) -> None:
    told = stories[playbook].runs
    expected = told["check"].changes(planned=True)
    assert told["real"].changes(planned=False) == expected
    assert told["check again"].changes(planned=True) == told["again"].changes(planned=False) == {}
    assert released(told["check"]) == released(told["real"])
    assert released(told["check again"]) == released(told["again"]) == []
    if playbook == "data_breach":
        assert told["check"].incident == NOTHING
        assert {host for host, _control in expected} == {"cf", "pg1", "cache1", "vault", "app"}
        assert told["real"].changes(planned=True) == expected  # what phase identify predicts
        assert "verifies nothing" in told["check"].output
    if playbook == "release":
        assert released(told["check"]) != []


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_a_second_run_changes_nothing(playbook: str, stories: dict[str, Story]) -> None:
    told = stories[playbook]
    assert told.runs["again"].incident == told.runs["real"].incident
    assert [
        line for line in told.runs["again"].results if line["result"].get("changed") and "changes" in line["result"]
    ] == []
    assert intents(told.cases["again"]) == intents(told.cases["real"])
    assert dumps.unprobed(told.dumps["again"]) == dumps.unprobed(told.dumps["real"])


def released(done: Run) -> list[Any]:
    return sorted(
        (result["invocation"]["module_args"]["host"], change["control"], change["action"], change["target"])
        for result in done.of("control_release")
        for change in result["changes"]
    )


def intents(case: dict[str, bytes]) -> list[str]:
    return [path for path, data in case.items() if "/journal/" in path and json.loads(data)["kind"] == "intent"]


def test_the_run_reports_what_it_did(stories: dict[str, Story]) -> None:
    told = stories["data_breach"].runs
    seen = told["real"].of("incident_info")[-1]
    done = sorted({(one["action"], neutral(one["target"])) for one in seen["done"]})
    assert done == sorted({change for changes in told["check"].changes(planned=True).values() for change in changes})
    assert seen["open"] == [] and seen["spooled"] == []
    phases = ["identify", "fence", "preserve", "contain", "verify", "communicate"]
    assert [phase["name"] for phase in seen["phases"]] == phases
