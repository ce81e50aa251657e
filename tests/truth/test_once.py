# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Twenty identical triggers at the same moment: exactly one mutates, the others say so and end well.

The triggers are processes of two machines that share nothing but the case store. What is written is counted at the server, and
must be what one run alone writes there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import select
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.firebreak.incident.plugins.module_utils import (
    _cloudflare,
    _pgbouncer,
    _postgresql,
    _redis,
    _vault,
    _writer,
)
from ansible_collections.firebreak.incident.plugins.module_utils._case import Case, open_case
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context, Control
from ansible_collections.firebreak.incident.plugins.module_utils._verify import verify
from ansible_collections.firebreak.incident.plugins.modules import control_release, incident
from lab.client import Lab
from tests import dumps, helpers, runs
from tests.buckets import Bucket
from tests.contract.rotation_walk import LocalHost
from tests.controls.cloudflare_ip_list import control_path
from tests.rows import Row
from tests.runs import extra, finish, lab_in, start
from tests.truth import FULL, budget, table
from tests.truth.playbooks import SCENARIOS, run_before

TRIGGERS = {"file": budget(8, 20), "s3": budget(5, 20)}
PLAYS = budget(3, 20)
PATIENCE = 120.0  # seconds, after which a trigger is taken for one that never ends
DEADLINE = 4.0  # seconds that a killed writer's claim in S3 keeps others waiting here
KILLED = 9
# Not the deletions: how many calls a sweep takes depends on the pages in which the server gives its keys.
WRITES = {b"set", b"setex", b"expire", b"hset", b"sadd", b"rename", b"eval", b"evalsha", b"acl|setuser"}


# --- what a server was asked to write, by the server itself


def edge_writes(lab: Lab) -> Counter[str]:
    asked = control_path(lab, "GET", "log")
    asked = asked["requests"] if isinstance(asked, dict) else asked
    known = Counter(f"{one['method']} {re.sub(r'[0-9a-f]{32}', '*', one['path'])}" for one in asked)
    return Counter({call: number for call, number in known.items() if not call.startswith("GET")})


def database_writes(lab: Lab) -> Counter[str]:
    """What changes anything is in the server's log; it has been written when a statement of our own is in it."""
    mark = f"mark_{uuid.uuid4().hex}"
    with dumps.session(lab) as database:
        database.execute("SET default_transaction_read_only = off")
        database.execute(f"CREATE TEMPORARY TABLE {mark} ()")
    log = Path(lab.dir) / "log" / "pg1-server.json"
    lab.until(lambda: mark in log.read_text(errors="replace"), "the server's log lags behind")
    seen = re.findall(r'"(?:statement|execute [^:"]*): (\w+ \w+)[^"]*', log.read_text(errors="replace"))
    return Counter(one for one in seen if one != "CREATE TEMPORARY")


def cache_writes(lab: Lab) -> Counter[str]:
    with dumps.client(lab) as cache:
        stats = cache.info("commandstats")
    return Counter({name: int(stats.get(f"cmdstat_{name.decode()}", {}).get("calls", 0)) for name in WRITES})


def vault_writes(lab: Lab) -> Counter[str]:
    secrets = dumps.vault(lab)["secrets"]
    return Counter({path: int(secret["metadata"]["current_version"]) for path, secret in secrets.items()})


def pool_writes(lab: Lab) -> Counter[str]:
    log = (Path(lab.dir) / "log" / "pool1.log").read_text(errors="replace")
    return Counter(re.findall(r"(?:RELOAD|KILL|PAUSE|RESUME)(?= command issued)", log))


COUNTED: dict[Any, Callable[[Lab], Counter[Any]]] = {
    _cloudflare: edge_writes,
    _postgresql: database_writes,
    _pgbouncer: pool_writes,
    _redis: cache_writes,
    _vault: vault_writes,
}


def comparable(writes: Counter[Any], incident_id: str) -> dict[str, int]:
    return {str(name).replace(incident_id, "INC"): number for name, number in writes.items() if number}


# --- processes that begin at the same moment


def at_once(work: Callable[[int], Any], number: int) -> list[Any]:
    """What each of so many processes returns, and the seconds that it took; None of one that was killed."""
    reading, holding = os.pipe()
    children: dict[int, tuple[int, int]] = {}
    for place in range(number):
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.close(holding)
                os.read(reading, 1)  # until all are there
                began = time.monotonic()
                answer = {"result": work(place), "seconds": time.monotonic() - began}
                with os.fdopen(theirs, "w") as file:
                    json.dump(answer, file, default=str)
            os._exit(0)
        os.close(theirs)
        children[child] = (place, ours)
    os.close(holding)
    os.close(reading)
    return _answers(children, number)


