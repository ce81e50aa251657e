# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""kill -9 of a whole run of each playbook at the boundaries of its tasks: a task's start, a host's result.

The kills of one chain hit the same incident, at later and later boundaries, so that each meets work that was done only now.
Every run of a chain is another machine's, and its case is in S3. At the end the command runs once undisturbed: the state
must be what one undisturbed run leaves. A release of it, or directly after a kill, puts everything back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.client import Lab
from tests import dumps, helpers
from tests.runs import Run, extra, finish, incidents, lab_in, start
from tests.truth import FULL
from tests.truth.far_store import FarStore
from tests.truth.killing import spread
from tests.truth.playbooks import SCENARIOS

Tell = Callable[[str, object], None]
UNDO = "release"
KILLS = 2  # of the short form, in a chain
SHARE = {"data_breach": 150.0, UNDO: 60.0}  # seconds of the whole form for a chain; else
SHARE_ELSE = 25.0
AVERAGE = 0.7  # what a killed run costs of a whole one


@dataclasses.dataclass
class Done:
    """A run that nobody disturbed: its boundaries, and what it changed."""

    run: Run
    boundaries: int
    effect: set[str]


class Site:
    """A lab, and one incident in it."""

    def __init__(self, lab: Lab, words: tuple[str, ...] = (), store: FarStore | None = None) -> None:
        self.lab = lab
        self.words = words
        self.store = store
        self.incident: str | None = None
        self.runs = 0
        self.start = dumps.everything(lab)
        self.known = set(lab.secrets())

    def play(self, playbook: str, kill_at: int = 0) -> tuple[Run, int]:
        """A run on a machine of its own; how many boundaries it came by."""
        self.runs += 1
        home = self.lab.dir.parent / f"m{self.runs}"  # short, for the sockets of ssh below it
        home.mkdir()
        count = home / "boundaries"
        env = {
            "HOME": str(home),
            "TMPDIR": str(home),
            "FIREBREAK_SPOOL": str(home / "spool"),
            "ANSIBLE_CALLBACKS_ENABLED": "recorded,killing",
            "TEST_BOUNDARIES": str(count),
            "TEST_KILL_AT": str(kill_at),
        }
        words = [*SCENARIOS[playbook].words(self.incident), *self.words]
        began = time.monotonic()
        done = finish(*start(self.lab, playbook, *words, **env), began)
        return done, int(count.read_text())

    def undisturbed(self, playbook: str) -> Done:
        before = dumps.everything(self.lab)
        done, boundaries = self.play(playbook)
        assert done.code == 0, done.output
        self.incident = done.incident
        return Done(done, boundaries, effect(before, dumps.everything(self.lab)))

    def killed(self, playbook: str, boundary: int) -> bool:
        """False where the run ended before this boundary."""
        done, _boundaries = self.play(playbook, boundary)
        if self.store is not None:
            self.store.passes()
        assert done.code in (0, -signal.SIGKILL), done.output
        if self.incident is None:
            found = re.search(r"INC-\d{4}-\d{4}-\d{3,}", done.output)
            self.incident = found[0] if found else None
        return done.code != 0

    def close(self) -> None:
        """Workers of a killed run have sessions of their own, and wait for it without end."""
        mark = f"\0HOME={self.lab.dir.parent}/m".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in b"\0" + (process / "environ").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)

    def is_put_back(self) -> None:
        after = dumps.but_for_what_is_final(dumps.everything(self.lab), self.start, everybody=True)
        expected = dumps.but_for_what_is_final(self.start, self.start, everybody=True)
        for part in expected:
            assert after[part] == expected[part], part

    def is_whole(self) -> None:
        """The case is valid, and no secret is in it nor in what the runs left on their machines."""
        proved, _boundaries = self.play("verify_case")
        assert proved.code == 0, proved.output
        known = {secret.encode() for secret in self.known | set(self.lab.secrets())}
        for folder in (self.lab.dir / "cases", *self.lab.dir.parent.glob("m[0-9]*")):
            for name, data in helpers.files_below(folder).items():
                assert not any(secret in data for secret in known), f"a secret is in {folder.name}/{name}"


