# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs that die at a point: in a child of this process at an entry or a change, or on the wire inside a request.

Nothing here knows a service. An entry is what goes through the store, a request what goes over the service's socket while
a control's ``apply`` runs, a command what its host is asked to run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils import _store
from ansible_collections.firebreak.incident.plugins.module_utils._case import Case, open_case
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context, Control
from ansible_collections.firebreak.incident.plugins.module_utils._verify import verify
from lab import faults
from lab.client import Lab
from lab.tcp_proxy import Connection, TcpProxy
from tests import helpers
from tests.contract.rotation_walk import LocalHost
from tests.rows import Row

PATIENCE = 30.0
ENTRIES = [(store, name) for store in (_store.FileStore, _store.S3Store) for name in ("create", "put_file")]
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
# The child uses nothing of what the threads of the wire may hold at that moment.
FORKS = "ignore:.*multi-threaded, use of fork:DeprecationWarning"


# --- in process


class Points:
    """Counts the places where a run can be hit: around each entry, each change, each command of its host."""

    def __init__(self, victim: int = 0, blow: signal.Signals = KILL) -> None:
        self.victim = victim
        self.blow = blow
        self.seen = 0

    def here(self) -> None:
        self.seen += 1
        if self.seen == self.victim:
            os.kill(os.getpid(), self.blow)

    def around(self, place: Any, name: str) -> None:
        real = getattr(place, name)

        def wrapped(*args: Any, **more: Any) -> Any:
            self.here()
            answer = real(*args, **more)
            self.here()
            return answer

        setattr(place, name, wrapped)


class Child:
    """Work in a fork of this process. ``writing`` is set while a control's changes are made, for whoever watches the wire."""

    def __init__(
        self, control: str, work: Callable[[], Any], points: Points, machine: Path, writing: Any = None
    ) -> None:
        reading, answering = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(reading)
                os.environ.update(surroundings(machine))
                tempfile.tempdir = str(machine)
                self._watch(control, points, writing)
                work()
                os.write(answering, str(points.seen).encode())
            finally:
                os._exit(0)
        os.close(answering)
        self._answer = os.fdopen(reading)

    @staticmethod
    def _watch(control: str, points: Points, writing: Any) -> None:
        for place, name in [*ENTRIES, (LocalHost, "run")]:
            points.around(place, name)
        module = helpers.module_of(control)
        apply = module.CONTROL.apply

        def watched(*args: Any) -> None:
            points.here()
            if writing is not None:
                writing[0] = 1
            apply(*args)
            if writing is not None:
                writing[0] = 0
            points.here()

        module.CONTROL = dataclasses.replace(module.CONTROL, apply=watched)

    def ends(self) -> int | None:
        """How many points it came by, None where it was killed."""
        give_up = time.monotonic() + PATIENCE
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > give_up:
                os.kill(self.pid, KILL)
            time.sleep(0.001)
        with self._answer as answer:
            seen = answer.read()
        killed = os.waitstatus_to_exitcode(status) == -KILL
        assert time.monotonic() < give_up and killed != bool(seen)
        return None if killed else int(seen)

    def stops(self) -> bool:
        """Wait until it was stopped; False where it ended before."""
        give_up = time.monotonic() + PATIENCE
        while time.monotonic() < give_up:
            found = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is not None:
                return found.si_code == os.CLD_STOPPED
            time.sleep(0.001)
        raise AssertionError("it neither stopped nor ended")

    def goes_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


def surroundings(machine: Path) -> dict[str, str]:
    """Another home, spool and temporary folder: another machine, as far as a run can tell."""
    machine.mkdir(exist_ok=True)
    return {"HOME": str(machine), "FIREBREAK_SPOOL": str(machine / "spool"), "TMPDIR": str(machine)}


@contextlib.contextmanager
def on(machine: Path) -> Iterator[None]:
    new = surroundings(machine)
    kept, temporary = {name: os.environ.get(name) for name in new}, tempfile.tempdir
    os.environ.update(new)
    tempfile.tempdir = str(machine)
    try:
        yield
    finally:
        tempfile.tempdir = temporary
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


# --- on the wire

HALF_A_REQUEST = "half of the request came"
NO_ANSWER = "the request was answered, and no answer came"
HALF_AN_ANSWER = "half of the answer came"
LATE = "the request is still on its way"
STOPPED = "stopped before the answer"
AT_A_POINT = "stopped at a point"
WAY = {HALF_A_REQUEST: "up", NO_ANSWER: "down", HALF_AN_ANSWER: "down", LATE: "up", STOPPED: "down"}


