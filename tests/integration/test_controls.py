# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every control against the lab's real servers, through both front ends, watched by clients that are not ours.

A dry run touches nothing and says what the real run will say; a second run changes nothing; a release puts everything back.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args

from lab.client import Lab
from tests import helpers
from tests.helpers_play import Play, task
from tests.rows import Row

CONTROLS = helpers.controls()
ROWS = helpers.every_row()
BOTH_FRONT_ENDS = [row for row in ROWS if not helpers.module_of(row.control).CONTROL.needs_host]
ONLY_ACTION = [row for row in ROWS if row not in BOTH_FRONT_ENDS]
# What both runs say, each in the same words.
SAID = ("changed", "changes", "diff", "state_before", "state_after", "incident_id", "mark")
INCIDENT = "{{ opened.incident_id }}"
MODULE = {"async": 30, "poll": 1, "connection": "local"}


class Trial:
    """One row and the play that carries it out."""

    def __init__(self, lab: Lab, row: Row, home: Path) -> None:
        self.lab = lab
        self.home = home
        self.control = row.control
        self.row = row
        self.row.prepare(lab)
        self.store = helpers.store_of(lab)
        self.params = {**self.row.params(lab), **helpers.surroundings(lab, self.store, self.row.host, INCIDENT)}
        self.undo = {
            **helpers.connection_options(self.control, self.params),
            **helpers.surroundings(lab, self.store, self.row.host, INCIDENT),
        }

    def play(self, *tasks: dict[str, Any]) -> Play:
        opening = helpers.surroundings(self.lab, self.store, self.row.host)
        opening |= {"type": "data_breach", "affected": [self.row.host], "new": True}
        return Play(self.lab, self.home, self.row.host, [task("open", "incident", opening, register="opened"), *tasks])

    def opened(self, play: Play) -> str:
        """The incident's id, when all that goes before the row is done in it."""
        incident_id = str(succeeded(play.next("open"))["incident_id"])
        helpers.begin(self.lab, self.row, self.store, incident_id)
        return incident_id

    def task(self, name: str, **keywords: Any) -> dict[str, Any]:
        return task(name, self.control, self.params, **keywords)

    def release(self, name: str, **keywords: Any) -> dict[str, Any]:
        return task(name, "control_release", self.undo, **keywords)

    def case(self) -> dict[str, bytes]:
        return helpers.files_below(Path(self.store.removeprefix("file://")))

    def look(self) -> dict[str, Any]:
        return self.row.observe(self.lab)

    def directly(self, incident_id: str) -> dict[str, Any]:
        """The module's ``main`` in check mode, which Ansible does not do for a task with ``async``."""
        params = {**self.params, "incident_id": incident_id, "host": self.row.host, "_ansible_check_mode": True}
        shown = io.StringIO()
        module = helpers.module_of(self.control)
        with patch_module_args(params), contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
            module.main()
        result: dict[str, Any] = json.loads(shown.getvalue())
        return result


def documented(trial: Trial, result: dict[str, Any]) -> dict[str, Any]:
    """The documented keys of a result, all of which must be there."""
    keys = helpers.documented(trial.control)
    missing = [name for name, key in keys.items() if key["returned"] == "always" and name not in result]
    assert missing == []
    return {name: result[name] for name in keys if name in result}


def said(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in SAID}


def succeeded(result: dict[str, Any]) -> dict[str, Any]:
    assert result["status"] == "ok", result.get("msg", result)
    return result


