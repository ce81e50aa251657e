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
from tests.runs import NOTHING, Run, entries, extra, glass, incidents, lab_in, neutral, run

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


# --- nobody else at work: what is before, between and after


@dataclasses.dataclass
class Story:
    """One run after the other, and what all servers held after each."""

    lab: Lab
    runs: dict[str, Run]
    dumps: dict[str, dict[str, Any]]
    cases: dict[str, dict[str, bytes]]
    written: dict[str, list[str]]


STAGES = ("check", "real", "again", "check again", "release check", "release", "release again")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with lab_in(tmp_path_factory.mktemp("story") / "lab") as lab:
        told = Story(lab, {}, {}, {}, {})
        _keep(told, "before")
        for stage in STAGES:
            words = ["--check", "--diff"] if "check" in stage else []
            if "release" in stage:
                words += extra(firebreak_incident_id=told.runs["real"].incident)
            else:
                words += extra(firebreak_break_glass=glass("all_sessions"))
            told.runs[stage] = run(lab, "release" if "release" in stage else "data_breach", *words)
            _keep(told, stage)
        yield told


def _keep(told: Story, stage: str) -> None:
    told.dumps[stage] = dumps.everything(told.lab)
    told.cases[stage] = helpers.files_below(told.lab.dir / "cases")
    home = told.lab.dir.parent / "home"
    told.written[stage] = sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


def test_each_stage_ends_well(story: Story) -> None:
    assert {stage: told.code for stage, told in story.runs.items() if told.code} == {}


def test_a_dry_run_writes_nothing_anywhere(story: Story) -> None:
    assert story.dumps["check"] == story.dumps["before"]
    assert story.cases["check"] == story.cases["before"] == {}
    assert story.dumps["check again"] == story.dumps["again"]
    assert story.cases["check again"] == story.cases["again"]
    for stage in story.runs:
        assert [name for name in story.written[stage] if not name.startswith(".ansible/")] == []


def test_a_dry_run_tells_what_the_real_run_does(story: Story) -> None:
    assert story.runs["check"].incident == NOTHING
    expected = story.runs["check"].changes(planned=True)
    assert {host for host, _control in expected} == {"cf", "pg1", "cache1", "vault", "app"}
    assert story.runs["real"].changes(planned=False) == expected
    assert story.runs["real"].changes(planned=True) == expected  # what phase identify predicts
    assert story.runs["check again"].changes(planned=True) == {}
    assert "verifies nothing" in story.runs["check"].output


def test_the_run_reports_what_it_did(story: Story) -> None:
    seen = story.runs["real"].of("incident_info")[-1]
    done = sorted({(one["action"], neutral(one["target"])) for one in seen["done"]})
    assert done == sorted(
        {change for changes in story.runs["check"].changes(planned=True).values() for change in changes}
    )
    assert seen["open"] == [] and seen["spooled"] == []
    assert [phase["name"] for phase in seen["phases"]] == [
        "identify",
        "fence",
        "preserve",
        "contain",
        "verify",
        "communicate",
    ]


def test_a_second_run_changes_nothing(story: Story) -> None:
    again = story.runs["again"]
    assert again.incident == story.runs["real"].incident
    assert again.changes(planned=False) == again.changes(planned=True) == {}
    assert [line for line in again.results if "outcome" in line["result"] and line["result"]["changed"]] == []
    assert intents(story.cases["again"]) == intents(story.cases["real"])
    assert _unprobed(story.dumps["again"]) == _unprobed(story.dumps["real"])


def _unprobed(dump: dict[str, Any]) -> dict[str, Any]:
    """Without the sessions that the doors' trial made."""
    probed = f"{dumps.SESSION}{dumps.PROBED}:"
    return {**dump, "redis": {key: value for key, value in dump["redis"].items() if not key.startswith(probed)}}


def intents(case: dict[str, bytes]) -> list[str]:
    return [path for path, data in case.items() if "/journal/" in path and json.loads(data)["kind"] == "intent"]


def test_what_cannot_be_undone_is_what_is_listed(story: Story) -> None:
    reported = story.runs["real"].of("incident_info")[-1]["irreversible"]
    assert helpers.unlisted(reported) == []
    assert helpers.unreported(reported) == []


def test_the_release_tells_before_what_it_puts_back(story: Story) -> None:
    assert story.dumps["release check"] == story.dumps["check again"]
    assert story.cases["release check"] == story.cases["check again"]
    assert released(story.runs["release check"]) == released(story.runs["release"]) != []


def released(done: Run) -> list[Any]:
    return sorted(
        (result["invocation"]["module_args"]["host"], change["control"], change["action"], change["target"])
        for result in done.of("control_release")
        for change in result["changes"]
    )


def test_the_release_puts_everything_back(story: Story) -> None:
    before = dumps.but_for_what_is_final(story.dumps["before"], story.dumps["before"])
    after = dumps.but_for_what_is_final(story.dumps["release"], story.dumps["before"], everybody=True)
    for part in before:
        assert after[part] == before[part], part
    assert story.dumps["real"]["postgresql"] != story.dumps["before"]["postgresql"]
    assert story.dumps["real"]["edge"] != story.dumps["before"]["edge"]


def test_a_second_release_changes_nothing(story: Story) -> None:
    assert released(story.runs["release again"]) == []
    assert intents(story.cases["release again"]) == intents(story.cases["release"])
    assert _unprobed(story.dumps["release again"]) == _unprobed(story.dumps["release"])


def test_one_incident(story: Story) -> None:
    assert incidents(story.lab) == [story.runs["real"].incident]
