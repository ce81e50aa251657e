# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The case store in trouble: gone before and in the middle, read-only, full, and back; and clocks that differ by an hour.

What can be undone is carried out and kept on this machine's disk, what cannot is refused before anything is touched. With the
store back, the same command brings everything into the case, in its order, once; nothing was done twice, and a release
still puts everything back.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import boto3
import botocore.endpoint
import pytest

from ansible_collections.firebreak.incident.plugins.module_utils import _aws, _case, _writer
from ansible_collections.firebreak.incident.plugins.module_utils._case import Case, open_case
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context, Control
from ansible_collections.firebreak.incident.plugins.module_utils._verify import verify
from ansible_collections.firebreak.incident.plugins.modules import incident
from lab.client import Lab
from tests import dumps, helpers, runs
from tests.contract.rotation_walk import LocalHost
from tests.helpers_search import Search
from tests.rows import Row
from tests.truth import FULL, budget
from tests.truth.playbooks import SCENARIOS, play
from tests.truth.stores import S3, Folder, Place

ROWS = helpers.every_row()
TRIED = budget(3, 16)  # for one row and one kind of store
BOUND = 30.0  # seconds: a troubled run's longest, on any machine
ANSWER_SECONDS = 0.3  # what a stalled server is given, so that the tests need not wait for the real time
KINDS = {"file": Folder, "s3": S3}


@pytest.fixture(scope="module")
def places(lab: Lab) -> dict[str, Place]:
    return {kind: make(lab, "faults") for kind, make in KINDS.items()}