class Wire:
    """Between a run and the service of its control: counts what turns on the line while a change is made, and hits at one.

    What a control asks of its host counts too: a command is a request, its end the answer.
    """

    def __init__(self, folder: Path) -> None:
        # Shared with the run's process: whether a change is being made, and how many requests and answers there were.
        self.writing = mmap.mmap(-1, 3)
        self.folder = folder
        self._lock = threading.Lock()
        self._proxy: TcpProxy | None = None
        self.arm()

    def arm(self, moment: tuple[str, int] | None = None) -> None:
        self.writing[:] = bytes(3)
        self.moment = moment
        self.victim = 0
        self.held: Connection | None = None
        self._last: dict[Connection, str] = {}
        self._go = threading.Event()
        self.gate = self.folder / f"gate-{next(helpers.COUNTER)}"

    def seen(self, way: str) -> int:
        return self.writing[1 if way == "up" else 2]

    def before(self, params: dict[str, Any]) -> dict[str, Any]:
        """The options with this wire before the service."""
        self.close()
        params = dict(params)
        self._proxy = faults.between(params, prefix="", tap=self._tap)
        return params

    def close(self) -> None:
        self._go.set()
        if self._proxy is not None:
            self._proxy.close()

    def hits(self, way: str) -> str | None:
        """Count one more; what happens to it, if this is the one."""
        with self._lock:
            if not self.writing[0]:
                return None
            self.writing[1 if way == "up" else 2] += 1
            hit = self.moment and (WAY[self.moment[0]], self.moment[1]) == (way, self.seen(way))
            return self.moment[0] if self.moment and hit else None

    def _tap(self, line: Connection, way: str, data: bytes) -> bytes:
        turns = self._last.get(line) != way
        self._last[line] = way
        what = self.hits(way) if turns else None
        if what is None:
            return data
        while not self.victim:  # its number is known a moment after it was born
            time.sleep(0.001)
        if what in (HALF_A_REQUEST, HALF_AN_ANSWER):
            line.pass_on(way, data[: len(data) // 2])
        os.kill(self.victim, STOP if what == STOPPED else KILL)
        self.writing[0] = 0  # what others ask from here on does not count
        if what in (LATE, STOPPED):
            self.held = line
            if what == LATE:
                line.outlive(1.0)
            self._go.wait(PATIENCE)
            return data
        raise OSError

    def let_go(self) -> None:
        """What was held goes on to where it was meant for."""
        self._go.set()

    def comes_late(self) -> None:
        """A dead run's request goes on; returns when its service or host has dealt with it."""
        self.let_go()
        give_up = time.monotonic() + 2
        if self.held is None:
            self.gate.touch()
            while not self.gate.with_suffix(".done").exists():
                assert time.monotonic() < give_up + PATIENCE, "the host's command does not end"
                time.sleep(0.01)
        while self.held is not None and self.held.open and time.monotonic() < give_up:
            time.sleep(0.002)


class WiredHost(LocalHost):
    """A host whose commands go over the same wire."""

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self.wire = wire

    def run(self, command: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        what = self.wire.hits("up")
        if what == HALF_A_REQUEST:
            super().run(command, stdin[: len(stdin) // 2])
        if what == LATE:  # it has its input, and begins when the gate is there, whoever has died by then
            gate, done = self.wire.gate, self.wire.gate.with_suffix(".done")
            held = f"while [ ! -e {gate} ]; do sleep 0.02; done; {command}; touch {done}"
            child = subprocess.Popen(
                ["/bin/sh", "-c", held],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            if child.stdin:
                child.stdin.write(stdin)
                child.stdin.close()
        if what:
            self.wire.writing[0] = 0
            os.kill(os.getpid(), KILL)
        answer = super().run(command, stdin)
        if blow := self.wire.hits("down"):
            self.wire.writing[0] = 0
            os.kill(os.getpid(), STOP if blow == STOPPED else KILL)
        return answer


# --- a round of one control


class Round:
    """One incident of its own, from the state before to the release."""

    def __init__(self, lab: Lab, row: Row, wire: Wire | None = None, store: dict[str, Any] | None = None) -> None:
        self.lab = lab
        self.name = row.control
        self.row = row
        self.row.prepare(lab)
        self.store = store or {"case_store": helpers.store_of(lab)}
        self.host: LocalHost = LocalHost() if wire is None else WiredHost(wire)
        self.more: dict[str, Any] = {}
        opening = {"type": "data_breach", "affected": [row.host], "new": True}
        opened = helpers.execute(
            helpers.module_of("incident").CONTROL,
            {**helpers.surroundings(lab, "", row.host), **self.store, **opening},
        )
        self.incident = str(opened["incident_id"])
        around = {**helpers.surroundings(lab, "", row.host, self.incident), **self.store}
        self.params = {**row.params(lab), **around, "host": row.host}
        if wire is not None:
            self.params = wire.before(self.params)
        row.begin(lab, self._before)
        self.before = self.look()
        self.known = set(row.secrets(lab))

    def _before(self, host: str, control: str, options: dict[str, Any]) -> None:
        """What goes before in the same incident."""
        around = {**helpers.surroundings(self.lab, "", host, self.incident), **self.store, "host": host}
        result = helpers.execute(helpers.module_of(control).CONTROL, {**options, **around}, host=LocalHost())
        assert result.get("changed"), result

    @property
    def final(self) -> bool:
        return not self.row.reversible

    def look(self) -> dict[str, Any]:
        return self.row.observe(self.lab)

    @property
    def control(self) -> Control:
        control: Control = helpers.module_of(self.name).CONTROL
        return control

    def machine(self, name: str) -> Path:
        folder = Path(self.lab.dir) / "machines"
        folder.mkdir(exist_ok=True)
        return folder / name

    def again(self) -> dict[str, Any]:
        return helpers.execute(self.control, self.params, host=self.host, **self.more)

    def release(self) -> dict[str, Any]:
        return helpers.execute(helpers.module_of("control_release").CONTROL, self._undo(), host=self.host, **self.more)

    def _undo(self) -> dict[str, Any]:
        around = {**helpers.surroundings(self.lab, "", self.row.host, self.incident), **self.store}
        return {**around, **helpers.connection_options(self.name, self.params), "host": self.row.host}

    def case(self) -> Case:
        return open_case(self.params, Context(run_id="reader"))

    def entries(self) -> list[str]:
        return self.case().store.walk(f"{self.incident}/journal")

    def is_whole(self) -> None:
        """The case is valid, and no secret is in it nor in anything that a run kept on its machine."""
        seen = verify(self.case())
        assert seen["valid"], seen["first_bad"]
        self.known |= set(self.row.secrets(self.lab))
        here = Path(self.lab.dir)
        for folder in (here / "trials" / self.incident, here / "machines"):
            for name, data in helpers.files_below(folder).items():
                assert not any(secret.encode() in data for secret in self.known), f"a secret is in {name}"

    def ends_as_undisturbed(self) -> dict[str, Any]:
        """The same command once more, and all that has to hold then."""
        result = self.again()
        assert not result.get("failed"), result["msg"]
        seen = self.look()
        self.row.contained(self.lab, self.before, seen)
        self.stays(seen)
        stream = self.case().stream(self.row.host, self.control.evidence)
        stream.load()
        assert stream.live and all(item["state"] != "open" for item in stream.live)
        self.is_whole()
        return seen

    def stays(self, seen: dict[str, Any]) -> None:
        """Nothing is left to do."""
        last = self.again()
        assert (last["changed"], last["outcome"]) == (False, "ok"), last
        assert self.look() == seen

    def releases(self, seen: dict[str, Any]) -> None:
        released = self.release()
        assert not released.get("failed"), released["msg"]
        assert self.look() == (seen if self.final else self.before)

    def is_released(self) -> None:
        """A release once more, and all that has to hold then."""
        self.releases({})
        last = self.release()
        assert not last.get("failed") and not last["changed"], last
        assert self.look() == self.before
        stream = self.case().stream(self.row.host)
        stream.load()
        assert stream.live == []
        self.is_whole()


def held_up(one: Round, wire: Wire, moment: tuple[str, int]) -> Child | None:
    """The run, stopped at this moment; None where it ended before."""
    what, number = moment
    wire.arm(moment if what == STOPPED else None)
    points = Points(number, STOP) if what == AT_A_POINT else Points()
    child = Child(one.name, one.again, points, one.machine("first"), wire.writing)
    wire.victim = child.pid
    if child.stops():
        return child
    child.ends()
    return None


def comparable(seen: Any, incident_id: str) -> str:
    """What is seen, without the ids and times that a server makes up."""
    text = json.dumps(helpers.same_incident(seen, incident_id), sort_keys=True)
    return re.sub(r"\b[0-9a-f]{32}\b|\d{4}-\d\d-\d\dT[0-9:.]+Z", "*", text)


def unordered(seen: Any) -> Any:
    """What is seen, without the order of the lines of a text: a server may write what it was told twice in another one."""
    if isinstance(seen, dict):
        return {name: unordered(value) for name, value in seen.items()}
    return sorted(seen.splitlines()) if isinstance(seen, str) else seen


# --- which points are tried

ALL = 10**6


def spread(points: int) -> list[int]:
    """All points in an order whose every beginning is spread over the whole: as many as there is time for are tried."""
    width = points.bit_length()
    return sorted(range(1, points + 1), key=lambda point: f"{point:0{width}b}"[::-1])


def walk(
    kinds: list[list[Any]],
    most: list[int],
    attempt: Callable[[Any], bool],
    record_property: Callable[[str, object], None],
) -> None:
    """Try so many moments of each kind, spread over all of it; whatever fails says where. An attempt tells whether its
    run was hit."""
    assert all(kinds)
    chosen = [
        (moments, place) for moments, number in zip(kinds, most, strict=True) for place in spread(len(moments))[:number]
    ]
    known, tried = sum(map(len, kinds)), set()
    for moments, first in chosen:
        place = first
        # A run that waits less often than the first one may be over before its moment: then an earlier one.
        while place and moments[place - 1] not in tried:
            try:
                hit = attempt(moments[place - 1])
            except AssertionError as failure:
                raise AssertionError(f"{moments[place - 1]}, of {known}: {failure}") from failure
            if hit:
                tried.add(moments[place - 1])
            place = 0 if hit else place // 2
    assert len(tried) >= 0.8 * len(chosen) - 1, f"{len(tried)} of {len(chosen)}"
    record_property("tried", len(tried))
    record_property("of", known)