def _answers(children: dict[int, tuple[int, int]], number: int) -> list[Any]:
    answers: list[Any] = [None] * number
    give_up = time.monotonic() + PATIENCE
    texts = {ours: b"" for _place, ours in children.values()}
    waiting = set(texts)
    while waiting and time.monotonic() < give_up:
        ready, _writable, _other = select.select(list(waiting), [], [], 1.0)
        for ours in ready:
            data = os.read(ours, 1 << 16)
            texts[ours] += data
            if not data:
                waiting.discard(ours)
    for child, (place, ours) in children.items():
        if ours in waiting:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ours)
        answers[place] = json.loads(texts[ours]) if texts[ours] else None
    assert not waiting, f"{len(waiting)} triggers of {number} did not end in {PATIENCE:.0f} s"
    return answers


def on_a_machine(place: int, folder: Path) -> None:
    """Every second process is on another machine: with a home, a spool and run ids of its own."""
    home = folder / f"machine{place % 2}"
    os.environ |= {"HOME": str(home), "FIREBREAK_SPOOL": str(home / "spool")}
    helpers.COUNTER = itertools.count(1000 * (place + 1))
    if place % 2:
        machine = _writer.machine
        _writer.machine = lambda: f"not {machine()}"  # type: ignore[assignment]


def far(lab: Lab) -> Bucket:
    """The store in S3 of all tests here. What the servers keep is marked with the incident's id: none is one of the disk's."""
    bucket = Bucket(lab, "once")
    bucket.put(f"{bucket.prefix}/INC-{time.strftime('%Y-%m%d', time.gmtime())}-500/taken", b"")
    return bucket


class Trigger:
    """One control in an incident of its own, to be started any number of times."""

    def __init__(self, lab: Lab, row: Row, scheme: str, folder: Path) -> None:
        self.lab, self.row, self.folder = lab, row, folder
        self.store = far(lab).options if scheme == "s3" else {"case_store": helpers.store_of(lab)}
        row.prepare(lab)
        around = self.around(row.host)
        opened = helpers.execute(
            incident.CONTROL, {**around, "type": "data_breach", "affected": [row.host], "new": True}
        )
        self.incident = str(opened["incident_id"])
        self.params = {**row.params(lab), **around, "incident_id": self.incident, "host": row.host}

        def carry_out(host: str, control: str, options: dict[str, Any]) -> None:
            given = {**options, **self.around(host), "incident_id": self.incident, "host": host}
            result = helpers.execute(helpers.module_of(control).CONTROL, given, host=LocalHost())
            assert result.get("changed"), result

        row.begin(lab, carry_out)
        self.begun = len(self.case().numbers(self.stream))
        self.before = row.observe(lab)

    def around(self, host: str) -> dict[str, Any]:
        return {**helpers.surroundings(self.lab, "", host), **self.store}

    @property
    def control(self) -> Control:
        control: Control = helpers.module_of(self.row.control).CONTROL
        return control

    def run(self, control: Control | None = None) -> dict[str, Any]:
        """The result, with what it did on the host and how often it began to write."""
        host = LocalHost()
        used = control or self.control
        applied = []

        def apply(client: Any, params: dict[str, Any], change: Any) -> None:
            applied.append(change.target)
            used.apply(client, params, change)

        result = helpers.execute(dataclasses.replace(used, apply=apply), self.params, host=host)
        return {
            **result,
            "applied": applied,
            "on the host": len([line for line in host.shown[::3] if "<" in line or ">" in line]),
        }

    def release(self) -> dict[str, Any]:
        options = {**self.around(self.row.host), **helpers.connection_options(self.row.control, self.params)}
        return helpers.execute(
            control_release.CONTROL,
            {**options, "incident_id": self.incident, "host": self.row.host},
            host=LocalHost(),
        )

    def triggered(self, work: Callable[[int], Any], number: int) -> list[dict[str, Any]]:
        """The results of so many at once, each of which must have ended well, but for what was killed."""

        def on_its_own(place: int) -> Any:
            on_a_machine(place, self.folder)
            return work(place)

        ended = [answer for answer in at_once(on_its_own, number) if answer is not None]
        self.longest = max(answer["seconds"] for answer in ended)
        results: list[dict[str, Any]] = [answer["result"] for answer in ended]
        assert [result["msg"] for result in results if result.get("failed")] == []
        return results

    @property
    def stream(self) -> str:
        return self.case().stream(self.row.host, self.control.evidence).name

    def case(self) -> Case:
        return open_case(self.params, Context(run_id="reader"))

    def holds(self) -> None:
        """The case is valid, nothing in it is open, and nothing is kept on either machine only."""
        seen = verify(self.case())
        assert seen["valid"], seen["first_bad"]
        stream = self.case().stream(self.row.host, self.control.evidence)
        stream.load()
        assert all(item["state"] != "open" for item in stream.live)
        assert list(self.folder.rglob("spool/**/*.json")) == []

    def contained(self) -> None:
        if not (self.control.evidence and self.store["case_store"].startswith("s3:")):  # seen on disk only
            self.row.contained(self.lab, self.before, self.row.observe(self.lab))
        names = [name for name in self.case().store.walk(f"{self.incident}/evidence") if not name.endswith(".json")]
        assert len(names) == int(self.control.evidence)

    def entries(self, kind: str) -> list[Any]:
        """What was written after that which goes before."""
        numbers = self.case().numbers(self.stream)[self.begun :]
        read = self.case().fetch([(self.stream, seq) for seq in numbers])
        return [entry for entry in read if entry.kind == kind]


