# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A double of Vault 1.21 for the lab: ``python -m lab.doubles.vault --port N``.

The root token comes from the environment (``VAULT_DEV_ROOT_TOKEN``). As in a dev server the store is in memory, the
server is unsealed and ``secret/`` is a versioned key-value mount. It says ``ready`` once it listens, and ends with its
parent.

Beside Vault's ``/v1/`` there is ``/lab/``:

* ``POST /lab/faults`` adds a fault, or a list of them; ``GET`` shows them, ``DELETE`` ends them all. Fields: ``method``
  and ``path`` (a regular expression, searched in path and query), ``nth`` (which matching request is the first to
  suffer; 1), ``times`` (how many; 1, and 0 for all that follow), ``do`` (``drop``, ``status`` or ``delay``), ``when``
  (``before`` or ``after`` the request has had its effect; after), ``status`` (500), ``location`` (of a 307),
  ``seconds`` (of a delay).
* ``GET /lab/log`` shows the requests so far, ``DELETE`` forgets them. Of a body it has an HMAC only, keyed with the root
  token.
* ``POST /lab/clock {"seconds": N}`` sets how far the server's time is ahead.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import hmac
import http.server
import json
import os
import posixpath
import re
import signal
import socketserver
import sys
import threading
import time
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from lab.doubles.vault_core import Core
from lab.doubles.vault_wire import SECOND

OPERATIONS = {
    "GET": "read",
    "HEAD": "header",
    "POST": "update",
    "PUT": "update",
    "DELETE": "delete",
    "LIST": "list",
    "PATCH": "patch",
}
MERGE_PATCH = "application/merge-patch+json"
PR_SET_PDEATHSIG = 1
TRUE, FALSE = ("1", "t", "T", "true", "TRUE", "True"), ("0", "f", "F", "false", "FALSE", "False", "")


class Bad(Exception):
    """A request that does not get as far as Vault's core."""

    def __init__(self, status: int, *errors: str) -> None:
        super().__init__(status)
        self.answer = (status, {"errors": list(errors)})


