# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A pool's clients led to the replica and back while they write: how long one of them waits, and whether a commit is lost.

The floor is the pool's own PAUSE and RESUME with nothing between them, under the same clients, in the same run.
Run it as ``python -m tests.bench.bench_pool [rounds]``.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg

from ansible_collections.firebreak.incident.plugins.modules import control_release, pgbouncer_route
from lab.client import Lab
from tests import helpers
from tests.contract.rotation_walk import LocalHost
from tests.controls.pgbouncer_route import client, connection, console
from tests.controls.postgresql_write_fence import session

from .table import Row, say

CLIENTS = 4
ROUNDS = 5
AROUND = 0.5  # seconds after a switch whose waits still count as its


def write(running: Lab, stop: Any, result: Any) -> None:
    """Clients that commit one row after the other, and note when they had an answer, and to what."""
    told: list[dict[str, Any]] = []

    def work(number: int) -> None:
        answers: list[float] = []
        committed: list[str] = []
        seen = {"answers": answers, "committed": committed, "refused": 0, "errors": 0}
        told.append(seen)
        pool = client(running)
        count = 0
        while not stop.is_set():
            count += 1
            name = f"bench-{number}-{count}"
            try:
                pool.execute("INSERT INTO payments (reference, amount) VALUES (%s, 1)", [name])
                committed.append(name)
            except psycopg.errors.ReadOnlySqlTransaction:
                seen["refused"] += 1
            except psycopg.OperationalError:
                seen["errors"] += 1
                pool = client(running)
            answers.append(time.monotonic())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    result.put(told)


def longest(told: list[dict[str, Any]], began: float, ended: float) -> float:
    """The longest time in milliseconds that one of the clients was without an answer."""
    gaps = [
        after - before
        for seen in told
        for before, after in itertools.pairwise(seen["answers"])
        if after > began and before < ended + AROUND
    ]
    return max(gaps) * 1000


def rows(running: Lab, rounds: int = ROUNDS) -> list[Row]:
    store = helpers.store_of(running)
    incident = helpers.open_incident(running, store, "pg1")
    around = {**helpers.surroundings(running, store, "pg1", incident), **connection(running), "host": "pg1"}
    routes = running.hostvars("pg1")["firebreak_pgbouncer_routes"]

    def route() -> None:
        carried_out(pgbouncer_route.CONTROL, {**around, "routes": routes})

    def back() -> None:
        carried_out(control_release.CONTROL, around)

    def pause() -> None:
        with console(running) as pool:
            pool.execute("PAUSE divan")
            pool.execute("RESUME divan")

    ways: dict[str, Callable[[], None]] = {"PAUSE, RESUME": pause, "to the replica": route, "and back": back}
    windows: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    stop, result = multiprocessing.Event(), multiprocessing.Queue()
    writer = multiprocessing.Process(target=write, args=(running, stop, result))
    writer.start()
    time.sleep(1)
    for number in range(1, rounds + 1):
        for name, way in ways.items():
            began = time.monotonic()
            way()
            windows[name].append((began, time.monotonic()))
            time.sleep(AROUND * 2)
        say(f"round {number} of {rounds}")
    stop.set()
    told = result.get(timeout=30)
    writer.join()
    gaps = {name: statistics.median(longest(told, *window) for window in windows[name]) for name in ways}
    floor = gaps["PAUSE, RESUME"]
    committed = {name for seen in told for name in seen["committed"]}
    errors = sum(seen["errors"] for seen in told)
    say(f"{len(committed)} commits, {sum(seen['refused'] for seen in told)} refused by the replica, {errors} errors")
    lost = max(missing(running, host, committed) for host in ("pg1", "pg2"))
    return [
        Row(
            "pool: longest wait of a client, led to the replica",
            gaps["to the replica"],
            "ms",
            floor,
            "<= 3 x PAUSE, RESUME",
        ),
        Row("pool: the same, led back", gaps["and back"], "ms", floor, "<= 3 x PAUSE, RESUME"),
        Row("pool: clients' errors over all switches", errors, "errors", None, "0"),
        Row("pool: commits told and lost", lost, "commits", None, "0"),
    ]


def carried_out(control: Any, options: dict[str, Any]) -> None:
    done = helpers.execute(control, options, host=LocalHost())
    if done.get("failed") or not done["changed"]:
        raise RuntimeError(done.get("msg", "nothing was changed"))


def missing(running: Lab, host: str, committed: set[str]) -> int:
    """How many of the commits are not on this server, when it has everything."""
    with session(running) as primary, session(running, host=host) as server:
        newest = primary.execute("SELECT pg_current_wal_lsn()").fetchone()
        while host != "pg1" and server.execute("SELECT pg_last_wal_replay_lsn() < %s", newest).fetchone() == (True,):
            time.sleep(0.02)
        found = {row[0] for row in server.execute("SELECT reference FROM payments").fetchall()}
    return len(committed - found)


if __name__ == "__main__":
    from .bench_lab import lab
    from .table import show

    with lab() as (made, _seconds), contextlib.suppress(KeyboardInterrupt):
        show(rows(made, int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS))