def effect(before: Any, after: Any, path: str = "") -> set[str]:
    """What is another, without what is different in every lab and every run."""
    before, after = by_name(before), by_name(after)
    if isinstance(before, dict) and isinstance(after, dict):
        return set().union(*(effect(before.get(key), after.get(key), f"{path}/{key}") for key in {*before, *after}))
    if before == after:
        return set()
    # The one who tries the doors logs in with every run.
    path = re.sub(rf"({dumps.SESSION}{dumps.PROBED}:).*", r"\1*", path)
    told = f"{path} {'' if before is None else 'was there, '}{'gone' if after is None else after}"
    told = re.sub(r"INC-\d{4}-\d{4}-\d{3,}", "INC", told)
    told = re.sub(r"\d{4}-\d\d-\d\d[T ][\d:.]+(Z|\+00(:00)?)", "<time>", told)
    return {re.sub(r"[0-9A-Za-z_-]{24,}|\b\d{5,}\b", "*", told)}


def by_name(value: Any) -> Any:
    """A list as what it lists, by name."""
    if not isinstance(value, list):
        return value
    named = {}
    for number, one in enumerate(value):
        one = one[0] if isinstance(one, list) and len(one) == 1 else one
        name = one[0] if isinstance(one, list) and one else one
        if isinstance(one, dict):
            name = next((one[key] for key in ("rolname", "name", "ref", "ip", "id") if one.get(key)), number)
        named[str(name) if str(name) not in named else f"{name} {number}"] = one
    return named


@contextlib.contextmanager
def on_disk(folder: Path) -> Iterator[Site]:
    with lab_in(folder / "lab") as lab, contextlib.closing(Site(lab)) as site:
        yield site


@contextlib.contextmanager
def in_s3(folder: Path) -> Iterator[Site]:
    with (
        lab_in(folder / "lab") as lab,
        FarStore(lab, "chain") as store,
        contextlib.closing(Site(lab, extra(firebreak_case_store=store.uri), store)) as site,
    ):
        yield site


class Undisturbed:
    """Each playbook once after what goes before it, in a lab that is made when it is asked for first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, Done] = {}
        self._stack = contextlib.ExitStack()

    def of(self, playbook: str) -> Done:
        chain = (*SCENARIOS[playbook].before, playbook)
        if playbook not in self._known:
            folder = self._folder / str(len(self._known))
            folder.mkdir()
            with on_disk(folder) as site:
                for one in chain:
                    self._known[one] = site.undisturbed(one)
        return self._known[playbook]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("u"))


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("k")


def chosen(playbook: str, boundaries: int, seconds: float, share: float, short: int) -> list[int]:
    """As many boundaries as there is time for, spread over the run, in their order."""
    fit = max(short, int(share / (AVERAGE * seconds))) if FULL else short
    return sorted(spread(boundaries)[: min(fit, boundaries)])


@pytest.mark.parametrize("playbook", sorted(SCENARIOS))
def test_killed_at_the_boundaries_of_its_tasks(
    playbook: str, undisturbed: Undisturbed, place: Path, record_property: Tell
) -> None:
    with in_s3(place) as site:
        for one in SCENARIOS[playbook].before:
            site.undisturbed(one)
        whole = undisturbed.of(playbook)
        share = SHARE.get(playbook, SHARE_ELSE)
        points = chosen(playbook, whole.boundaries, whole.run.seconds, share, KILLS)
        first = dumps.everything(site.lab)
        killed = sum(site.killed(playbook, point) for point in points)
        assert killed >= len(points) - 1 - len(points) // 10, (killed, points)
        last, _boundaries = site.play(playbook)
        assert last.code == 0, last.output
        assert site.incident in (None, last.incident)
        site.incident = last.incident
        assert effect(first, dumps.everything(site.lab)) == whole.effect
        if playbook != UNDO:
            released, _boundaries = site.play(UNDO)
            assert released.code == 0, released.output
        site.is_put_back()
        site.is_whole()
    record_property("tried", killed)
    record_property("of", whole.boundaries)


@pytest.mark.parametrize("playbook", sorted({*SCENARIOS} - {UNDO}))
def test_released_directly_after_a_kill(
    playbook: str, undisturbed: Undisturbed, place: Path, record_property: Tell
) -> None:
    with on_disk(place) as site:
        for one in SCENARIOS[playbook].before:
            site.undisturbed(one)
        whole = undisturbed.of(playbook)
        share = SHARE.get(playbook, SHARE_ELSE) / 3
        points = chosen(playbook, whole.boundaries, whole.run.seconds, share, 1)
        killed = 0
        for point in points:
            killed += site.killed(playbook, point)
            known = incidents(site.lab)
            if not known:  # nothing was begun
                continue
            site.incident = known[0]
            released, _boundaries = site.play(UNDO)
            assert released.code == 0, released.output
            site.is_put_back()
        if site.incident:
            site.is_whole()
    record_property("tried", killed)
    record_property("of", whole.boundaries)