class Faults:
    """What goes wrong, and when."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rules: list[dict[str, Any]] = []

    def add(self, rule: dict[str, Any]) -> None:
        default = {"method": "", "path": "", "nth": 1, "times": 1, "when": "after", "status": 500, "seconds": 0.0}
        if unknown := set(rule) - {*default, "do", "location"}:
            raise Bad(400, f"unknown: {', '.join(sorted(unknown))}")
        if rule.get("do") not in ("drop", "status", "delay") or rule.get("when", "after") not in ("before", "after"):
            raise Bad(400, "do is drop, status or delay; when is before or after")
        with self.lock:
            self.rules.append(default | rule | {"seen": 0})

    def take(self, method: str, path: str) -> dict[str, Any] | None:
        """The fault that this request suffers. Every rule counts it."""
        hit = None
        with self.lock:
            for rule in self.rules:
                if rule["method"] in ("", method) and re.search(rule["path"], path):
                    rule["seen"] += 1
                    past = rule["seen"] - rule["nth"]
                    if past >= 0 and (not rule["times"] or past < rule["times"]):
                        hit = hit or rule
        return hit


class Server(socketserver.ThreadingTCPServer):
    """The sockets, the faults and the journal around one core."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], root_token: str, certificate: str | None = None) -> None:
        self.core = Core(root_token)
        self.faults = Faults()
        self.journal: list[dict[str, Any]] = []
        self.key = root_token.encode()
        super().__init__(address, Handler)
        if certificate:
            import ssl  # costs a plain start too much

            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news; anything else is a defect of the double."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body in one packet; the end of a request flushes
    server: Server

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if self.path.startswith("/lab/"):
                self.reply(*self.lab(body))
            elif elsewhere := self.elsewhere():
                self.reply(307, None, {"Location": elsewhere})
            else:
                self.vault(body)
        except Bad as bad:
            self.reply(*bad.answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_LIST = do_PATCH = do_OPTIONS = do_SCAN = serve

    def log_message(self, format: str, *args: Any) -> None:
        """What a client sends is nobody's to read."""

    def elsewhere(self) -> str | None:
        """Where the server redirects to before it looks at anything else: the clean path, or its user interface."""
        path = urlsplit(self.path).path
        clean = posixpath.normpath(path).replace("//", "/") + ("/" if path.endswith("/") and path != "/" else "")
        if not clean.startswith("/v1/"):
            return "/ui/"
        return clean if clean != path else None

    def vault(self, body: bytes) -> None:
        fault = self.server.faults.take(self.command, self.path) or {"do": "", "when": ""}
        entry = self.note(body, fault)
        if fault["do"] == "delay" and fault["when"] == "before":
            time.sleep(fault["seconds"])
        if fault["do"] in ("drop", "status") and fault["when"] == "before":
            answer = None
        else:
            answer = self.logical(body)
            entry["status"] = answer[0]
        if fault["do"] == "delay" and fault["when"] == "after":
            time.sleep(fault["seconds"])
        if fault["do"] == "drop":
            self.close_connection = True
        elif fault["do"] == "status":
            self.fail(fault)
        elif answer:
            self.reply(*answer)

    def note(self, body: bytes, fault: dict[str, Any]) -> dict[str, Any]:
        token = self.server.core.tokens.by_id.get(self.token())
        entry = {
            "time": time.time(),
            "method": self.command,
            "path": self.path,
            "accessor": token.accessor if token else None,
            "body": hmac.new(self.server.key, body, hashlib.sha256).hexdigest() if body else None,
            "correlation": self.headers.get("X-Correlation-Id"),
            "fault": f"{fault['do']} {fault['when']}".strip() or None,
            "status": None,  # what the core answered; None if it was not asked
        }
        self.server.journal.append(entry)
        return entry

    def token(self) -> str:
        bearer = self.headers.get("Authorization") or ""
        return self.headers.get("X-Vault-Token") or bearer.removeprefix("Bearer ").strip()

    def logical(self, body: bytes) -> tuple[int, dict[str, Any] | None]:
        try:
            operation, path, data = self.parsed(body)
        except Bad as bad:
            return bad.answer
        headers: dict[str, list[str]] = {}
        for name, value in self.headers.items():
            headers.setdefault(name.lower(), []).append(value)
        return self.server.core.handle(operation, path, data, self.token(), headers, self.client_address[0])

    def parsed(self, body: bytes) -> tuple[str, str, dict[str, Any]]:
        if self.command not in OPERATIONS:
            raise Bad(405)
        url = urlsplit(self.path)
        path, operation = unquote(url.path.removeprefix("/v1/")), OPERATIONS[self.command]
        query: dict[str, Any] = dict(parse_qsl(url.query, keep_blank_values=True))
        if operation == "read":
            listed = query.pop("list", "")
            if listed not in TRUE + FALSE:
                raise Bad(400)
            operation = "list" if listed in TRUE else "read"
        if operation == "list" and not path.endswith("/"):
            path += "/"
        return operation, path, self.payload(body) if operation in ("update", "patch") else query

    def payload(self, body: bytes) -> dict[str, Any]:
        if self.command == "PATCH":
            kind = (self.headers.get("Content-Type") or "").partition(";")[0].strip()
            if not kind:
                raise Bad(400, "mime: no media type")
            if kind != MERGE_PATCH:
                raise Bad(415, f"PATCH requires Content-Type of {MERGE_PATCH}, provided {kind}")
        if not body.strip():
            return {}
        try:
            data = json.loads(body)
        except ValueError:
            raise Bad(500, "error parsing JSON") from None
        if data is not None and not isinstance(data, dict):
            raise Bad(500, "error parsing JSON")
        return data or {}

    def fail(self, fault: dict[str, Any]) -> None:
        status = int(fault["status"])
        if status == 307:
            self.reply(307, None, {"Location": fault.get("location", "")})
        else:
            text = "1 error occurred:\n\t* the lab wants it so\n\n"
            if status == 503 and fault["when"] == "before":
                text = "Vault is sealed"  # which no server says after it has done something
            if status == 429:
                text = f'request path "{self.path}": rate limit quota exceeded'
            self.reply(status, {"errors": [text]}, {"Retry-After": "1"} if status == 429 else {})

    def reply(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        content = b"" if body is None else json.dumps(body).encode() + b"\n"
        self.send_response_only(status)
        self.send_header("Cache-Control", "no-store")
        if content:
            self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # --- /lab/

    def lab(self, body: bytes) -> tuple[int, Any]:
        server = self.server
        wanted = (self.command, self.path)
        if wanted == ("GET", "/lab/faults"):
            return 200, {"faults": server.faults.rules}
        if wanted == ("DELETE", "/lab/faults"):
            server.faults.rules = []
            return 204, None
        if wanted == ("GET", "/lab/log"):
            return 200, {"requests": server.journal}
        if wanted == ("DELETE", "/lab/log"):
            server.journal = []
            return 204, None
        if self.command == "POST":
            try:
                sent = json.loads(body)
            except ValueError:
                raise Bad(400, "not JSON") from None
            if self.path == "/lab/faults":
                for rule in sent if isinstance(sent, list) else [sent]:
                    server.faults.add(rule)
                return 204, None
            if self.path == "/lab/clock":
                server.core.clock.offset = int(float(sent["seconds"]) * SECOND)
                return 204, None
        raise Bad(404)


def end_with_parent() -> None:
    """Be killed when the thread that started this process ends; it may have ended before we could ask for that."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.doubles.vault", description="A double of Vault for the lab.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tls", default="no", metavar="no|FILE", help="a PEM file with certificate and key")
    args = parser.parse_args()
    root_token = os.environ.pop("VAULT_DEV_ROOT_TOKEN", "")
    if not root_token:
        parser.error("VAULT_DEV_ROOT_TOKEN is not set")
    signal.signal(signal.SIGTERM, lambda *_unused: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_unused: sys.exit(0))
    end_with_parent()
    with Server(("127.0.0.1", args.port), root_token, None if args.tls == "no" else args.tls) as server:
        print("ready", flush=True)
        server.serve_forever(poll_interval=60)


if __name__ == "__main__":
    main()
