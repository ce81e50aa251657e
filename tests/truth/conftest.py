# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Shows the table of what was tried and what held, and writes it into the README after a whole run."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def walk_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process finds its home, its temporary files and its spool."""
    for name, folder in {"HOME": "home", "TMPDIR": "tmp", "FIREBREAK_SPOOL": "spool"}.items():
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every playbook on one lab, each run once."""
    from tests.runs import lab_in
    from tests.truth.playbooks import tell

    with lab_in(tmp_path_factory.mktemp("story") / "lab") as lab:
        yield tell(lab)


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int) -> None:
    # It imports the collection, which is not there yet when this file is read.
    from tests.truth import FULL
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
        form = "whole" if FULL else "short"
        Path(readme).write_text("\n".join([before + BEGIN, "", f"The {form} form tried:", "", *shown, "", END]) + after)