@pytest.mark.parametrize("row", ROWS, ids=helpers.name_of)
def test_check_real_again_release(lab: Lab, row: Row, tmp_path: Path) -> None:
    trial = Trial(lab, row, tmp_path)
    steps = (
        trial.task("check", check_mode=True, diff=True),
        trial.task("real", diff=True),
        trial.task("again", diff=True),
        trial.task("check again", check_mode=True),
        trial.release("check the release", check_mode=True, diff=True),
        trial.release("release", diff=True),
        trial.release("release again"),
    )
    with trial.play(*steps) as play:
        trial.opened(play)
        before, entries = trial.look(), trial.case()
        checked = succeeded(play.next("check"))
        assert trial.look() == before and trial.case() == entries
        assert (checked["outcome"], checked["changed"]) == ("planned", True)

        real = succeeded(play.next("real"))
        seen = trial.look()
        trial.row.contained(lab, before, seen)
        assert said(real) == said(checked)
        assert real["outcome"] in ("verified", "applied")
        assert documented(trial, real).keys() == documented(trial, checked).keys()
        assert trial.case().keys() > entries.keys()
        entries = trial.case()

        again = succeeded(play.next("again"))
        assert (again["outcome"], again["changed"], again["changes"]) == ("ok", False, [])
        assert again["state_before"] == again["state_after"] == real["state_after"]
        settled = {"applied": 1, "verified": 0}[real["outcome"]]
        assert trial.look() == seen and len(trial.case()) - len(entries) == settled
        entries = trial.case()
        assert said(succeeded(play.next("check again"))) == said(again)

        planned = succeeded(play.next("check the release"))
        assert trial.look() == seen and trial.case() == entries
        released = succeeded(play.next("release"))
        assert {key: released[key] for key in planned if key != "invocation"} == {
            key: planned[key] for key in planned if key != "invocation"
        }
        back = trial.look()
        assert released["changed"] == trial.row.reversible
        final = [{"control": row.control, **change} for change in real["changes"] if not change["reversible"]]
        assert helpers.unlisted(final) == [] and bool(final) != trial.row.reversible
        if not helpers.module_of(row.control).CONTROL.evidence:  # what lies in the case changed no system
            assert helpers.unlisted(released["irreversible"]) == []
            assert {change["target"] for change in final} <= {one["target"] for one in released["irreversible"]}
        assert back == (before if trial.row.reversible else seen)
        last = succeeded(play.next("release again"))
        assert not last["changed"] and trial.look() == back


@pytest.mark.parametrize("row", BOTH_FRONT_ENDS, ids=helpers.name_of)
def test_the_module_says_and_does_what_the_action_does(lab: Lab, row: Row, tmp_path: Path) -> None:
    trial = Trial(lab, row, tmp_path)
    steps = (
        trial.task("check", check_mode=True),
        trial.task("module", **MODULE),
        trial.task("module again", **MODULE),
        trial.task("action again"),
        trial.release("release with the module", **MODULE),
        trial.release("release"),
    )
    with trial.play(*steps) as play:
        incident_id = trial.opened(play)
        before, entries = trial.look(), trial.case()
        checked = succeeded(play.next("check"))
        directly = trial.directly(incident_id)
        assert documented(trial, directly) == documented(trial, checked)
        assert directly["changed"] is True and checked["changed"] is True
        assert trial.look() == before and trial.case() == entries

        real = succeeded(play.next("module"))
        seen = trial.look()
        trial.row.contained(lab, before, seen)
        assert said(real) == said(checked)
        assert documented(trial, real).keys() == documented(trial, checked).keys()

        again = succeeded(play.next("module again"))
        assert (again["outcome"], again["changed"]) == ("ok", False)
        action = succeeded(play.next("action again"))
        # The first of them may have settled what the edge took.
        assert documented(trial, action) == documented(trial, again)
        assert trial.look() == seen

        # It carries out whatever was done to the host, over the host's connection too.
        refused = play.next("release with the module")
        assert refused["status"] == "failed" and "runs in its action only, not with async" in refused["msg"]
        assert trial.look() == seen
        released = succeeded(play.next("release"))
        assert released["changed"] == trial.row.reversible
        assert trial.look() == (before if trial.row.reversible else seen)


@pytest.mark.parametrize("row", ONLY_ACTION, ids=helpers.name_of)
def test_what_needs_its_host_refuses_async(lab: Lab, row: Row, tmp_path: Path) -> None:
    trial = Trial(lab, row, tmp_path)
    with trial.play(trial.task("module", **MODULE)) as play:
        trial.opened(play)
        before, entries = trial.look(), trial.case()
        refused = play.next("module")
        assert refused["status"] == "failed"
        assert "runs in its action only, not with async" in refused["msg"]
        assert trial.look() == before and trial.case() == entries


def test_the_list_of_what_is_irreversible_names_our_controls_only() -> None:
    irreversible = {name for name in CONTROLS if not helpers.row_of(name).reversible}
    assert set(helpers.irreversible()) == irreversible


def test_a_held_play_ends_when_its_test_fails(lab: Lab, tmp_path: Path) -> None:
    play = Trial(lab, helpers.row_of("cloudflare_waf_rule"), tmp_path).play()
    with pytest.raises(AssertionError, match="open"), play:
        play.next("another task than the next")
    assert play.process.returncode is not None
