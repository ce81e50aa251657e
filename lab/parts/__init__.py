# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The parts of the lab, one file each: how it starts, and what it holds at the start."""

from __future__ import annotations

import dataclasses
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from ..process import Port, Process

CROWD_SIZE = 6
USERS = 200
STAFF = 1  # the responders' own account
STOLEN_FROM = (11, 12)  # whose refresh tokens the thief holds, one for each way in
AFFECTED_USERS = (11, 12, 13)


def token() -> str:
    return secrets.token_urlsafe(24)


def _secrets() -> dict[str, str]:
    names = (
        "postgres",
        "firebreak",
        "app",
        "reporting",
        "repl",
        "analyst",
        "batch",
        "pooler",
        "redis",
        "redis_app",
        "vault",
    )
    values = {name: token() for name in names}
    values |= {name: token() for name in ("cloudflare", "s3_key", "s3_secret", "bot", "sentry")}
    return values | {"jwt": secrets.token_hex(32), "webhook": secrets.token_hex(32)}


@dataclasses.dataclass
class Site:
    """One run of the lab: its places, its secrets (new at each start), its ports and its processes."""

    dir: Path
    secrets: dict[str, str] = dataclasses.field(default_factory=_secrets)
    ports: dict[str, Port] = dataclasses.field(default_factory=dict)
    processes: dict[str, Process] = dataclasses.field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    began: float = dataclasses.field(default_factory=time.monotonic)
    people: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    cloudflare_account_id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(16))
    cloudflare_zone_id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(16))

    @property
    def run(self) -> Path:
        return self.dir / "run"

    @property
    def app_dir(self) -> Path:
        return self.dir / "app"

    def log(self, name: str) -> Path:
        return self.dir / "log" / f"{name}.log"

    def port(self, name: str) -> int:
        if name not in self.ports:
            self.ports[name] = Port()
        return self.ports[name].number

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port(name)}"

    def process(self, name: str, command: list[str], **options: Any) -> Process:
        self.processes[name] = Process(name, command, self.log(name), **options)
        return self.processes[name]

    def python(self, name: str, *words: str, **options: Any) -> Process:
        return self.process(name, [sys.executable, "-m", *words], **options)

    def ready(self, name: str, kind: str, version: str, endpoint: str, **more: Any) -> None:
        """The part is up: what it is, and how long that took."""
        after = round(time.monotonic() - self.began, 2)
        pid = self.processes[name].pid if name in self.processes else None
        self.parts[name] = {
            "kind": kind,
            "version": version,
            "endpoint": endpoint,
            "pid": pid,
            "status": "up",
            "ready_after": after,
            **more,
        }

    def left_out(self, name: str, why: str) -> None:
        self.parts[name] = {"kind": "left out", "why": why, "pid": None, "status": "left out"}
