# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Playbooks as a user runs them, and what they leave in the case."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab import ROOT
from lab.client import Lab
from tests.conftest import end_lab, start_lab

PROGRAM = Path(sys.executable).parent / "ansible-playbook"
PATIENCE = 180
NOTHING = "INC-0000-0000-000"
CONTROLS = "firebreak.incident."


@contextlib.contextmanager
def lab_in(folder: Path, *options: str) -> Iterator[Lab]:
    """A lab of one test's own."""
    process = start_lab(folder, *options)
    try:
        yield Lab(folder)
    finally:
        end_lab(process)


@dataclasses.dataclass
class Run:
    """One finished run: what was on the screen, and each task's result."""

    code: int
    output: str
    record: Path
    seconds: float

    @functools.cached_property
    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.record.read_text().splitlines()] if self.record.exists() else []

    @property
    def incident(self) -> str:
        found = {line["result"]["incident_id"] for line in self.results if line["result"].get("incident_id")}
        assert len(found) == 1, (found, self.output)
        return str(found.pop())

    def of(self, control: str) -> list[dict[str, Any]]:
        return [line["result"] for line in self.results if line["action"] == CONTROLS + control]

    def changes(self, planned: bool) -> dict[tuple[str, str], list[tuple[str, str]]]:
        """What each control changed on each host, or would have; an incident's id and a moment are taken out."""
        found: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for line in self.results:
            result = line["result"]
            if "outcome" in result and (result["outcome"] == "planned") == planned:
                for change in result.get("changes", []):
                    host = (line["result"].get("invocation") or {}).get("module_args", {}).get("host") or line["host"]
                    entry = (change["action"], neutral(change["target"]))
                    found.setdefault((host, line["action"]), []).append(entry)
        return {key: sorted(set(entries)) for key, entries in sorted(found.items())}

    @property
    def screen(self) -> str:
        """The closing screen."""
        return self.output.rsplit("PLAY [Data breach | Show what was done", 1)[-1]

    @property
    def open(self) -> set[str]:
        """The hosts that the closing screen names as not contained."""
        if "NOT CONTAINED" not in self.screen:
            return set()
        part = self.screen.split("NOT CONTAINED", 1)[1].split("\n\n", 1)[0]
        return {line.split()[0] for line in part.splitlines()[1:] if line.startswith("  ")}

    @property
    def expect(self) -> str:
        return re.findall(r"firebreak_expect=([0-9a-f]{64})", self.output)[-1]


def neutral(text: str) -> str:
    text = re.sub(r"INC-\d{4}-\d{4}-\d{3}", "INC", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "<time>", text)
    return re.sub(r"(firebreak:revocation:INC/\d+:)[0-9a-f]+", r"\1<digest>", text)


def start(lab: Any, playbook: str, *words: str, inventory: Path | None = None, **env: str) -> tuple[Any, Path]:
    """The command, in a process group of its own, with a home of its own."""
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=lab.dir.parent))
    record = folder / "record.jsonl"
    home = Path(env.pop("HOME", "") or lab.dir.parent / "home")
    home.mkdir(exist_ok=True)
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR", "VIRTUAL_ENV") if name in os.environ}
    surroundings = {
        **kept,
        "HOME": str(home),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_CALLBACK_PLUGINS": str(ROOT / "tests" / "callbacks"),
        "ANSIBLE_CALLBACKS_ENABLED": "recorded",
        "TEST_RECORD": str(record),
        **env,
    }
    command = [str(PROGRAM), "-i", str(inventory or lab.inventory_path), f"{CONTROLS}{playbook}", *words]
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=surroundings,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process, record


def finish(process: Any, record: Path, began: float) -> Run:
    try:
        code = process.wait(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        kill(process)
        raise AssertionError((record.parent / "output").read_text()[-4000:]) from None
    return Run(code, (record.parent / "output").read_text(), record, time.monotonic() - began)


def run(lab: Any, playbook: str, *words: str, **env: Any) -> Run:
    began = time.monotonic()
    return finish(*start(lab, playbook, *words, **env), began)


def kill(process: Any) -> None:
    """kill -9 of the whole group."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def extra(**values: Any) -> tuple[str, str]:
    return "-e", json.dumps(values)


def glass(*guards: str, day: int = 0) -> list[dict[str, str]]:
    date = datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=day)
    return [{"guard": guard, "reason": "a test", "date": date.isoformat()} for guard in guards]


def entries(lab: Any, incident: str = "INC-*", kind: str | None = None) -> list[dict[str, Any]]:
    """The entries of a case on disk."""
    paths = sorted((lab.dir / "cases").glob(f"{incident}/journal/*/*.json"))
    found = [json.loads(path.read_text()) for path in paths]
    return [entry for entry in found if kind is None or entry["kind"] == kind]


def incidents(lab: Any) -> list[str]:
    return sorted(path.name for path in (lab.dir / "cases").glob("INC-*"))
