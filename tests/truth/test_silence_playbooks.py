# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""No playbook shows a secret: run as AWX runs it, by ansible-runner, at -vvvv, with all that this leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lab.client import Lab
from tests.helpers_play import environment
from tests.helpers_search import CommandLines, Search
from tests.runs import extra, incidents
from tests.truth import FULL
from tests.truth.playbooks import SCENARIOS
from tests.truth.silence import surroundings, told_apart
from tests.truth.table import PLAYBOOKS
from tests.truth.test_silence import CANARY, Tell, known_secrets

SECONDS = 170
REAL = "for real"
WAYS = {
    REAL: {},
    "with wrong passwords": {
        "firebreak_postgresql_password": CANARY,
        "firebreak_redis_password": CANARY,
        "firebreak_vault_token": CANARY,
        "firebreak_cloudflare_token": CANARY,
    },
}
IN_CHECK_MODE = "in check mode"
CASES = [(playbook, way) for playbook in PLAYBOOKS for way in [*WAYS, IN_CHECK_MODE] if FULL or way == REAL]


@dataclasses.dataclass
class Told:
    """One finished run and all that it left."""

    folder: Path
    lines: CommandLines
    beside: bytes

    @property
    def run(self) -> Path:
        return self.folder / "artifacts" / "run"

    @property
    def tasks(self) -> int:
        events = (json.loads(path.read_text()) for path in self.run.glob("job_events/*.json"))
        return sum(event["event"] == "playbook_on_task_start" for event in events)


def perform(lab: Lab, playbook: str, way: str, folder: Path) -> Told:
    """ansible-runner, as AWX calls it, with its own callback; ours write beside it."""
    home = folder / "home"
    (home / "tmp").mkdir(parents=True)
    (home / "ansible.cfg").touch()
    (folder / "runner").mkdir()
    known = incidents(lab)
    incident = known[-1] if known else None
    words = [*SCENARIOS[playbook].words(incident), *extra(**WAYS.get(way, {}))]
    variables = {name: value for given in words if given != "-e" for name, value in json.loads(given).items()}
    check = ["--check"] if way == IN_CHECK_MODE else []
    told = environment(home) | surroundings(home) | {"HOME": str(home), "ANSIBLE_CALLBACKS_ENABLED": "witness,junit"}
    told["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    asked = {
        "private_data_dir": str(folder / "runner"),
        "artifact_dir": str(folder / "artifacts"),
        "ident": "run",
        "playbook": f"firebreak.incident.{playbook}",
        "inventory": str(lab.inventory_path),
        "extravars": variables,
        "cmdline": " ".join(["-vvvv", "--diff", *check]),
        "envvars": told,
        "quiet": True,
        "timeout": SECONDS,
        "fact_cache_type": "jsonfile",
    }
    command = [sys.executable, "-c", "import ansible_runner, json; ansible_runner.run(**json.loads(input()))"]
    with CommandLines() as lines:
        done = subprocess.run(
            command, input=json.dumps(asked).encode(), capture_output=True, timeout=2 * SECONDS, check=False
        )
    assert done.returncode == 0, done.stderr
    return Told(folder, lines, done.stdout + done.stderr)


@pytest.fixture(scope="module")
def runs(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Told]:
    """Every playbook once, what goes before another one before it, in one incident."""
    done: dict[tuple[str, str], Told] = {}

    def visit(playbook: str) -> None:
        for earlier in SCENARIOS[playbook].before:
            visit(earlier)
        for way in (IN_CHECK_MODE, "with wrong passwords", REAL):
            if (playbook, way) in CASES and (playbook, way) not in done:
                done[playbook, way] = perform(lab, playbook, way, tmp_path_factory.mktemp(playbook))

    with contextlib.chdir(tmp_path_factory.mktemp("here")):
        for playbook in PLAYBOOKS:
            visit(playbook)
    return done


@pytest.mark.parametrize(("playbook", "way"), CASES, ids=[f"{playbook} {way}" for playbook, way in CASES])
def test_no_secret_is_shown(
    lab: Lab, runs: dict[tuple[str, str], Told], playbook: str, way: str, record_property: Tell
) -> None:
    told = runs[playbook, way]
    if way == REAL:
        assert (told.run / "rc").read_text() == "0", (told.run / "stdout").read_text()[-4000:]

    def search(secrets: set[str]) -> Search:
        one = Search(secrets)
        one.look("ansible-runner", told.beside)
        for line in told.lines.seen:
            one.look("command line", line)
        for seen in told.lines.environments:
            one.look("environment", seen)
        one.look_below(told.folder, given_to(told.folder))
        one.look_below(lab.dir / "cases")
        return one

    # What is no secret is found by the same search, at each place.
    places, hits = told_apart(search, known_secrets(lab), {incidents(lab)[-1]})
    assert not hits, "\n".join(hits)
    wanted = {"/run/stdout:", "/job_events/", "/ansible.log:", "/witness.jsonl:", "/journal/", "command line:"}
    if way != IN_CHECK_MODE:
        assert {place for place in wanted if place not in places} == set()
    record_property("tried", told.tasks)


def given_to(folder: Path) -> list[Path]:
    """What was given to ansible-runner, and lies where it was given."""
    return [
        path for path in (folder / "runner").rglob("*") if re.search(r"/env/(extravars|cmdline|envvars)$", str(path))
    ]
