# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A control that leaks on purpose is caught at every place that is searched, and what the engine can keep back it does."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest

from lab.client import Lab
from tests import helpers
from tests.helpers_play import Play, task
from tests.helpers_search import CommandLines
from tests.truth.silence import INCIDENT, Variables, found, surroundings
from tests.truth.test_silence import MODULE, Tell, finished

HOST = "pg1"
# The ways in which the control of tests/leaky gives its password away, and where each is found.
PLACES = {
    "print": {"console:"},
    "display": {"console:", "/ansible.log:"},
    "warning": {"console:", "/ansible.log:"},
    "deprecation": {"console:"},
    "exception": {"console:", "results:"},
    "log": {"/ansible.log:"},
    "result": {"console:", "results:", "/witness.jsonl:", "/junit/"},
    "diff": {"console:", "results:"},
    "fact": {"/facts/", "/witness.jsonl:"},
    "options for callbacks": {"/witness.jsonl:"},
    "environment for callbacks": {"/witness.jsonl:"},
    "failure": {"console:", "results:", "/journal/"},
    "journal": {"/journal/"},
    "blob": {"/blobs/"},
    "evidence": {"/evidence/"},
    "spool": {"/spool/"},
    "temporary file": {"/tmp/tmp"},
    "command line": {"command line:"},
    "environment of a process": {"environment:"},
    "text on the host": {"/on-the-host:"},
}
IN_BACKGROUND = {"result": {"/async/j"}, "journal": {"/journal/"}, "temporary file": {"/tmp/tmp"}}
# What the engine keeps back by itself, whatever the control does.
KEPT_BACK = ("crash", "exit")


@pytest.fixture(scope="module")
def leaks(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """By way, where its password was found: one play leaks in all of them."""
    folder = tmp_path_factory.mktemp("leaky")
    home, store = folder / "home", f"file://{folder}/cases"
    ways = {way: (way, {}) for way in [*PLACES, *KEPT_BACK]}
    ways |= {f"{way} in the background": (way, MODULE) for way in IN_BACKGROUND}
    passwords = {name: f"{name.replace(' ', '-')}-{secrets.token_hex(8)}" for name in ways}
    given = Variables(folder / "given")
    around = helpers.surroundings(lab, store, HOST)
    lost = folder / "lost"
    lost.write_text("where a folder should be")

    def leaky(name: str, way: str, **keywords: Any) -> dict[str, Any]:
        own = {"way": way, "password": given.variable(passwords[name]), "place": str(home / name.replace(" ", "-"))}
        Path(own["place"]).mkdir(parents=True)
        options = {**around, "incident_id": INCIDENT, **own}
        options |= {"case_store": f"file://{lost}/cases"} if way == "spool" else {}
        return {"name": name, "leaky": options, "ignore_errors": True, "diff": True, **keywords}

    opening = task("open", "incident", {**around, "type": "data_breach", "affected": [HOST]}, register="opened")
    tasks = [opening, *(leaky(name, way, **keywords) for name, (way, keywords) in ways.items())]
    results: dict[str, Any] = {}
    with CommandLines() as lines:
        given_words = given.words()
        with Play(lab, home, HOST, tasks, "-vvvv", *given_words, **surroundings(home)) as play:
            for one in tasks:
                results[one["name"]] = play.next(one["name"])
        for name in results:
            if name.endswith("background"):
                finished(lab, home, results[name])
    search = found(set(passwords.values()), play.console, results, lines, store)
    names = {password: name for name, password in passwords.items()}
    places: dict[str, set[str]] = {name: set() for name in ways}
    for hit in search.hits:
        places[names[search.found(hit)]].add(hit.partition(" secret ")[0])
    places["failed"] = {name for name, result in results.items() if result["status"] != "ok"}
    return places


def test_the_leaky_control_works(leaks: dict[str, set[str]]) -> None:
    assert leaks["failed"] == {"failure", "exception", *KEPT_BACK}


@pytest.mark.parametrize("way", PLACES)
def test_a_leak_is_caught(leaks: dict[str, set[str]], way: str, record_property: Tell) -> None:
    assert {place for place in PLACES[way] if not any(place in seen for seen in leaks[way])} == set(), leaks[way]
    record_property("tried", len(PLACES[way]))


@pytest.mark.parametrize("way", IN_BACKGROUND)
def test_a_leak_in_the_background_is_caught(leaks: dict[str, set[str]], way: str) -> None:
    seen = leaks[f"{way} in the background"]
    assert all(any(place in one for one in seen) for place in IN_BACKGROUND[way]), seen


@pytest.mark.parametrize("way", KEPT_BACK)
def test_what_the_engine_keeps_back_is_nowhere(leaks: dict[str, set[str]], way: str) -> None:
    assert leaks[way] == set()
