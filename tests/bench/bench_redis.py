# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Revoke half of the keys of a Valkey server, while another client pings every millisecond.

Every way is measured in the same run, each on the same keys, against the floor: the smallest overlapped SCAN and UNLINK
over two connections, without matching names, values or a proof. Run it as ``python -m tests.bench.bench_redis [keys]``.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis

from ansible_collections.firebreak.incident.plugins.module_utils import _redis
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context
from ansible_collections.firebreak.incident.plugins.modules.redis_session_revocation import CONTROL
from lab.parts.valkey import binary
from tests.bench.table import Row, say

KEYS = 2_000_000
ROUNDS = 2
IAT = 1_790_000_000


@contextlib.contextmanager
def server() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "valkey.conf"
        config.write_text(f'bind 127.0.0.1\nport {port}\ndir {folder}\nsave ""\n')
        process = subprocess.Popen([binary(), config], stdout=subprocess.DEVNULL)
        try:
            client = redis.Redis(port=port)
            for _attempt in range(200):
                with contextlib.suppress(redis.ConnectionError):
                    client.ping()
                    break
                time.sleep(0.02)
            yield port
        finally:
            process.terminate()
            process.wait()


def fill(port: int, keys: int) -> None:
    client = redis.Redis(port=port)
    client.flushall()
    half = keys // 2
    for start in range(0, half, 5000):
        sessions = {
            f"session:refresh:{n // 10}:{n:08x}": json.dumps(
                {"user_id": n // 10, "iat": IAT - n % 86400, "device": "web"}
            )
            for n in range(start, start + 5000)
        }
        client.mset(sessions)
        client.mset({f"cache:{n}": "x" * 100 for n in range(start, start + 5000)})
    client.close()


def bystander(port: int, stop: Any, result: Any) -> None:
    """Another client: a PING each millisecond, and how long each took."""
    client = redis.Redis(port=port)
    client.ping()
    taken = []
    while not stop.is_set():
        started = time.perf_counter()
        client.ping()
        taken.append((started, (time.perf_counter() - started) * 1000))
        time.sleep(0.001)
    result.put(taken)


def floor(port: int) -> None:
    scanner, writer = (redis.Redis(port=port, protocol=2).connection_pool.get_connection() for _unused in range(2))
    scanner.send_command("SCAN", b"0", "MATCH", "session:refresh:*", "COUNT", 1000)
    waiting = False
    cursor = None
    while cursor != b"0":
        cursor, page = scanner.read_response()
        if cursor != b"0":
            scanner.send_command("SCAN", cursor, "MATCH", "session:refresh:*", "COUNT", 1000)
        if waiting:
            writer.read_response()
        if waiting := bool(page):
            writer.send_command("UNLINK", *page)
    if waiting:
        writer.read_response()


def control(port: int, **own: Any) -> None:
    """The control's own steps: read, plan, sweep, prove, mark, read again."""
    options = {**_redis.SPEC, **CONTROL.spec["argument_spec"]}
    params = {name: option.get("default") for name, option in options.items()}
    params |= {"redis_host": "127.0.0.1", "redis_port": port, "scope": "all", "mark": "INC-2026-1120-001/1", **own}
    client = _redis.connect(params, Context())
    for change in CONTROL.plan(params, CONTROL.read(client, params)).changes:
        CONTROL.apply(client, params, change)
        CONTROL.prove(client, params, change)
    CONTROL.read(client, params)
    client.close()


def in_process(port: int, way: Callable[..., None], own: dict[str, Any], result: Any) -> None:
    """A process of its own, so that the peak of its memory is its own."""
    started = time.perf_counter()
    way(port, **own)
    result.put((started, time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def measure(port: int, keys: int, way: Callable[..., None], own: dict[str, Any]) -> tuple[float, ...]:
    fill(port, keys)
    fresh = multiprocessing.get_context("spawn")
    stop, pings, done = fresh.Event(), fresh.Queue(), fresh.Queue()
    other = fresh.Process(target=bystander, args=(port, stop, pings))
    other.start()
    work = fresh.Process(target=in_process, args=(port, way, own, done))
    work.start()
    started, ended, memory = done.get(timeout=120)
    stop.set()
    waits = [wait for at, wait in pings.get(timeout=10) if started <= at <= ended]
    for process in (work, other):
        process.join()
    cuts = statistics.quantiles(waits, n=100)
    return ended - started, memory, cuts[49], cuts[98], max(waits)


WAYS: list[tuple[str, Callable[..., None], dict[str, Any]]] = [
    ("floor: overlapped SCAN and UNLINK", floor, {}),
    ("all sessions, whenever begun", control, {}),
    ("all sessions, batch 1000", control, {"batch": 1000}),
    ("begun before T (values read, second scan)", control, {"issued_before": str(IAT + 1)}),
]


def measured(keys: int, rounds: int, ways: list[Any]) -> dict[str, list[tuple[float, ...]]]:
    """Every way in each round."""
    runs: dict[str, list[tuple[float, ...]]] = {}
    with server() as port:
        for number in range(1, rounds + 1):
            for name, way, own in ways:
                runs.setdefault(name, []).append(measure(port, keys, way, own))
                say(f"round {number}: {name}: {runs[name][-1][0]:.2f} s")
    return runs


def rows(keys: int = KEYS) -> list[Row]:
    """The control against the floor, for the table of all benchmarks."""
    runs = measured(keys, ROUNDS, WAYS[:2])
    (base, *_unused), (seconds, memory, _p50, p99, most) = (
        [statistics.median(column) for column in zip(*taken, strict=True)] for taken in runs.values()
    )
    return [
        Row(f"{keys // 2:,} of {keys:,} Redis sessions revoked", seconds, "s", base, "x 1.1"),
        Row("  another client's p99 meanwhile", p99, "ms", None, "< 5 ms"),
        Row("  another client's longest wait", most, "ms", None, "< 20 ms"),
        Row("  memory of the control", memory, "MB", None, "< 60 MB"),
    ]


def main() -> None:
    keys = int(sys.argv[1]) if len(sys.argv) > 1 else KEYS
    runs = measured(keys, ROUNDS, WAYS)
    base = statistics.median(run[0] for run in runs[WAYS[0][0]])
    print(f"{keys // 2} of {keys} keys, medians of {ROUNDS} rounds; another client's PING in ms")
    print(f"{'way':44} {'seconds':>8} {'x floor':>8} {'p50':>6} {'p99':>6} {'max':>6} {'MB':>5}")
    for name, taken in runs.items():
        seconds, memory, p50, p99, most = (statistics.median(column) for column in zip(*taken, strict=True))
        print(f"{name:44} {seconds:8.2f} {seconds / base:8.2f} {p50:6.2f} {p99:6.2f} {most:6.1f} {memory:5.0f}")


if __name__ == "__main__":
    main()
