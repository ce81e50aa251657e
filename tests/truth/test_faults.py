# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whatever goes wrong with a service: a run ends converged, or in an honest failure, in bounded time and with no effect twice.

An honest failure names what was done, what is unconfirmed and what was not done, and a remedy; what it says of each is held
against what the servers show, and the journal says the same. When the fault is gone the same command converges, and a release
from there restores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from ansible_collections.firebreak.incident.plugins.module_utils._control import Control
from ansible_collections.firebreak.incident.plugins.module_utils._verify import verify
from ansible_collections.firebreak.incident.plugins.modules import health_gate
from lab.client import Lab
from lab.faults import proxied
from tests import dumps, helpers
from tests.rows import Row
from tests.runs import Run, extra, lab_in
from tests.truth import FULL, budget
from tests.truth.injector import Fault, HttpInjector, Request
from tests.truth.killing import Round, comparable
from tests.truth.playbooks import play, run_before
from tests.truth.services import CONSUMER, ELSEWHERE, FOR_LONG, HOST, Party, Service, services_of

ROWS = helpers.every_row()
POINTS = budget(1, 3)  # requests that each fault meets, one in a run
SETTLE = 0.5
# Where a control has an option for it, which can only lengthen the time.
DEADLINE = 2
# Reading and changing have their time each, looking again has what is left of it and the time to settle; a last request, also
# of the look-up after an unclear one, begins before that is over. The rest is for a busy machine.
LAST_REQUESTS, BUSY_MACHINE = 2.0, 3.0
MADE = ("applied", "proved", "unproven")


@dataclasses.dataclass(frozen=True)
class State:
    differs: frozenset[str]
    text: str

    def between(self, one: State, other: State) -> bool:
        """A change of several steps may have ended after any of them."""
        return one.differs & other.differs <= self.differs <= one.differs | other.differs


class Scene:
    """One row with something between it and everybody whom it talks to."""

    def __init__(self, lab: Lab, row: Row, folder: Path, stack: contextlib.ExitStack) -> None:
        self.lab, self.row, self.folder = lab, row, folder
        self.params = row.params(lab)
        self.parties: dict[str, Party] = {}
        self.host: Any = None
        for service in services_of(row.control):
            party, self.params = service.stand(lab, self.params, stack)
            self.parties[service.name] = party
        self.host = self.parties.get(HOST.name)

    def calm(self) -> None:
        for party in self.parties.values():
            party.arm(None)

    def round(self) -> Trial:
        trial = Trial(self.lab, self.row)
        trial.host = self.host
        trial.params |= self.params
        if "deadline" in trial.control.spec["argument_spec"]:
            trial.params["deadline"] = DEADLINE
        trial.entries = (trial.journal() or {"seq": None})["seq"]
        self.calm()
        return trial


