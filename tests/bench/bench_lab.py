# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long the lab takes to start, and how long a drill takes to contain."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lab import ROOT
from lab.client import Lab

from .table import Row, say


@contextlib.contextmanager
def lab() -> Iterator[tuple[Lab, float]]:
    """A lab of our own, and the seconds until a user could log in and everything was up."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "lab", "up", "--foreground", "--tied"],
            cwd=ROOT,
            env={**os.environ, "LAB_DIR": folder},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            for line in process.stdout or ():
                if "End it" in line:
                    break
            yield Lab(Path(folder)), time.perf_counter() - started
        finally:
            process.terminate()
            process.communicate(timeout=30)


def starts(times: int) -> list[Row]:
    taken = []
    for number in range(1, times + 1):
        with lab() as (_running, seconds):
            taken.append(seconds)
        say(f"start {number}: {seconds:.2f} s")
    return [Row("lab: from cold to everything up", statistics.median(taken), "s", None, "<= 3 s to the first login")]


def drill() -> list[Row]:
    """The playbook that a user runs, while the thief steals and users work."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "lab", "drill"],
            cwd=ROOT,
            env={**os.environ, "LAB_DIR": folder, "DRILL_KEEP": "0"},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        card = Path(folder) / "scorecard.json"
        if not card.exists():
            say(f"the drill left no scorecard: {done.stdout[-500:]}{done.stderr[-500:]}")
            return []
        told = json.loads(card.read_text())
    rows = []
    for phase in told["phases"]:
        goal = "a few seconds" if phase["name"] == "contain" else ""
        rows.append(Row(f"drill: phase {phase['name']}", float(phase["seconds"] or 0), "s", None, goal))
    still = [door["name"] for door in told["doors"] if door["closed_after_seconds"] is None]
    what = f"drill: from command to screen{', STILL OPEN: ' + ', '.join(still) if still else ''}"
    return [*rows, Row(what, float(told["seconds"]), "s")]
