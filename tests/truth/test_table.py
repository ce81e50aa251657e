# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""No control and no playbook is outside the harness, and the table that the README quotes is about all of them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from lab import ROOT
from tests.truth import table
from tests.truth.playbooks import SCENARIOS


@pytest.fixture(scope="module")
def collected() -> set[tuple[str, str]]:
    """The cells that a whole run fills, however much of it is asked for now."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/truth"]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {where for line in told.splitlines() if (where := table.place(line))}


@pytest.mark.parametrize("name", table.PROPERTIES)
def test_every_control_and_playbook_is_in_it(name: str, collected: set[tuple[str, str]]) -> None:
    _title, controls, playbooks = table.PROPERTIES[name]
    wanted = [*(table.CONTROLS if controls else []), *(table.PLAYBOOKS if playbooks else [])]
    assert [one for one in wanted or [table.ENGINE] if (name, one) not in collected] == []


def test_every_playbook_has_a_scenario() -> None:
    assert sorted(SCENARIOS) == table.PLAYBOOKS
    assert {one for scenario in SCENARIOS.values() for one in scenario.before} <= set(table.PLAYBOOKS)


def test_every_file_is_a_property() -> None:
    found = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "truth").glob("test_*.py")}
    assert {name for name in found if not table.place(f"tests/truth/test_{name}.py::")} == {"table"}


def test_the_readme_quotes_a_run_that_held() -> None:
    text = (ROOT / "README.md").read_text()
    block = text.partition(table.BEGIN)[2].partition(table.END)[0]
    quoted = [line for line in block.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in quoted]
    assert cells[0][1:] == [title for title, *_unused in table.PROPERTIES.values()]
    assert {*table.CONTROLS, *table.PLAYBOOKS} <= {line[0] for line in cells[2:]}
    assert not any("held" in cell for line in cells for cell in line)
    assert table.QUOTED.endswith(f"::{test_the_readme_quotes_a_run_that_held.__name__}")


@dataclasses.dataclass
class Report:
    nodeid: str
    failed: bool = False
    when: str = "call"
    user_properties: tuple[tuple[str, Any], ...] = ()


def test_what_failed_is_told() -> None:
    here = "tests/truth/test_kill_release.py::test_x"
    cells = table.count(
        [
            Report(f"{here}[cloudflare_waf_rule]", user_properties=(("tried", 4), ("of", 9))),
            Report(f"{here}[cloudflare_waf_rule-more]", failed=True, user_properties=(("tried", 2),)),
            Report(f"{here}[release]", when="setup"),
            Report(f"{here}[release]", when="setup", failed=True),
            Report("tests/unit/test_engine.py::test_y[release]"),
        ]
    )
    assert {where: str(cell) for where, cell in cells.items()} == {
        ("kill", "cloudflare_waf_rule"): "5 held of 6 of 11",
        ("kill", "release"): "0 held of 1",
    }
    shown = table.lines(table.rows(cells))
    assert len({len(line) for line in shown}) == 1 and len(shown) == 4
    assert [line.split("|")[1].strip() for line in shown[2:]] == ["cloudflare_waf_rule", "release"]
