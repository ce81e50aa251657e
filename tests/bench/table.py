# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the benchmarks share: interleaved rounds, progress, and one table at the end."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable


@dataclasses.dataclass
class Row:
    """One line: what was measured, the floor of the same run, and the goal."""

    what: str
    measured: float
    unit: str
    floor: float | None = None
    goal: str = ""

    def cells(self) -> list[str]:
        floor = "" if self.floor is None else f"{self.floor:.{_digits(self.unit)}f} {self.unit}"
        ratio = "" if not self.floor else f"{self.measured / self.floor:.2f}"
        return [self.what, f"{self.measured:.{_digits(self.unit)}f} {self.unit}", floor, ratio, self.goal]


def _digits(unit: str) -> int:
    return {"s": 2, "ms": 1}.get(unit, 0)


def show(rows: list[Row]) -> None:
    lines = [["what", "measured", "floor", "ratio", "goal"], *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    for line in lines:
        print(line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)))


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def interleaved(ways: dict[str, Callable[[], float]], rounds: int, seconds: float) -> dict[str, float]:
    """Medians of as many rounds as fit into the time: each round runs every way once, so that noise meets all alike."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    until = time.monotonic() + seconds
    for number in range(1, rounds + 1):
        for name, way in ways.items():
            taken[name].append(way())
        say(f"round {number}: " + ", ".join(f"{name} {values[-1]:.2f}" for name, values in taken.items()))
        if time.monotonic() > until:
            break
    return {name: statistics.median(values) for name, values in taken.items()}


def seconds_of(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
