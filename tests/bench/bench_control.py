# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One more control in a run, and 25 controls on 25 hosts, against a service of one's own.

A control makes three calls: it reads, writes and reads again. The floor of one more control is a task of Ansible's that does
nothing; that of the fleet is the same calls side by side in one process that is warm.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import threading
import urllib.parse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.collection.plugins.modules.setting import Client

from .far import Far, far
from .plays import Place, control, options, store
from .table import Row, interleaved, say, seconds_of

HOSTS = 25
FEW, MANY = 1, 6
ANSWER = 0.05
STORE = 0.03


def one_more(away: Far, seconds: float) -> list[Row]:
    """The slope between a play of one task and one of six."""
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), 1)
        common = options(store(Path(folder)), away.url)
        kinds: dict[str, Callable[[], dict[str, Any]]] = {
            "nothing": lambda: {"name": "Nothing", "ansible.builtin.debug": {"msg": ""}},
            "action": lambda: control(common),
            "module": lambda: control(common, "setting_module"),
        }
        cpu: dict[str, list[float]] = {}

        def play(name: str, number: int) -> float:
            before = processor_time()
            seconds = seconds_of(lambda: place.play([kinds[name]() for _task in range(number)]))
            cpu.setdefault(f"{name} x{number}", []).append(processor_time() - before)
            return seconds

        ways = {f"{name} x{number}": partial(play, name, number) for name in kinds for number in (FEW, MANY)}
        taken = interleaved(ways, 7, seconds)
    wall = {name: slope(taken, name) for name in kinds}
    busy = {name: slope({way: statistics.median(values) for way, values in cpu.items()}, name) for name in kinds}
    return [
        Row("one more control: action", wall["action"], "ms", wall["nothing"], "<= 60 ms"),
        Row("  of it processor time", busy["action"], "ms", busy["nothing"]),
        Row("one more control: module", wall["module"], "ms", wall["nothing"]),
        Row("  of it processor time", busy["module"], "ms", busy["nothing"]),
    ]


def slope(taken: dict[str, float], name: str) -> float:
    """Milliseconds for each task more."""
    return (taken[f"{name} x{MANY}"] - taken[f"{name} x{FEW}"]) / (MANY - FEW) * 1000


def processor_time() -> float:
    """Of our children that have ended; on a machine that others use too it is steadier than the clock."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def warm(url: str) -> None:
    """The calls of 25 controls, each with a connection of its own, and nothing else."""

    def calls(number: int) -> None:
        client = Client(url)
        client.call("GET", f"warm{number}")
        client.call("PUT", f"warm{number}", "on")
        client.call("GET", f"warm{number}")
        client.close()

    threads = [threading.Thread(target=calls, args=(number,)) for number in range(HOSTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def s3_case(away: Far, env: dict[str, str]) -> dict[str, Any]:
    """The lab's S3 at the end of a long line."""
    parts = urllib.parse.urlsplit(env["AWS_ENDPOINT_URL_S3"])
    endpoint = urllib.parse.quote(away.line(str(parts.hostname), int(parts.port or 0), STORE), safe="")
    return {
        "case_store": f"s3://cases/bench?endpoint={endpoint}&region=us-east-1&lock_mode=GOVERNANCE&retention_days=1",
        "case_access_key_id": env["AWS_ACCESS_KEY_ID"],
        "case_secret_access_key": env["AWS_SECRET_ACCESS_KEY"],
    }


def fleet(away: Far, env: dict[str, str], seconds: float) -> list[Row]:
    away.wait(ANSWER)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), HOSTS)
        cases = {"null": {"case_store": "null:"}, "file": store(Path(folder))}
        if "AWS_ENDPOINT_URL_S3" in env:
            cases["s3"] = s3_case(away, env)
        common = {name: options(case, away.url) for name, case in cases.items()}
        ways: dict[str, Callable[[], float]] = {
            "warm": lambda: seconds_of(lambda: warm(away.url)),
            "nothing": lambda: seconds_of(lambda: place.play([{"name": "Nothing", "ansible.builtin.debug": {}}])),
        }
        for name in cases:
            ways[name] = lambda name=name: seconds_of(lambda: place.play([control(common[name])]))  # type: ignore[misc]
        taken = interleaved(ways, 7, seconds)
        rows = [
            Row("25 tasks of Ansible's on 25 hosts that do nothing", taken["nothing"], "s"),
            Row("25 controls on 25 hosts, without a case", taken["null"], "s", taken["warm"]),
            Row("  the same with file://, against without", taken["file"], "s", taken["null"], "<= 1.5 s, x 1.6"),
        ]
        if "s3" not in cases:
            say("no S3 server is here: left out")
            return rows
        rows.append(
            Row("  the same with S3 at 30 ms, against without", taken["s3"], "s", taken["null"], "<= 1.8 s, x 1.6")
        )
        away.requests()
        place.play([control(common["s3"])])
        seen = away.requests()
        say(f"S3's requests of {HOSTS} controls: {seen}")
        rows.append(Row("  S3's requests of one control", sum(seen.values()) / HOSTS, "", None, "4 and a HALT"))
        return rows


def rows(env: dict[str, str], seconds: float) -> list[Row]:
    with far() as away:
        return one_more(away, seconds / 2) + fleet(away, env, seconds / 2)
