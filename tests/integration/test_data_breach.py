# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A breach contained, proved and undone by the playbooks, as a user runs them on a lab."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lab import drill, picture
from lab.client import Lab
from tests import dumps, helpers
from tests.runs import Run, entries, extra, lab_in, run

# --- with thief and users at work


@dataclasses.dataclass
class Breach:
    lab: Lab
    run: Run
    rows: dict[str, int]
    doors: dict[str, Any]
    users: dict[str, Any]


@pytest.fixture(scope="module")
def breach(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Breach]:
    """The thief steals, users work, and a person runs the playbook."""
    with lab_in(tmp_path_factory.mktemp("breach") / "lab", "--thief") as lab:
        lab.until(lambda: every_door_is_used(lab), "not every door is open")
        lab.mark("start")
        done = run(lab, "data_breach")
        lab.mark("end")
        lab.until(lambda: bool(lab.thief.summary()["closed"]), "a door is still open")
        lab.until(lambda: lab.crowd.summary()["phases"]["after"]["served"] > 20, "users are not served")
        rows = {table: dumps.rows(lab, table) for table in ("audit_logs", "sessions")}
        yield Breach(lab, done, rows, lab.thief.summary()["doors"], lab.crowd.summary()["phases"])


def every_door_is_used(lab: Lab) -> bool:
    doors = lab.thief.summary().get("doors", {})
    return bool(doors) and all(door["taken_before"] for door in doors.values())


def test_the_breach_is_contained(breach: Breach) -> None:
    assert breach.run.code == 0, breach.run.output
    assert "verything is contained" in breach.run.screen
    assert "NOT" not in breach.run.screen
    assert breach.run.incident in breach.run.output.split("TASK [Shield the edge", 1)[0]


def test_every_door_of_the_thief_is_closed(breach: Breach) -> None:
    assert set(breach.doors) == {"database", "tamper", "jwt", "refresh", "webhook"}
    for name, door in breach.doors.items():
        assert door["taken_before"], name
        assert door["closed"] and door["closed_after_seconds"] <= breach.run.seconds + 3, (name, door)
        assert all(path["refused"] >= 3 for path in door["paths"].values()), (name, door)


def test_users_are_served_all_the_time(breach: Breach) -> None:
    for phase in ("before", "during", "after"):
        seen = breach.users[phase]
        assert seen["served"] and not seen["refused"] and not seen["errors"], (phase, seen)


def test_the_drill_is_drawn(breach: Breach) -> None:
    """One file that needs no other, with every try of the thief, every control, and no secret."""
    card = drill.scorecard(breach.lab, "data_breach", breach.run.seconds)
    page = picture.draw(card, breach.lab.dir)
    assert [secret for secret in breach.lab.secrets() if secret in page] == []
    assert not any(word in page for word in ("http:", "https:", "<script", "@import", "url("))
    drawing = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + len("</svg>")])
    seen = Counter(element.get("class") for element in drawing.iter())
    tries = Counter(record["outcome"] for record in breach.lab.thief.records())
    # It goes on while the page is drawn.
    assert 0 < seen["taken"] <= tries["taken"] and 0 < seen["refused"] <= tries["refused"]
    assert seen["closed"] == len(card["doors"])
    words = {element.text for element in drawing.iter("text")}
    intents = {entry["body"]["control"] for entry in entries(breach.lab, kind="intent")}
    assert {word.split(":")[0] for word in words if word} >= intents
    assert {phase["name"] for phase in card["phases"]} | set(breach.doors) <= words


def test_the_exports_are_whole(breach: Breach) -> None:
    folder = breach.lab.dir / "cases" / breach.run.incident
    for table, expected in breach.rows.items():
        manifest = json.loads((folder / f"evidence/pg1/1/incident_{table}.csv.json").read_bytes())
        content = (breach.lab.dir / "cases" / manifest["key"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == manifest["sha256"]
        assert manifest["bytes"] == len(content)
        lines = list(csv.reader(content.decode().splitlines(keepends=True)))
        assert len(lines) - 1 == manifest["rows"] == expected > 0
        columns = [name for (name,) in _columns(breach.lab, table)]
        assert lines[0] == columns


def _columns(lab: Lab, table: str) -> list[Any]:
    with dumps.session(lab) as database:
        query = "SELECT column_name FROM information_schema.columns WHERE table_name = %s ORDER BY ordinal_position"
        return database.execute(query, [table]).fetchall()


def test_the_case_is_proved(breach: Breach) -> None:
    words = extra(firebreak_incident_id=breach.run.incident, firebreak_expect=breach.run.expect)
    proved = run(breach.lab, "verify_case", *words)
    assert proved.code == 0, proved.output
    seen = proved.of("case_verify_info")[0]
    assert seen["valid"] and seen["entries"] == len(entries(breach.lab))


def test_an_altered_case_is_not_proved(breach: Breach, tmp_path: Path) -> None:
    """On a copy: an entry changed, and a chain cut short before the seal that was told."""
    for name, harm in (("changed", _change), ("cut", _cut)):
        store = tmp_path / name
        shutil.copytree(breach.lab.dir / "cases", store)
        where = harm(store / breach.run.incident / "journal")
        words = extra(
            firebreak_incident_id=breach.run.incident,
            firebreak_expect=breach.run.expect,
            firebreak_case_store=f"file://{store}",
        )
        proved = run(breach.lab, "verify_case", *words)
        assert proved.code != 0
        assert where in proved.of("case_verify_info")[0]["msg"], proved.output


def _change(journal: Path) -> str:
    entry = journal / "pg1" / "00000002.json"
    entry.write_bytes(entry.read_bytes().replace(b"verified", b"applied!"))
    return "pg1/2"


def _cut(journal: Path) -> str:
    sorted((journal / "pg1").iterdir())[-1].unlink()
    return "pg1/4"


def test_no_secret_is_shown(breach: Breach) -> None:
    files = helpers.files_below(breach.lab.dir / "cases")
    exports = {path for path in files if path.endswith(".csv")}
    told = [breach.run.output, *(files[path].decode() for path in files.keys() - exports)]
    now = breach.lab.secrets()
    assert len(now) > 5
    assert [secret for secret in now for text in told if secret in text] == []
