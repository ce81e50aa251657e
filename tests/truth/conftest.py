# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Shows the table of what was tried and what held, and writes it into the README after a whole run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int) -> None:
    # It imports the collection, which is not there yet when this file is read.
    from tests.truth.table import BEGIN, END, count, lines, rows

    cells = count(report for name in ("passed", "failed", "error") for report in terminalreporter.stats.get(name, []))
    if not cells:
        return
    shown = lines(rows(cells))
    terminalreporter.section("tried, and held unless it says otherwise")
    for line in shown:
        terminalreporter.write_line(line)
    readme = os.environ.get("FIREBREAK_README")
    if readme and exitstatus == 0:
        text = Path(readme).read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        Path(readme).write_text("\n".join([before + BEGIN, *shown, END]) + after)