class Clients:
    """One client of the SDK for each store: to make one costs more than all that is asked through it."""

    made: ClassVar[dict[str, Any]] = {}

    def client(self, *words: str, **options: Any) -> Any:
        where = options["endpoint_url"]
        if where not in self.made:
            self.made[where] = boto3.session.Session().client(*words, **options)
        return self.made[where]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A spool of our own, an SDK that waits shortly before it asks again, and runs whose process has ended."""
    monkeypatch.setenv("FIREBREAK_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setattr(_aws, "READ_SECONDS", ANSWER_SECONDS)
    monkeypatch.setattr(_aws, "_session", Clients())
    monkeypatch.setattr(botocore.endpoint, "time", SimpleNamespace(sleep=lambda _seconds: time.sleep(0.02)))
    monkeypatch.setattr(_writer, "me", lambda: {"machine": _writer.machine(), "pid": 0, "began": "ended"})


class Scene:
    """One incident of its own in a store that can be in trouble."""

    def __init__(self, lab: Lab, row: Row, place: Place, spool: Path) -> None:
        self.lab, self.row, self.place, self.spool = lab, row, place, spool
        place.heal()
        row.prepare(lab)
        self.incident = helpers.open_incident(lab, place.uri, row.host)
        around = helpers.surroundings(lab, place.uri, row.host, self.incident)
        self.params = {**row.params(lab), **around, "host": row.host}
        helpers.begin(lab, row, place.uri, self.incident)
        self.before = self.look()

    @property
    def control(self) -> Control:
        control: Control = helpers.module_of(self.row.control).CONTROL
        return control

    def look(self) -> dict[str, Any]:
        if self.control.evidence:
            self.place.mirror(self.incident)
        return self.row.observe(self.lab)

    def run(self, control: Control | None = None, glass: str = "", **more: Any) -> dict[str, Any]:
        began = time.monotonic()
        self.place.asked = 0
        params = {
            **self.params,
            "break_glass": [*self.params.get("break_glass", []), *(runs.glass(glass) if glass else [])],
        }
        with self.place.watched():
            result = helpers.execute(control or self.control, params, host=LocalHost(), **more)
        assert time.monotonic() - began < BOUND
        return result

    def case(self) -> Case:
        return open_case(self.params, Context(run_id="reader"))

    def kept(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_bytes()) for path in sorted(self.spool.rglob("*.json"))]

    def is_honest(self, result: dict[str, Any]) -> None:
        """What a run in trouble says is so."""
        seen = self.look()
        search = Search([*self.row.secrets(self.lab), *self.lab.secrets()])
        search.look("the result", json.dumps(result, default=str).encode())
        if self.spool.is_dir():
            search.look_below(self.spool)
        assert search.hits == []
        assert bool(self.kept()) == bool(result.get("spooled")), "the result says what is on this machine only"
        if not result.get("failed"):
            assert result["changed"] and result["outcome"] in ("verified", "applied")
            self.row.contained(self.lab, self.before, seen)
            return
        assert not self.row.reversible, result["msg"]
        assert "case_store" in result["msg"], result["msg"]
        if not result["changed"]:
            assert seen == self.before, "it says that nothing was done"

    def ends_as_undisturbed(self, held: list[dict[str, Any]]) -> dict[str, Any]:
        """The same command with the store back, and all that has to hold then."""
        result = self.run()
        assert not result.get("failed"), result["msg"]
        seen = self.look()
        self.row.contained(self.lab, self.before, seen)
        last = self.run()
        assert (last["changed"], last["outcome"]) == (False, "ok"), last
        assert self.look() == seen
        assert self.kept() == []
        self.is_once(held)
        assert verify(self.case())["valid"], verify(self.case())["first_bad"]
        return seen

    def is_once(self, held: list[dict[str, Any]]) -> None:
        name = self.case().stream(self.row.host, self.control.evidence).name
        entries = self.place.entries(self.incident)[name]
        assert [entry["seq"] for entry in entries] == list(range(1, len(entries) + 1))
        assert [item["state"] for item in entries[-1]["live"] if item["state"] == "open"] == []
        begun = Counter(
            json.dumps([entry["body"]["what"], entry["body"]["changes"]], sort_keys=True)
            for entry in entries
            if entry["kind"] == "intent"
        )
        failed = sum(entry["kind"] == "failed" for entry in entries)
        assert max(begun.values()) <= 1 + failed, "an intent stands there twice"
        outcomes = [entry["body"] for entry in entries if entry["kind"] in ("done", "failed")]
        ended = Counter(
            body["of"] for body in outcomes if not body.get("settled")
        )  # what failed may be seen done later
        assert max(ended.values()) == 1, "an outcome stands there twice"
        places = {entry["nonce"]: entry["seq"] for entry in entries}
        assert len(places) == len(entries)
        brought = [places[entry["kept"]["nonce"]] for entry in held]
        assert brought == sorted(brought) and len({*brought}) == len(held), "what was kept is there, in its order"

    def releases(self, seen: dict[str, Any]) -> None:
        released = helpers.release(self.lab, self.place.uri, self.row.control, self.params, self.incident)
        assert not released.get("failed"), released["msg"]
        assert self.look() == (self.before if self.row.reversible else seen)
        assert verify(self.case())["valid"]


def plan_of(row: Row, place: Place, points: int) -> tuple[list[tuple[str, int, bool]], int]:
    """Which troubles to try at which request: a store that is gone before the run, in S3 the lost answer to the last entry,
    whose second try is told that somebody was faster, and then a sample."""
    known = [
        (kind, point, lasts) for kind in place.troubles for point in range(1, points + 1) for lasts in (True, False)
    ]
    first = [one for one in known if one in (("gone", 1, True), ("lost answer", points, False))]
    shuffled = [one for one in known if one not in first]
    random.Random(None if FULL else f"{helpers.name_of(row)} {place.kind}").shuffle(shuffled)
    return [*first, *shuffled[: TRIED - len(first)]], len(known)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS, ids=helpers.name_of)
def test_a_store_in_trouble_and_back(
    lab: Lab,
    places: dict[str, Place],
    tmp_path: Path,
    row: Row,
    kind: str,
    record_property: Callable[[str, object], None],
) -> None:
    place = places[kind]
    undisturbed = Scene(lab, row, place, tmp_path / "spool")
    assert undisturbed.run()["changed"]
    points = place.asked
    undisturbed.releases(undisturbed.ends_as_undisturbed([]))
    plan, of = plan_of(row, place, points)
    for trouble, point, lasts in plan:
        scene = Scene(lab, row, place, tmp_path / "spool")
        try:
            place.trouble(trouble, point, lasts)
            result = scene.run()
            place.heal()
            scene.is_honest(result)
            begun = [entry for entry in scene.kept() if entry["kind"] == "intent"]
            assert row.reversible or not begun, "what cannot be undone was begun without its record"
            scene.releases(scene.ends_as_undisturbed(scene.kept()))
        except AssertionError as failure:
            when = f"from request {point} of {points} on" if lasts else f"at request {point} of {points}"
            raise AssertionError(f"{trouble} {when}: {failure}") from failure
        finally:
            place.heal()
    record_property("tried", len(plan))
    record_property("of", of)


FINAL = [row for row in ROWS if not row.reversible and not helpers.module_of(row.control).CONTROL.evidence]


@pytest.mark.parametrize("row", FINAL, ids=helpers.name_of)
def test_what_cannot_be_undone_goes_on_when_the_glass_is_broken(
    lab: Lab, places: dict[str, Place], tmp_path: Path, row: Row
) -> None:
    """And the case says so, once the store is back."""
    scene = Scene(lab, row, places["file"], tmp_path / "spool")
    scene.place.trouble("gone")
    result = scene.run(glass="store")
    scene.place.heal()
    scene.is_honest(result)
    assert not result.get("failed"), result["msg"]
    held = scene.kept()
    scene.ends_as_undisturbed(held)
    overridden = [entry["body"]["guard"] for entry in held if entry["kind"] == "override"]
    assert "store" in overridden


# --- clocks that differ by an hour

HOUR = 3600.0
BESIDE = [
    (row, kind) for number, row in enumerate(ROWS) for kind in KINDS if FULL or (number % 2 == 0) == (kind == "s3")
]
BESIDE_IDS = [f"{helpers.name_of(row)}-{kind}" for row, kind in BESIDE]


def hours() -> list[float]:
    """Ahead and behind; where midnight is near, as far as today goes: a break glass is of one day."""
    into = time.time() % 86400
    return [min(HOUR, max(0.0, 86390 - into)), -min(HOUR, max(0.0, into - 10))]


def shifted(by: float) -> Callable[[], float]:
    return lambda: time.time() + by


class Killed(BaseException):
    """What nobody catches, as little as a kill."""


CLAIM = 1.5  # seconds: what the run that dies claimed


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are other machines': nobody can see whether they have ended."""
    monkeypatch.setattr(_writer, "me", lambda: {"machine": "another", "pid": 1, "began": "1"})


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(("row", "kind"), BESIDE, ids=BESIDE_IDS)
def test_a_dead_run_of_a_machine_with_another_clock_is_taken_over_at_last_and_not_too_early(
    lab: Lab, places: dict[str, Place], tmp_path: Path, row: Row, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead, behind = hours()
    place = places[kind]
    clocks = [(ahead, behind, 0.0), (behind, ahead, behind)][: budget(1, 2)]
    for its, ours, stores in clocks:
        scene = Scene(lab, row, place, tmp_path / "spool")
        if isinstance(place, S3):
            place.ahead = stores
        claimed = dies(scene, shifted(its))
        wrote = first_entry(monkeypatch)
        taken = scene.run(clock=shifted(ours))
        assert not taken.get("failed"), taken
        assert wrote[0] - claimed < CLAIM + 10, "its claim ends, whatever our clock says"
        if kind == "s3":
            assert wrote[0] - claimed >= CLAIM, "it may have been at work until its claim ended"
        scene.releases(scene.ends_as_undisturbed([]))
        if isinstance(place, S3):
            place.ahead = 0.0


def dies(scene: Scene, clock: Callable[[], float]) -> float:
    """A run that is killed with its intent written and nothing done; when it began to count its claim."""

    def killed(*_args: Any) -> None:
        raise Killed

    if "deadline" in scene.control.spec["argument_spec"]:
        scene.params["deadline"] = 1
    began = time.monotonic()
    with pytest.raises(Killed):
        scene.run(dataclasses.replace(scene.control, apply=killed, deadline=CLAIM), clock=clock)
    return began


def first_entry(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When entries are written from now on."""
    wrote: list[float] = []
    real = _case.Stream.append

    def append(stream: Any, *rest: Any) -> Any:
        wrote.append(time.monotonic())
        return real(stream, *rest)

    monkeypatch.setattr(_case.Stream, "append", append)
    return wrote


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(("row", "kind"), BESIDE, ids=BESIDE_IDS)
def test_a_live_run_of_a_machine_with_another_clock_is_waited_for(
    lab: Lab, places: dict[str, Place], tmp_path: Path, row: Row, kind: str
) -> None:
    ahead, behind = hours()
    scene = Scene(lab, row, places[kind], tmp_path / "spool")
    at_work, waited_for = threading.Event(), threading.Event()

    def apply(*args: Any) -> None:
        at_work.set()
        waited_for.wait(BOUND)
        scene.control.apply(*args)

    def sleep(seconds: float) -> None:
        waited_for.set()
        time.sleep(min(seconds, 0.05))

    def runs_with(control: Control, clock: float, **more: Any) -> dict[str, Any]:
        return helpers.execute(control, scene.params, host=LocalHost(), clock=shifted(clock), **more)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(runs_with, dataclasses.replace(scene.control, apply=apply), behind)
        assert at_work.wait(BOUND)
        other = pool.submit(runs_with, scene.control, ahead, sleep=sleep)
        assert first.result(BOUND)["changed"], first.result()
        assert waited_for.is_set()
        assert (other.result(BOUND)["changed"], other.result()["outcome"]) == (False, "ok")
    scene.releases(scene.ends_as_undisturbed([]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_clock_that_is_wrong_moves_no_date_of_an_incident(lab: Lab, places: dict[str, Place], kind: str) -> None:
    """With a store that has a clock all dates are its own; else they are the opener's, and nobody's after it."""
    place, wrong = places[kind], hours()[0]
    place.heal()
    if isinstance(place, S3):
        place.ahead = HOUR / 2
    truly = time.time() + (HOUR / 2 if kind == "s3" else wrong)
    around = helpers.surroundings(lab, place.uri, "cf")
    options = {**around, "type": "data_breach", "affected": ["cf"], "new": True}
    opened = helpers.execute(incident.CONTROL, options, clock=shifted(wrong))
    expires = datetime.datetime.fromisoformat(opened["expires"]).timestamp()
    assert abs(expires - truly - 7 * 86400) < 60 and abs(float(opened["issued_before"]) - truly) < 60
    options |= {"incident_id": opened["incident_id"], "new": False}
    for clock in hours():
        again = helpers.execute(incident.CONTROL, options, clock=shifted(clock))
        assert not again.get("failed"), again["msg"]
        assert [again[name] for name in ("expires", "issued_before")] == [opened["expires"], opened["issued_before"]]
    if isinstance(place, S3):
        place.ahead = 0.0


# --- playbooks


@pytest.mark.parametrize("playbook", sorted(SCENARIOS))
def test_a_playbook_whose_store_is_gone_touches_nothing_and_says_so(
    lab: Lab, places: dict[str, Place], tmp_path: Path, playbook: str
) -> None:
    place = places["s3"]
    assert isinstance(place, S3)
    place.heal()
    incident_id = helpers.open_incident(lab, place.uri, "cf") if SCENARIOS[playbook].before else None
    before, held = dumps.everything(lab), place.read("")
    place.down()
    try:
        words = runs.extra(firebreak_case_store=place.uri)
        done = play(lab, playbook, incident_id, *words, FIREBREAK_SPOOL=str(tmp_path / "spool"))
    finally:
        place.heal()
    told = " ".join(str(line["result"].get("msg", "")) for line in done.results if line["event"] == "failed")
    assert done.code != 0 and "case_store" in told and "endpoint" in told, done.output
    assert "Traceback" not in done.output and "unexpected" not in told
    assert done.seconds < 2 * BOUND
    assert dumps.everything(lab) == before and place.read("") == held
    assert list((tmp_path / "spool").rglob("*.json")) == []
