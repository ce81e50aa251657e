# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``python -m tests.bench [part ...]``: how fast it is. Ratios are of one run; seconds are of this machine, as busy as it is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from .table import Row, say, show

PARTS = ("control", "redis", "pool", "verify", "lab", "drill")


def of_controls() -> list[Row]:
    from .bench_control import rows
    from .bench_lab import lab

    with lab() as (running, _seconds):
        return rows(running.env, 110)


def of_redis() -> list[Row]:
    from .bench_redis import rows

    return rows()


def of_verifying() -> list[Row]:
    from .bench_verify import rows

    return rows()


def of_the_pool() -> list[Row]:
    from .bench_lab import lab
    from .bench_pool import rows

    with lab() as (running, _seconds):
        return rows(running)


def of_the_lab() -> list[Row]:
    from .bench_lab import starts

    return starts(3)


def of_the_drill() -> list[Row]:
    from .bench_lab import drill

    return drill()


CALLS: dict[str, Callable[[], list[Row]]] = dict(
    zip(PARTS, (of_controls, of_redis, of_the_pool, of_verifying, of_the_lab, of_the_drill), strict=True)
)


def main() -> int:
    parts = sys.argv[1:] or list(PARTS)
    if unknown := [part for part in parts if part not in CALLS]:
        print(f"no such part: {', '.join(unknown)}; known are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    rows = []
    for number, part in enumerate(parts, 1):
        say(f"part {number} of {len(parts)}: {part}")
        rows += CALLS[part]()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end; medians of interleaved rounds")
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
