# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How each playbook is run in the harness: what goes before it in the same incident, and the words of its command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

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


def run_before(lab: Any, playbook: str) -> str | None:
    """Run what goes before a playbook; the incident that it is in."""
    incident = None
    for one in SCENARIOS[playbook].before:
        done = play(lab, one, incident)
        assert done.code == 0, done.output
        incident = done.incident
    return incident
