# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The two servers that the Vault contract tests ask: the lab's double, and the real one where it can be had."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab import real

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Reply:
    status: int
    body: Any  # None if there was none, or no JSON
    headers: dict[str, str]


@dataclass
class Server:
    """A running server, spoken to without any SDK."""

    port: int
    token: str
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: Any = None, token: str | None = None, headers: dict[str, str] | None = None
    ) -> Reply:
        """One request on a connection of its own; ``body`` goes out as JSON, bytes as they are."""
        sent = {"X-Vault-Token": self.token if token is None else token, **(headers or {})}
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, content, {name: value for name, value in sent.items() if value})
            answer = connection.getresponse()
            text = answer.read()
            is_json = answer.headers.get_content_type() == "application/json"
            return Reply(answer.status, json.loads(text) if text and is_json else None, dict(answer.headers))
        finally:
            connection.close()

    def fault(self, **rule: Any) -> None:
        """The next matching request suffers (the double only)."""
        assert self.ask("POST", "/lab/faults", rule).status == 204

    def log(self) -> list[dict[str, Any]]:
        requests: list[dict[str, Any]] = self.ask("GET", "/lab/log").body["requests"]
        return requests


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def double() -> Iterator[Server]:
    token, port = secrets.token_hex(16), free_port()
    with subprocess.Popen(
        [sys.executable, "-m", "lab.doubles.vault", "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, "VAULT_DEV_ROOT_TOKEN": token},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout and process.stdout.readline() == "ready\n"
            yield Server(port, token, process)
        finally:
            process.terminate()


@contextlib.contextmanager
def real_vault(home: Path) -> Iterator[Server]:
    """A dev server in a session of its own, so that its plugins end with it."""
    program = real.find("vault")
    if program is None:
        missing = "the real Vault is not here (`make real` builds it): its half of the contract was not run"
        if "vault" in os.environ.get("FIREBREAK_REAL", "").replace(",", " ").split():
            pytest.fail(missing)
        pytest.skip(missing)
    token, port = secrets.token_hex(16), free_port()
    with (home / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [str(program), "server", "-dev", f"-dev-listen-address=127.0.0.1:{port}", "-dev-no-store-token"],
            env={"PATH": os.environ["PATH"], "HOME": str(home), "VAULT_DEV_ROOT_TOKEN_ID": token},
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    server = Server(port, token, process)
    try:
        _wait(server, home / "log")
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(server: Server, log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(OSError):
            # Active comes before the mount of `secret/`.
            if server.ask("GET", "/v1/secret/config").status == 200:
                return
        time.sleep(0.05)
    pytest.fail(f"the real Vault does not start: {log.read_text(encoding='utf-8')[-500:]}")
