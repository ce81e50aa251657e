# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A running lab as its users see it: where things are, and what can be asked of it."""

from __future__ import annotations

import functools
import json
import shlex
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import LabError, directory, files
from .lock import Lock


class Actor:
    """The thief or the crowd: started and ended by request, and what it has seen so far."""

    def __init__(self, lab: Lab, name: str) -> None:
        self._lab = lab
        self.name = name

    def start(self) -> None:
        self._lab.ask("start", self.name)
        self._lab.until(lambda: bool(self.summary()), f"{self.name} does not begin")

    def stop(self) -> None:
        self._lab.ask("stop", self.name)

    def summary(self) -> dict[str, Any]:
        path = self._lab.dir / f"{self.name}.json"
        return files.read_json(path) if path.exists() else {}

    def records(self) -> list[dict[str, Any]]:
        path = self._lab.dir / f"{self.name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Lab:
    def __init__(self, path: Path | None = None) -> None:
        self.dir = path or directory()
        if Lock(self.dir).holder() is None or not (self.dir / "state.json").exists():
            raise LabError(f"no lab runs in {self.dir}: `python -m lab up` starts one")
        self.thief = Actor(self, "thief")
        self.crowd = Actor(self, "crowd")

    @property
    def state(self) -> dict[str, Any]:
        return dict(files.read_json(self.dir / "state.json"))

    @functools.cached_property
    def env(self) -> dict[str, str]:
        words = (shlex.split(line)[1] for line in (self.dir / "env").read_text().splitlines())
        return dict(word.split("=", 1) for word in words)

    @property
    def inventory_path(self) -> Path:
        return self.dir / "inventory.yml"

    @functools.cached_property
    def inventory(self) -> dict[str, Any]:
        import yaml

        return dict(yaml.safe_load(self.inventory_path.read_text()))

    def hostvars(self, host: str) -> dict[str, Any]:
        """The variables of a host, as Ansible would merge them."""
        everything = self.inventory["all"]
        for group in everything["children"].values():
            if host in group["hosts"]:
                return {**everything["vars"], **group.get("vars", {}), **group["hosts"][host]}
        raise LabError(f"no host {host} in this lab")

    @property
    def app_url(self) -> str:
        return self.env["LAB_APP_URL"]

    @property
    def app_direct_url(self) -> str:
        return str(self.state["parts"]["app"]["endpoint"])

    @functools.cached_property
    def users(self) -> list[dict[str, Any]]:
        """Each user's id, email and password."""
        return list(files.read_json(self.dir / "run" / "users.json"))

    @functools.cached_property
    def stolen(self) -> dict[str, str]:
        return dict(files.read_json(self.dir / "run" / "stolen.json"))

    def secrets(self) -> list[str]:
        """Values that must never be shown anywhere."""
        lines = (
            line
            for line in (self.dir / "app" / "app.env").read_text().splitlines()
            if "=" in line and not line.startswith("#")
        )
        values = {line.split("=", 1)[1] for line in lines} | set(self.stolen.values())
        values |= {
            self.env[name]
            for name in ("PGPASSWORD", "VAULT_TOKEN", "AWS_SECRET_ACCESS_KEY", "LAB_CLOUDFLARE_TOKEN")
            if name in self.env
        }
        for host in ("pg1", "cache1"):
            values |= {str(value) for name, value in self.hostvars(host).items() if name.endswith("_password")}
        return sorted(value for value in values if len(value) > 8)

    def ask(self, verb: str, part: str) -> None:
        """One request to the supervisor."""
        where = files.read_json(self.dir / "run" / "control.json")
        with socket.create_connection(("127.0.0.1", where["port"]), timeout=30) as connection:
            connection.sendall(json.dumps({"word": where["word"], "verb": verb, "part": part}).encode() + b"\n")
            answer = json.loads(connection.makefile().readline())
        if not answer["ok"]:
            raise LabError(answer["why"])

    def start(self, part: str) -> None:
        self.ask("start", part)

    def stop(self, part: str) -> None:
        self.ask("stop", part)

    def kill(self, part: str) -> None:
        self.ask("kill", part)

    def pause(self, part: str) -> None:
        self.ask("pause", part)

    def resume(self, part: str) -> None:
        self.ask("resume", part)

    def mark(self, name: str) -> None:
        """Note the moment: `start` and `end` of the response cut the thief's and the crowd's numbers."""
        path = self.dir / "marks.json"
        marks = files.read_json(path) if path.exists() else {}
        files.write_json(path, {**marks, name: time.time()})

    def until(self, condition: Callable[[], bool], what: str, patience: float = 15) -> None:
        end = time.monotonic() + patience
        while not condition():
            if time.monotonic() > end:
                raise LabError(f"{what} (after {patience:.0f} s)")
            time.sleep(0.02)
