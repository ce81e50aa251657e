# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""An edge of a test module's own: the double as a process, and an application behind it."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TOKEN = "edge-token-of-the-tests"
ACCOUNT, ZONE = "a1" * 16, "b2" * 16


class Application(http.server.BaseHTTPRequestHandler):
    """Says whom it sees."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        given = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        seen = {"address": self.headers.get_all("CF-Connecting-IP"), "path": self.path, "body": given}
        body = json.dumps(seen).encode()
        self.send_response(201 if self.command == "POST" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def log_message(self, *_args: Any) -> None: ...


class Edge:
    def __init__(self, api: int, proxy: int) -> None:
        self.api, self.proxy = api, proxy
        self.url = f"http://127.0.0.1:{api}/client/v4"

    def raw(
        self, method: str, path: str, body: Any = None, token: str | None = f"Bearer {TOKEN}"
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.api, timeout=20)
        with contextlib.closing(connection):
            headers = {"Authorization": token} if token else {}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.headers), answer.read()

    def call(self, method: str, path: str, body: Any = None, **more: Any) -> tuple[int, dict[str, Any]]:
        """One request to the API: its status and envelope."""
        status, _headers, content = self.raw(method, f"/client/v4{path}", body, **more)
        return status, json.loads(content) if content else {}

    def lab(self, method: str, path: str, body: Any = None) -> Any:
        status, _headers, content = self.raw(method, f"/lab/{path}", body)
        assert status == 200, content
        return json.loads(content)

    def visit(
        self, source: str, path: str = "/", method: str = "GET", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """One request of a visitor to the application, through the edge."""
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy, timeout=20, source_address=(source, 0))
        with contextlib.closing(connection):
            connection.request(method, path, b"body" if method == "POST" else None, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.headers), answer.read()

    def writes(self) -> list[dict[str, Any]]:
        """What was sent to the API to change something, dry runs apart."""
        log = self.lab("GET", "log")
        return [each for each in log if each["method"] != "GET" and each["query"].get("dry_run") != "true"]

    def entries(self, name: str) -> dict[str, Any]:
        lists = {each["name"]: each for each in self.lab("GET", "dump")["lists"]}
        return {item["ip"]: item.get("comment") for item in lists[name]["items"]}

    def rules(self) -> list[dict[str, Any]]:
        return [rule for ruleset in self.lab("GET", "dump")["rulesets"] for rule in ruleset["rules"]]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def edge(*options: str) -> Iterator[Edge]:
    origin = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Application)
    threading.Thread(target=origin.serve_forever, daemon=True).start()
    given = Edge(free_port(), free_port())
    command = [
        sys.executable,
        "-m",
        "lab.doubles.cloudflare",
        "--port",
        str(given.api),
        "--proxy-port",
        str(given.proxy),
    ]
    command += ["--account-id", ACCOUNT, "--zone-id", ZONE, "--origin", f"http://127.0.0.1:{origin.server_port}"]
    process = subprocess.Popen(
        [*command, *options],
        cwd=ROOT,
        env={**os.environ, "LAB_CLOUDFLARE_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield given
    finally:
        process.terminate()
        process.wait(10)
        origin.shutdown()
        origin.server_close()
