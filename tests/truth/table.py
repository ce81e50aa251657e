# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the harness tried and what held, per control or playbook and per property: shown at the end, quoted by the README.

``python -m tests.truth.table`` runs the whole form and writes the README's table when everything held.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

from lab import ROOT
from tests import helpers

# By file: the column's title, and whether each control and each playbook must be in it.
PROPERTIES = {
    "dry_run": ("dry run", True, True),
    "undo": ("undo", True, True),
    "kill": ("kill", True, True),
    "faults": ("faults", True, True),
    "ownership": ("ownership", True, False),
    "silence": ("silence", True, True),
    "guards": ("guards", True, True),
    "once": ("once", True, True),
    "journal": ("journal", False, False),
    "mutants": ("mutants", False, False),
}
ENGINE = "the engine"
CONTROLS = helpers.controls()
PLAYBOOKS = sorted(path.stem for path in (ROOT / "playbooks").glob("*.yml"))
SUBJECTS = [*CONTROLS, *PLAYBOOKS, ENGINE]
BEGIN, END = "<!-- truth: written by `make test-full` -->", "<!-- /truth -->"
QUOTED = "tests/truth/test_table.py::test_the_readme_quotes_a_run_that_held"
MINUTES = 45


@dataclasses.dataclass
class Cell:
    tried: int = 0
    held: int = 0
    of: int = 0

    def __str__(self) -> str:
        if not self.of:
            return ""
        told = str(self.tried) if self.held == self.tried else f"{self.held} held of {self.tried}"
        return told if self.of == self.tried else f"{told} of {self.of}"


def place(nodeid: str) -> tuple[str, str] | None:
    """The property and the control or playbook that a test is about."""
    file = re.search(r"tests/truth/test_([a-z_]+)\.py::", nodeid)
    names = [name for name in PROPERTIES if file and f"{file[1]}_".startswith(f"{name}_")]
    if not names:
        return None
    asked = nodeid.partition("[")[2]
    known = [one for one in SUBJECTS if re.match(rf"{one}\b", asked)]
    return names[0], max(known, key=len) if known else ENGINE


def count(reports: Iterable[Any]) -> dict[tuple[str, str], Cell]:
    """A failed test tried one more than what held."""
    cells: dict[tuple[str, str], Cell] = {}
    for report in reports:
        where = place(report.nodeid)
        if where is None or (report.when != "call" and not report.failed):
            continue
        told = dict(report.user_properties)
        tried = int(told.get("tried", 1))
        cell = cells.setdefault(where, Cell())
        cell.tried += tried
        cell.held += tried - int(report.failed)
        cell.of += max(int(told.get("of", tried)), tried)
    return cells


def rows(cells: dict[tuple[str, str], Cell]) -> list[list[str]]:
    found = [["", *(title for title, *_unused in PROPERTIES.values())]]
    for subject in SUBJECTS:
        line = [str(cells.get((name, subject), Cell())) for name in PROPERTIES]
        if any(line):
            found.append([subject, *line])
    return found


def lines(table: list[list[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    shown = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in table
    ]
    return [shown[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *shown[1:]]


def main() -> int:
    began = time.monotonic()
    environment = {**os.environ, "FIREBREAK_TRUTH": "full", "FIREBREAK_README": str(ROOT / "README.md")}
    # Each file has a lab of its own, and mostly waits for it: two at once.
    command = [sys.executable, "-m", "pytest", "tests/truth", "-v", "-n", "2", "--dist", "loadfile"]
    command += ["--deselect", QUOTED, *sys.argv[1:]]  # which is about to be written
    try:
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=MINUTES * 60).returncode
    except subprocess.TimeoutExpired:
        print(f"not done after {MINUTES} minutes: what has not run was not tried", file=sys.stderr)
        return 1
    print(f"{(time.monotonic() - began) / 60:.0f} minutes")
    return code


if __name__ == "__main__":
    sys.exit(main())