class Trial(Round):
    """One incident, whose control is carried out through what stands between."""

    entries: int | None = None  # in its stream so far

    def disturbed(self, seconds: float, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """A run that has so long for its changes; how long it may take follows from that."""
        with short_of_time(self.name, seconds) as control:
            began = time.monotonic()
            result = helpers.execute(control, {**self.params, **(params or {})}, host=self.host)
            seconds = max(seconds, float(self.params.get("deadline") or 0))
            took = time.monotonic() - began
        assert took < 2 * seconds + SETTLE + LAST_REQUESTS + BUSY_MACHINE, f"{took:.1f} s"
        return result

    def told(self, seen: dict[str, Any]) -> State:
        """A state by what differs from before; a reversible control's to the byte."""
        differs = frozenset(masked(path) for path in differing(self.before, seen))
        return State(differs, comparable(seen, self.incident) if self.row.reversible else "")

    def journal(self) -> dict[str, Any] | None:
        stream = self.case().stream(self.row.host, self.control.evidence)
        stream.load()
        return stream.head.doc if stream.head else None


@contextlib.contextmanager
def short_of_time(name: str, seconds: float, **more: Any) -> Iterator[Control]:
    """Undisturbed runs have the control's own time, so that a busy machine disturbs none."""
    module = helpers.module_of(name)
    usual = module.CONTROL
    module.CONTROL = dataclasses.replace(usual, deadline=seconds, settle=SETTLE, **more)
    try:
        yield module.CONTROL
    finally:
        module.CONTROL = usual


def differing(before: Any, after: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            yield from differing(before.get(key), after.get(key), f"{path}.{key}")
    elif before != after:
        yield path


def masked(path: str) -> str:
    """Without ids and numbers, which no two rounds share."""
    return re.sub(r"INC-[\d-]+|\b[0-9a-f]{12,}\b|\d+", "#", path)


@dataclasses.dataclass
class Undisturbed:
    """What a run does when nothing goes wrong: the states it goes through, and the requests it makes of each party."""

    states: list[State]
    requests: dict[str, list[Request]]
    written: Counter[str]

    @classmethod
    def watch(cls, scene: Scene) -> Undisturbed:
        plain = scene.round()
        assert not (result := plain.again()).get("failed"), result
        requests = {name: list(party.seen) for name, party in scene.parties.items()}
        plain.release()
        trial = scene.round()
        states = [trial.told(trial.look())]
        prove: Callable[..., None] | None = trial.control.prove

        def noted(client: Any, params: dict[str, Any], change: Any) -> None:
            if prove is not None:
                prove(client, params, change)
            states.append(trial.told(trial.look()))

        with short_of_time(trial.name, 30.0, prove=noted):
            assert not (result := trial.again()).get("failed"), result
        trial.releases(trial.look())
        return cls(states, requests, written(scene))


def written(scene: Scene) -> Counter[str]:
    """The writes that servers said they did, by what they were."""
    seen = (request for party in scene.parties.values() for request in party.seen)
    return Counter(masked(request.name) for request in seen if request.writes and request.well)


def chosen(asked: list[Request], fits: list[int], number: int) -> list[int]:
    """Some of the requests that a fault can meet, other ones for each fault: two in three are writes, where there are any."""
    writes = [place for place in fits if asked[place - 1].writes]
    pools = [fits, writes] if FULL else [writes if writes and number % 3 else fits]
    steps = [(pool, step, min(POINTS, len(pool))) for pool in pools for step in range(min(POINTS, len(pool)))]
    return sorted({pool[(number * 5 + step * len(pool) // count) % len(pool)] for pool, step, count in steps})


def honest(trial: Trial, result: dict[str, Any], undisturbed: Undisturbed) -> None:
    """What a failure says is what the servers show, and what the journal says."""
    text = json.dumps(result)
    secrets = {*trial.lab.secrets(), *trial.row.secrets(trial.lab)}
    assert not [secret for secret in secrets if secret in text]
    assert "canary" not in text and "unexpected" not in text and "Traceback" not in text
    msg = result["msg"]
    options = {*helpers.module_of(trial.name).CONTROL.service.SPEC, *trial.control.spec["argument_spec"]}
    assert "ame command again" in msg or any(re.search(rf"\b{name}\b", msg) for name in options), msg
    outcomes = result.get("outcomes", [])
    entry = trial.journal()
    refused = entry is not None and (entry["kind"], entry["body"].get("why")) == ("refused", msg)
    if not outcomes:
        assert (refused or "othing was changed" in msg) and not result["changed"], result
    words = {
        **dict.fromkeys(("applied", "proved"), "done"),
        **dict.fromkeys(("unconfirmed", "unproven"), "unconfirmed"),
    }
    listed = dict(
        re.findall(r"(?:\. |; )(done|unconfirmed|not done): (.*?)(?=; unconfirmed: |; not done: |\. Once)", msg)
    )
    for one in outcomes:
        assert f"{one['action']} {one['target']}" in listed[words.get(one["outcome"], "not done")], msg
    made = [one for one in outcomes if one["outcome"] in MADE]
    unclear = [one for one in outcomes if one["outcome"] == "unconfirmed"]
    assert result["changed"] == bool(made or unclear), result
    seen, may = trial.told(trial.look()), undisturbed.states[len(made) : len(made) + 1 + len(unclear)]
    assert seen in may or (unclear and seen.between(*may)), (msg, sorted(seen.differs), may)
    if outcomes:
        assert entry is not None and (entry["kind"], entry["body"]["outcomes"]) == ("failed", outcomes)
        assert entry["body"]["why"] == msg
    else:
        assert refused or (entry and entry["seq"]) == trial.entries, entry


def goes_on(trial: Trial, undisturbed: Undisturbed, scene: Scene, number: int) -> None:
    """The fault is gone: the same command converges, and a release restores, from there or from the very failure."""
    scene.calm()
    if number % 2:
        released = trial.release()
        assert not released.get("failed"), released["msg"]
        if trial.row.reversible:
            assert trial.look() == trial.before
            assert verify(trial.case())["valid"]
            return
    seen = trial.ends_as_undisturbed()
    assert trial.told(seen) == undisturbed.states[-1]
    trial.releases(seen)
    assert verify(trial.case())["valid"]


def turns(service: Service, row: Row) -> tuple[int, int]:
    """In the short form the rows of a service share what can go wrong with it; the whole form tries all with each."""
    rows = [helpers.name_of(each) for each in ROWS if service in services_of(each.control)]
    return (0, 1) if FULL else (rows.index(helpers.name_of(row)), len(rows))


class Tries:
    """Everything that is tried with one row; what does not hold is collected, and told with what it was."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.undisturbed = Undisturbed.watch(scene)
        self.tried = self.of = 0
        self.lies: list[str] = []

    def service(self, service: Service) -> None:
        asked = self.undisturbed.requests[service.name]
        turn, of = turns(service, self.scene.row)
        for number, fault in enumerate(service.faults):
            fits = [place for place, request in enumerate(asked, 1) if fault.fits(request)]
            self.of += len(fits)
            for point in chosen(asked, fits, number) if fits and (number % of == turn or fault.then == "reset") else []:
                with self.told(f"{service.name}: {fault.name}, request {point} ({asked[point - 1].name[:80]})"):
                    self.tried += suffers(self.scene, self.undisturbed, service, fault, point, number)
        trial = self.scene.round()
        self.of += len(service.places)
        for number, (name, place) in enumerate(service.places.items()):
            if number % of == turn:
                with self.told(f"{service.name}: {name}"):
                    self.tried += 1
                    begins_nothing(self.scene, trial, self.undisturbed, place)
        with self.told(f"{service.name}: the same command at last"):
            goes_on(trial, self.undisturbed, self.scene, 0)

    @contextlib.contextmanager
    def told(self, what: str) -> Iterator[None]:
        try:
            yield
        except AssertionError as failure:
            self.lies.append(f"{what}: {failure}")


@pytest.mark.parametrize("row", ROWS, ids=helpers.name_of)
def test_a_service_goes_wrong(
    lab: Lab, row: Row, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with contextlib.ExitStack() as stack:
        tries = Tries(Scene(lab, row, tmp_path, stack))
        for service in services_of(row.control):
            tries.service(service)
    assert tries.lies == [], "\n\n".join(tries.lies)
    assert tries.tried
    record_property("tried", tries.tried)
    record_property("of", tries.of)


def suffers(scene: Scene, undisturbed: Undisturbed, service: Service, fault: Fault, point: int, number: int) -> bool:
    """One request of one run."""
    trial = scene.round()
    party = scene.parties[service.name]
    party.arm(fault, point)
    began = time.monotonic()
    result = trial.disturbed(fault.seconds)
    seconds = time.monotonic() - began
    met = party.hits
    assert ELSEWHERE.seen == []
    if result.get("failed"):
        honest(trial, result, undisturbed)
    else:
        seen, states = trial.told(trial.look()), undisturbed.states
        # What is called applied may show later, and in part; verified is there.
        later = result["outcome"] == "applied" and seen.between(states[0], states[-1])
        assert seen == states[-1] or later, result
        assert not (twice := written(scene) - undisturbed.written), twice
    if met and fault.name == "429 for long" and result.get("failed"):
        assert seconds < fault.seconds and f"{FOR_LONG} s" in result["msg"], result["msg"]
    if met and fault.name == "429 for a second":
        assert not result.get("failed"), result["msg"]
    goes_on(trial, undisturbed, scene, number + point)
    return bool(met)


def begins_nothing(scene: Scene, trial: Trial, undisturbed: Undisturbed, place: Any) -> None:
    """Where nobody answers, or not the one who should, or with other credentials."""
    usual = scene.row.params(scene.lab)
    with place(scene.lab, usual, scene.folder) as elsewhere:
        changed = {key: value for key, value in elsewhere.items() if value != usual.get(key)}
        result = trial.disturbed(1.0, changed)
    assert result.get("failed") or not changed, result
    if result.get("failed"):
        honest(trial, result, undisturbed)


# --- playbooks: one system is faulty, the others are contained

IMPATIENT = extra(verify_recovery_timeout=1, firebreak_evidence_patience=2)
# By the system: what is contained all the same (the doors are tried at app, whatever is faulty), and what the screen names.
NEEDED_BY = {
    "pg1": ({"cf", "cache1", "app"}, {"pg1"}),
    "cache1": ({"cf", "pg1", "vault", "app"}, {"cache1"}),
    "vault": ({"cf", "pg1", "cache1"}, {"vault"}),
    "cf": ({"pg1", "cache1", "vault", "app"}, {"cf"}),
    "app": ({"cf", "pg1", "cache1"}, {"app", "vault"}),
}
PARTS = {"app": "ssh"}
KINDS = ("down", "reset", "cut", "stall")
# In the short form the one that most depends on.
EVERY = [(host, kind) for kind in KINDS for host in sorted(NEEDED_BY, key=lambda host: host != "pg1")]
SYSTEMS = EVERY[: budget(1, len(EVERY))]


@pytest.fixture
def own_lab(tmp_path: Path) -> Iterator[Lab]:
    with lab_in(tmp_path / "lab") as made:
        yield made


@contextlib.contextmanager
def faulty(lab: Lab, folder: Path, kind: str, *hosts: str) -> Iterator[Path]:
    """An inventory of a lab in which these systems are ended, or behind a network that breaks."""
    if kind == "down":
        with dumps.session(lab) as database:
            database.execute("CHECKPOINT")  # or a sequence goes on 32 numbers later, which is no undoing's fault
        for host in hosts:
            lab.kill(PARTS.get(host, host))
        yield lab.inventory_path
        for host in hosts:
            lab.start(PARTS.get(host, host))
    else:
        with proxied(lab, folder / "faulty.yml") as proxies:
            for host in hosts:
                proxies[host].fault(kind, way="down" if kind == "cut" else "both")
            yield folder / "faulty.yml"


def says_so(lab: Lab, run: Run) -> None:
    """The screen tells what to do, in no time that nobody stated, and shows no secret."""
    assert run.code != 0, run.output
    assert "same command again" in run.output
    assert not [secret for secret in lab.secrets() if secret in run.output]
    assert "Traceback" not in run.output and "unexpected " not in run.output


def verified(lab: Lab, incident: str) -> None:
    checked = play(lab, "verify_case", incident)
    assert checked.code == 0, checked.output


@pytest.mark.parametrize(("host", "kind"), SYSTEMS, ids=[f"data_breach {host} {kind}" for host, kind in SYSTEMS])
def test_the_others_are_contained(own_lab: Lab, tmp_path: Path, host: str, kind: str) -> None:
    others, named = NEEDED_BY[host]
    with faulty(own_lab, tmp_path, kind, host) as inventory:
        first = play(own_lab, "data_breach", None, *IMPATIENT, inventory=inventory)
        for other in others:
            assert dumps.CONTAINED[other](own_lab), (other, first.output)
    says_so(own_lab, first)
    assert named & first.open, first.screen
    if kind == "down":
        assert not first.open & others - {"app"}, first.screen
    again = play(own_lab, "data_breach")
    assert again.code == 0 and again.incident == first.incident, again.output
    assert dumps.contained(own_lab) == set(dumps.CONTAINED)


BACK = [("pg1", "down"), ("cf", "cut"), ("pg1", "stall")][: budget(1, 3)]


@pytest.mark.parametrize(("host", "kind"), BACK, ids=[f"release {host} {kind}" for host, kind in BACK])
def test_the_others_are_released(own_lab: Lab, tmp_path: Path, host: str, kind: str) -> None:
    before = dumps.everything(own_lab)
    incident = run_before(own_lab, "release")
    with faulty(own_lab, tmp_path, kind, host) as inventory:
        first = play(own_lab, "release", incident, inventory=inventory)
        if host != "pg1":
            assert not dumps.fenced(own_lab), first.output
        if host != "cf":
            assert not dumps.shielded(own_lab), first.output
    says_so(own_lab, first)
    assert host in first.output
    again = play(own_lab, "release", incident)
    assert again.code == 0, again.output
    after = dumps.but_for_what_is_final(dumps.everything(own_lab), before, everybody=True)
    expected = dumps.but_for_what_is_final(before, before, everybody=True)
    assert {part: after[part] == expected[part] for part in expected} == dict.fromkeys(expected, True)
    verified(own_lab, str(incident))


@pytest.mark.parametrize("playbook", ["open", "verify_case"])
def test_what_needs_no_system_minds_none(lab: Lab, tmp_path: Path, playbook: str) -> None:
    incident = run_before(lab, playbook)
    with faulty(lab, tmp_path, "reset", *NEEDED_BY) as inventory:
        done = play(lab, playbook, incident, inventory=inventory)
    assert done.code == 0, done.output


def test_every_service_brings_its_faults() -> None:
    for name in helpers.controls():
        assert all(service.faults for service in services_of(name)), name


# --- gates: what asks, and changes nothing


def test_a_gate_takes_no_trouble_for_health_nor_for_a_refusal(
    lab: Lab, record_property: Callable[[str, object], None]
) -> None:
    store = helpers.store_of(lab)
    around = helpers.surroundings(lab, store, "app", helpers.open_incident(lab, store, "app"))
    target = urlsplit(lab.app_direct_url)
    faults = [fault for fault in CONSUMER.faults if fault.on != "writes"]
    with HttpInjector((str(target.hostname), int(target.port or 0))) as between:
        url = f"http://127.0.0.1:{between.port}/health"
        served = {"name": "health", "url": url, "expect": {"contains": "ok"}}
        refused = {"name": "door", "url": url, "must": "refuse"}

        def ask(fault: Fault | None, check: dict[str, Any], **more: Any) -> dict[str, Any]:
            between.arm(fault)
            given = {"checks": [check], "timeout": 0, "request_timeout": 0.3, "interval": 0.05, **more}
            result = helpers.execute(health_gate.CONTROL, {**around, "host": "app", **given})
            assert "canary" not in json.dumps(result) and "unexpected" not in json.dumps(result), result
            return result

        assert ask(None, served)["passed"] and not ask(None, refused)["passed"]
        for fault in faults:
            lasting = dataclasses.replace(fault, times=None)
            told = ask(lasting, served)
            assert not told["passed"] and "health" in told["msg"], fault.name
            says_no = fault.name in ("credential revoked", "credential unknown")
            assert ask(lasting, refused)["passed"] == says_no, fault.name
            passing = dataclasses.replace(fault, times=1)
            assert ask(passing, served, timeout=20)["passed"], fault.name
    assert ELSEWHERE.seen == []
    record_property("tried", 3 * len(faults))
