# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the tests of a rotation need around Vault: a proxy that makes one request fail, and a consumer of the secret."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import http.server
import json
import os
import signal
import subprocess
import threading
import urllib.parse
from collections.abc import Callable
from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils._control import Context

FAULTS = ("refused", "lost", "failed after", "redirected after", "killed before", "killed after")


class _Quiet(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, status: int, content: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


class _Served:
    """An HTTP server in a thread."""

    def __init__(self, handler: type[_Quiet]) -> None:
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.server.owner = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> Any:
        self.thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Forward(_Quiet):
    def forward(self) -> None:
        proxy, body = self.server.owner, self.body()
        fault = proxy.count(self.command, self.path)
        self.close_connection = fault is not None
        if fault == "killed before":
            proxy.kill()
        if fault in ("refused", "killed before"):
            return
        status, headers, content = proxy.ask(self.command, self.path, body, dict(self.headers))
        if fault == "killed after":
            proxy.kill()
        elif fault == "failed after":
            self.reply(500, b'{"errors":["1 error occurred"]}')
        elif fault == "redirected after":
            self.reply(307, Location=f"{proxy.url}/elsewhere")
        elif fault is None:
            self.reply(status, content, headers.get("Content-Type", "application/json"))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self.forward
        raise AttributeError(name)


class FaultProxy(_Served):
    """Stands before Vault and counts the requests; the n-th one suffers."""

    def __init__(self, port: int) -> None:
        super().__init__(_Forward)
        self.port = port
        self.arm(0, "")

    def arm(self, number: int, fault: str) -> None:
        self.seen: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.number, self.fault = number, fault
        self.victim: int | None = None

    def count(self, method: str, path: str) -> str | None:
        self.seen.append((method, path))
        return self.fault if len(self.seen) == self.number else None

    def kill(self) -> None:
        if self.victim is not None:
            os.kill(self.victim, signal.SIGKILL)

    def ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, Any, bytes]:
        self.headers.append(headers)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, body, {**headers, "Connection": "close"})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()


class _Consumer(_Quiet):
    def do_GET(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        if self.server.owner.unavailable:
            self.server.owner.unavailable -= 1
            self.reply(503)
        elif parts.path == "/internal/secret-proof":
            value = self.server.owner.values[query["name"]].encode()
            digest = hmac.new(value, bytes.fromhex(query["nonce"]), hashlib.sha256).hexdigest()
            self.reply(200, json.dumps({"hmac": digest}).encode())
        elif parts.path == "/elsewhere":
            self.reply(307, Location="/internal/secret-proof")
        else:
            self.reply(200 if self._token_is_good() else 401)

    def _token_is_good(self) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        signed, _dot, signature = token.rpartition(".")
        wanted = hmac.new(self.server.owner.values["JWT_SECRET"].encode(), signed.encode(), hashlib.sha256).digest()
        return hmac.compare_digest(base64.urlsafe_b64encode(wanted).rstrip(b"=").decode(), signature)

    def do_POST(self) -> None:
        wanted = hmac.new(self.server.owner.values["WEBHOOK_SECRET"].encode(), self.body(), hashlib.sha256).hexdigest()
        self.reply(200 if hmac.compare_digest(wanted, self.headers.get("X-Signature") or "") else 401)


class Consumer(_Served):
    """An application that works with the values that it was given last."""

    def __init__(self) -> None:
        super().__init__(_Consumer)
        self.values: dict[str, str] = {}
        self.unavailable = 0  # so many GETs


class LocalHost:
    """A host whose connection is a shell beside us. ``shown`` is what Ansible shows of it at -vvv."""

    remote = False

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.bytes_that_arrive = -1
        self.path = os.environ["PATH"]

    def run(self, command: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        if self.bytes_that_arrive >= 0:
            stdin = stdin[: self.bytes_that_arrive]
        words = ["/bin/sh", "-c", command]
        env = {**os.environ, "PATH": self.path}
        done = subprocess.run(words, input=stdin, capture_output=True, check=False, timeout=20, env=env)
        self.shown += [command, done.stdout.decode(), done.stderr.decode()]
        return done.returncode, done.stdout, done.stderr


def carry_out(control: Any, params: dict[str, Any], context: Context, stop: Callable[[Any], None] | None = None) -> Any:
    """What the engine does with a control, without case and guards. Returns the plan that was carried out."""
    client = control.service.connect(params, context)
    try:
        plan = control.plan(params, control.read(client, params))
        assert not control.plan(params, plan.after).changes
        for change in plan.changes:
            if stop:
                stop(change)
            control.apply(client, params, change)
            if control.prove:
                control.prove(client, params, change)
        left = control.plan(params, control.read(client, params))
        assert not left.changes, [change.summary() for change in left.changes]
        assert left.after == plan.after
        return plan
    finally:
        client.close()


def predict(control: Any, params: dict[str, Any], context: Context) -> Any:
    client = control.service.connect(params, context)
    try:
        return control.plan(params, control.read(client, params))
    finally:
        client.close()
