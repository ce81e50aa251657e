# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How each playbook is run in the harness: what goes before it in the same incident, and the words of its command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from tests import dumps, helpers
from tests.runs import Run, extra, glass, run

# The words of a run, when the incident's id is known (None before there is one).
Words = Callable[[str | None], tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Scenario:
    words: Words
    before: tuple[str, ...] = ()  # the playbooks that were run in the same incident, each with its own words


def _nothing_more(incident: str | None) -> tuple[str, ...]:
    return extra(firebreak_incident_id=incident) if incident else ()


def _breach(incident: str | None) -> tuple[str, ...]:
    return _nothing_more(incident) + extra(firebreak_break_glass=glass("all_sessions"))


def _open(incident: str | None) -> tuple[str, ...]:
    return _nothing_more(incident) + extra(firebreak_type="data_breach")


SCENARIOS: dict[str, Scenario] = {
    "data_breach": Scenario(_breach),
    "open": Scenario(_open),
    "release": Scenario(_nothing_more, before=("data_breach",)),
    "verify_case": Scenario(_nothing_more, before=("open",)),
}


def play(lab: Any, playbook: str, incident: str | None = None, *words: str, **env: Any) -> Run:
    """Run a playbook with its words, and more."""
    return run(lab, playbook, *SCENARIOS[playbook].words(incident), *words, **env)


def run_before(lab: Any, playbook: str, *words: str) -> str | None:
    """Run what goes before a playbook, with these words more; the incident that it is in."""
    incident = None
    for one in SCENARIOS[playbook].before:
        done = play(lab, one, incident, *words)
        assert done.code == 0, done.output
        incident = done.incident
    return incident


# --- each of them told from the beginning to the end

STAGES = ("check", "real", "again", "check again", "release")


@dataclasses.dataclass
class Story:
    """One run of a playbook after the other, and what was there after each."""

    runs: dict[str, Run] = dataclasses.field(default_factory=dict)
    dumps: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    cases: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    written: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def keep(self, lab: Any, stage: str) -> None:
        self.dumps[stage] = dumps.everything(lab)
        self.cases[stage] = helpers.files_below(lab.dir / "cases")
        home = lab.dir.parent / "home"
        files = sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())
        self.written[stage] = [name for name in files if not name.startswith(".ansible/")]


def tell(lab: Any) -> dict[str, Story]:
    """The story of every playbook. Where one comes after another, its story is told within the other's: before the release."""
    told: dict[str, Story] = {}

    def one(playbook: str, before: tuple[str, ...], incident: str | None) -> None:
        story = told[playbook] = Story()
        story.keep(lab, "before")
        for stage in STAGES:
            dry = ("--check", "--diff") if "check" in stage else ()
            if stage == "release":
                for other, scenario in SCENARIOS.items():
                    if scenario.before == (*before, playbook):
                        one(other, scenario.before, incident)
            made = play(lab, "release" if stage == "release" else playbook, incident, *dry)
            story.runs[stage] = made
            story.keep(lab, stage)
            incident = incident or (made.incident if stage == "real" else None)

    for playbook, scenario in SCENARIOS.items():
        if not scenario.before:
            one(playbook, (), None)
    return told