@contextlib.contextmanager
def counting(trigger: Trigger) -> Iterator[Counter[Any]]:
    """What the service was asked to write meanwhile."""
    count = COUNTED.get(trigger.control.service, lambda _lab: Counter())
    written: Counter[Any] = Counter()
    before = count(trigger.lab)
    yield written
    written.update(count(trigger.lab))
    written.subtract(before)


SCHEMES = pytest.mark.parametrize("scheme", ["file", "s3"])
SHORTER = pytest.mark.parametrize("scheme", ["file", "s3"] if FULL else ["file"])
ROWS = helpers.every_row()


@dataclasses.dataclass
class Alone:
    """What one run of a control does, and what its release then does."""

    applied: int
    on_the_host: int
    written: dict[str, int]
    released: Counter[str]


@pytest.fixture(scope="module")
def known() -> dict[str, Alone]:
    return {}


def alone(lab: Lab, row: Row, folder: Path, known: dict[str, Alone]) -> Alone:
    name = helpers.name_of(row)
    if name not in known:
        one = Trigger(lab, row, "file", folder)
        with counting(one) as written:
            first = one.run()
        assert first["changed"] and first["applied"], first
        released = one.release()
        assert not released.get("failed"), released
        counted = comparable(written, one.incident)
        known[name] = Alone(len(first["applied"]), first["on the host"], counted, put_back([released], one.incident))
    return known[name]


def put_back(results: list[dict[str, Any]], incident_id: str) -> Counter[str]:
    changes = [change for result in results for change in result["changes"]]
    return Counter(f"{change['action']} {change['target']}".replace(incident_id, "INC") for change in changes)


@SCHEMES
@pytest.mark.parametrize("row", ROWS, ids=helpers.name_of)
def test_one_of_many_mutates(
    lab: Lab,
    row: Row,
    scheme: str,
    tmp_path: Path,
    known: dict[str, Alone],
    record_property: Callable[[str, object], None],
) -> None:
    usual = alone(lab, row, tmp_path, known)
    many = Trigger(lab, row, scheme, tmp_path)
    with counting(many) as written:
        results = many.triggered(lambda _place: many.run(), TRIGGERS[scheme])
    assert Counter(result["changed"] for result in results) == {True: 1, False: TRIGGERS[scheme] - 1}
    for result in results:
        if result["changed"]:
            assert (len(result["applied"]), result["on the host"]) == (usual.applied, usual.on_the_host)
        else:
            assert result["outcome"] == "ok" and result["since"] and not result["applied"] and not result["changes"]
    assert comparable(written, many.incident) == usual.written
    many.contained()
    many.holds()
    assert len(many.entries("intent")) == 1
    record_property("tried", TRIGGERS[scheme])

    if row.reversible:
        released = many.triggered(lambda _place: many.release(), TRIGGERS[scheme])
        assert put_back(released, many.incident) == usual.released
        assert row.observe(lab) == many.before
        many.holds()
    else:
        assert not many.release().get("failed")


@pytest.mark.parametrize("row", ROWS, ids=helpers.name_of)
def test_who_looked_too_early_waits_for_who_was_faster(lab: Lab, row: Row, tmp_path: Path) -> None:
    """Nothing locks a far store: another run may have begun after we listed the entries, and be done when we look."""
    two = Trigger(lab, row, "s3", tmp_path)
    faster: list[dict[str, Any]] = []

    def read(client: Any, params: dict[str, Any]) -> Any:
        if not faster:
            faster.extend(two.triggered(lambda _place: two.run(), 1))
        return two.control.read(client, params)

    result = two.run(dataclasses.replace(two.control, read=read))
    assert [one["changed"] for one in (*faster, result)] == [True, False]
    assert result["outcome"] == "ok" and result["since"] and not result["applied"]
    two.holds()
    assert not two.release().get("failed")


