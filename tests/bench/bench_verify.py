# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Verify a case of 100,000 entries, against reading and hashing the same files and nothing else.

The entries are of the real writer's form, and say what a long incident says: controls done, some released, checks, notes and
seals, on 25 hosts. Each way runs in a process of its own, so that the peak of its memory is its own. Run it as
``python -m tests.bench.bench_verify [entries]``.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils._case import RUN, Case, Entry, canonical
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context
from ansible_collections.firebreak.incident.plugins.module_utils._store import FileStore
from ansible_collections.firebreak.incident.plugins.module_utils._verify import verify
from tests.bench.table import Row, interleaved, say

ENTRIES = 100_000
HOSTS = 25
ROUNDS = 5
INCIDENT = "INC-2026-1120-001"
AT = 1_795_000_000.0


def controlled(number: int, head: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """One control's life in its stream after ``head`` entries: begun and done, and checked or released."""
    change = {
        "action": "update",
        "target": f"role reporting_{number} of pg1",
        "path": ["roles", f"reporting_{number}"],
        "before": {"login": True, "connection_limit": -1, "valid_until": None},
        "after": {"login": False, "connection_limit": 0, "valid_until": None},
        "undo": {"roles": [f"reporting_{number}"], "state": "disabled"},
        "irreversible": None,
        "bulk": None,
        "data": {"mark": f"{INCIDENT}/1"},
    }
    summary = {key: change[key] for key in ("action", "target")}
    intent = {
        "control": "postgresql_login_lock",
        "what": hashlib.sha256(str(number).encode()).hexdigest()[:16],
        "mark": f"{INCIDENT}/1",
        "options": {"roles": [f"reporting_{number}"], "state": "enabled"},
        "changes": [change],
        "estimate": {},
        "reversible": True,
        "owner": "ops-team",
        "expires": "2026-11-27T10:00:00Z",
        "on_expiry": "remind",
        "at": AT + number,
        "until": AT + number + 30,
    }
    yield "intent", intent
    yield "done", {"of": head + 1, "outcome": "verified", "outcomes": [{**summary, "outcome": "proved"}]}
    if number % 4 == 0:
        yield (
            "check",
            {"control": "health_gate", "passed": True, "seconds": 0.5, "checks": [{"name": "a", "passed": True}]},
        )
    if number % 15:
        yield "intent", {**intent, "releases": {"seq": head + 1}}
        yield "done", {"of": head + 3 + (number % 4 == 0), "outcome": "verified", "outcomes": []}
        yield "released", {"released": [head + 1]}


class Writer:
    """Writes entries as the engine does, but for the fsync of each: a hundred thousand of them would take minutes."""

    def __init__(self, folder: Path) -> None:
        self.case = Case(FileStore(str(folder), Context()), INCIDENT, {"round": 1, "phase": "contain"}, Context())
        self.folder = folder / INCIDENT / "journal"
        self.case.context.run_id, self.case.context.actor = "0123456789ab", "responder"
        self.heads: dict[str, Entry] = {}
        self.written = 0

    def add(self, stream: str, kind: str, body: dict[str, Any]) -> None:
        before = self.heads.get(stream)
        seq = before.seq + 1 if before else 1
        if before is None:
            (self.folder / stream).mkdir(parents=True)
        doc = self.case.document(stream, seq, kind, body, before)
        (self.folder / stream / f"{seq:08d}.json").write_bytes(canonical(doc))
        self.heads[stream] = Entry(doc)
        self.written += 1

    def seal(self, turn: int) -> None:
        heads = {name: [entry.seq, entry.digest] for name, entry in self.heads.items() if name != RUN}
        self.add(RUN, "seal", {"turn": turn, "heads": heads, "begins": None, "at": AT + turn})


def generate(folder: Path, entries: int) -> None:
    """A case of about so many entries, with a seal at the end of each turn of two hundred controls."""
    writer = Writer(folder)
    writer.add(RUN, "opened", {"type": "data_breach", "title": "A long one", "severity": "SEV-1", "at": AT, "key": "k"})
    number = 0
    while writer.written < entries - 1:
        stream = f"host{number % HOSTS:02}"
        head = writer.heads[stream].seq if stream in writer.heads else 0
        if number % (HOSTS * 200) < HOSTS and head:  # what a long incident leaves behind is adopted, not live for ever
            live = [item["seq"] for item in writer.heads[stream].doc["live"]]
            writer.add(stream, "released", {"released": live})
            head += 1
        for kind, body in controlled(number // HOSTS, head):
            writer.add(stream, kind, body)
        number += 1
        if number % 200 == 0:
            writer.seal(number // 200)
    writer.seal(number // 200 + 1)


def floor(folder: str) -> int:
    """Read every file and hash what was read, in the cheapest way that Python has."""
    files, sha256 = 0, hashlib.sha256
    for where, _folders, names in os.walk(folder):
        for name in sorted(names):
            descriptor = os.open(f"{where}/{name}", os.O_RDONLY)
            sha256(os.read(descriptor, 1 << 16)).digest()
            os.close(descriptor)
            files += 1
    return files


def verified(folder: str) -> int:
    seen = verify(Case(FileStore(folder, Context()), INCIDENT, {}, Context()))
    if not seen["valid"]:
        raise SystemExit(f"the bench's case is not valid: {seen['first_bad']}")
    return int(seen["entries"])


def in_process(way: Callable[[str], int], folder: str, result: Any) -> None:
    began = time.perf_counter()
    entries = way(folder)
    result.put((time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, entries))


def measure(way: Callable[[str], int], folder: str, memory: list[float], entries: int) -> float:
    fresh = multiprocessing.get_context("spawn")
    done = fresh.Queue()
    process = fresh.Process(target=in_process, args=(way, folder, done))
    process.start()
    seconds, peak, seen = done.get(timeout=300)
    process.join()
    if seen < entries:
        raise SystemExit(f"{seen} entries of {entries} were read")
    memory.append(peak)
    return float(seconds)


def rows(entries: int = ENTRIES) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), entries)
        files = [os.path.getsize(path) for path in Path(folder).rglob("*.json")]
        say(f"{len(files):,} entries, {sum(files) / 1e6:.0f} MB")
        used: dict[str, list[float]] = {"floor": [], "verify": []}
        ways = {"floor": floor, "verify": verified}
        taken = interleaved(
            {name: functools.partial(measure, way, folder, used[name], entries) for name, way in ways.items()},
            ROUNDS,
            90,
        )
    peak = {name: statistics.median(values) for name, values in used.items()}
    return [
        Row(f"a case of {len(files):,} entries verified", taken["verify"], "s", taken["floor"], "x 2"),
        Row("  memory of it", peak["verify"], "MB", peak["floor"], ""),
    ]


if __name__ == "__main__":
    from tests.bench.table import show

    show(rows(int(sys.argv[1]) if len(sys.argv) > 1 else ENTRIES))