@SHORTER
@pytest.mark.parametrize("row", ROWS, ids=helpers.name_of)
def test_where_the_winner_is_killed_one_other_takes_over(
    lab: Lab, row: Row, scheme: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    many = Trigger(lab, row, scheme, tmp_path)

    def dying(client: Any, params: dict[str, Any], change: Any) -> None:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(tmp_path / "the first", os.O_CREAT | os.O_EXCL))
            os._exit(KILLED)
        many.control.apply(client, params, change)

    control = dataclasses.replace(many.control, apply=dying, deadline=DEADLINE, settle=1.0)
    results = many.triggered(lambda _place: many.run(control), TRIGGERS[scheme])
    assert len(results) == TRIGGERS[scheme] - 1, "one was killed"
    assert sum(result["changed"] for result in results) == 1
    many.contained()
    many.holds()
    assert len(many.entries("resumed")) == 1 and len(many.entries("intent")) == 1
    assert not many.release().get("failed")
    if row.reversible:
        assert row.observe(lab) == many.before
    record_property("tried", TRIGGERS[scheme])


@SHORTER
@pytest.mark.parametrize("row", [row for row in ROWS if row.reversible], ids=helpers.name_of)
def test_a_release_and_a_containment_at_once_end_well(lab: Lab, row: Row, scheme: str, tmp_path: Path) -> None:
    """Whichever was last has its way, whole; and a release puts back what stood there before all of them."""
    many = Trigger(lab, row, scheme, tmp_path)
    assert many.run()["changed"]
    many.triggered(lambda place: many.release() if place % 2 else many.run(), 6)
    many.holds()
    assert not many.release().get("failed")
    assert row.observe(lab) == many.before
    assert not many.release()["changed"]
    many.holds()


# --- playbooks


@SHORTER
@pytest.mark.parametrize("playbook", table.PLAYBOOKS)
def test_of_many_runs_one_does_it(
    playbook: str, scheme: str, tmp_path_factory: pytest.TempPathFactory, record_property: Callable[[str, object], None]
) -> None:
    folder = tmp_path_factory.mktemp("o")  # OpenSSH's sockets lie below a home, and have no room for a long name
    with lab_in(folder / "lab") as lab:
        bucket = Bucket(lab, "once")
        store = extra(firebreak_case_store=bucket.uri) if scheme == "s3" else ()
        before = dumps.everything(lab)
        incident_id = run_before(lab, playbook, *store)
        words = [*SCENARIOS[playbook].words(incident_id), *store]
        began = time.monotonic()
        homes = [folder / f"m{number}" for number in range(2)]
        started = [start(lab, playbook, *words, HOME=str(homes[place % 2])) for place in range(PLAYS)]
        done = [finish(*one, began) for one in started]
        assert not any(one.code for one in done), "\n".join(one.screen for one in done if one.code)
        (incident_id,) = {one.incident for one in done}
        entries = bucket.entries() if scheme == "s3" else runs.entries(lab)
        assert [entry["kind"] for entry in entries].count("opened") == 1
        told: Counter[str] = Counter()
        changed: Counter[tuple[str, str]] = Counter()
        for one in done:
            told.update(re.findall(r"(new incident|continuing) INC-", one.output))
            for line in one.results:
                if line["result"].get("outcome") not in (None, "planned") and line["result"].get("changed"):
                    changed[(line["action"], line["task"] + str(line["result"]["changes"]))] += 1
        assert set(changed.values()) <= {1}, changed.most_common(3)
        if incident_id is None or not SCENARIOS[playbook].before:
            assert told["new incident"] == 1 and told["continuing"] == len(done) - 1
        intents = [
            (entry["stream"], change["action"], change["target"], "releases" in entry["body"])
            for entry in entries if entry["kind"] == "intent" for change in entry["body"].get("changes", [])
        ]  # fmt: skip
        assert {one: number for one, number in Counter(intents).items() if number > 1} == {}
        verified = finish(*start(lab, "verify_case", *extra(firebreak_incident_id=incident_id), *store), began)
        assert verified.code == 0, verified.output
        if playbook == "data_breach":
            assert dumps.contained(lab) == {"pg1", "cache1", "cf", "vault", "app"}
        if playbook == "release":
            put_back = dumps.but_for_what_is_final(dumps.everything(lab), before, everybody=True)
            assert put_back == dumps.but_for_what_is_final(before, before, everybody=True)
        record_property("tried", len(done))
