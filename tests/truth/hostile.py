# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A server that talks too much: whatever it is asked, in HTTP, PostgreSQL's or Redis' words, it answers with a secret."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable
from typing import Self

SSL_REQUEST, GSS_REQUEST = 80877103, 80877104
STALLS = "no answer"
Answer = Callable[[str], bytes]


def _http(status: str, *headers: str, body: str = "") -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body.encode())}", "Connection: close", *headers]
    return ("\r\n".join(head) + "\r\n\r\n" + body).encode()


def _refusal(status: int) -> Answer:
    def answer(secret: str) -> bytes:
        body = {
            "success": False,
            "errors": [{"code": secret, "message": secret, "documentation_url": secret}],
            "messages": [{"message": secret}],
            "warnings": [secret],
            secret: secret,
        }
        return _http(
            f"{status} {secret}",
            f"Retry-After: {secret}",
            f"Location: http://127.0.0.1:9/{secret}",
            f"X-{secret.encode().hex()}: {secret}",
            body=json.dumps(body),
        )

    return answer


def _listed(secret: str) -> bytes:
    """Vault's way to say what is wrong."""
    return _http(f"400 {secret}", body=json.dumps({"errors": [secret]}))


def _success(content: object) -> Answer:
    def answer(secret: str) -> bytes:
        told = json.loads(json.dumps(content).replace("SECRET", json.dumps(secret)[1:-1]))
        return _http(f"200 {secret}", "Content-Type: application/json", body=json.dumps(told))

    return answer


HTTP: dict[str, Answer] = {
    **{f"status {status}": _refusal(status) for status in (301, 400, 401, 403, 404, 409, 412, 418, 429, 500, 503)},
    "a list of errors": _listed,
    "no HTTP": lambda secret: f"{secret}\r\n\r\n".encode(),
    "no status": lambda secret: f"HTTP/1.1 {secret}\r\n\r\n".encode(),
    "no header": lambda secret: f"HTTP/1.1 200 OK\r\n{secret}\r\nno header\r\n\r\n".encode(),
    "no length": lambda secret: f"HTTP/1.1 200 OK\r\nContent-Length: {secret}\r\n\r\n".encode(),
    "broken off": lambda secret: f"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n{secret}".encode(),
    "no compression": lambda secret: _http("200 OK", "Content-Encoding: gzip", body=secret),
    "no JSON": lambda secret: _http(f"200 {secret}", body=f"{{{secret}"),
    "a text": _success("SECRET"),
    "an empty answer": _success({"SECRET": "SECRET"}),
    "a text where there should be an object": _success({"success": True, "result": "SECRET", "data": "SECRET"}),
    "a list where there should be an object": _success({"success": True, "result": ["SECRET"], "data": ["SECRET"]}),
    "another object": _success({"success": True, "result": {"SECRET": "SECRET"}, "data": {"SECRET": "SECRET"}}),
}


def _message(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack(">I", len(content) + 4) + content


def _trouble(kind: bytes, state: str, secret: str) -> bytes:
    """An error or a notice with every field that there is."""
    fields = {"S": "FATAL", "V": "FATAL", "C": state, **dict.fromkeys("MDHWqstcdnFR", secret), "P": "1", "L": "1"}
    return _message(kind, b"".join(name.encode() + text.encode() + b"\0" for name, text in fields.items()) + b"\0")


READY = _message(b"R", struct.pack(">I", 0)) + b"".join(
    _message(b"S", f"{name}\0{value}\0".encode())
    for name, value in (("server_version", "18.0"), ("client_encoding", "UTF8"), ("standard_conforming_strings", "on"))
)
IDLE = _message(b"Z", b"I")
# At the login, or at the first statement; None: at the login it says yes.
POSTGRESQL: dict[str, tuple[str | None, str]] = {
    **{f"login {state}": (state, state) for state in ("28P01", "3D000", "53300", "XX000", "0A000")},
    **{f"statement {state}": (None, state) for state in ("22P02", "23505", "42501", "57014", "57P01", "P0001")},
}
REDIS: dict[str, Answer] = {
    "an error": lambda secret: f"-ERR {secret}\r\n".encode(),
    "an error of its own": lambda secret: f"-{secret} {secret}\r\n".encode(),
    "a word in capitals": lambda secret: f"-{secret.encode().hex().upper()} {secret}\r\n".encode(),
    "no permission": lambda secret: f"-NOPERM {secret}\r\n".encode(),
    "a wrong password": lambda secret: f"-WRONGPASS {secret}\r\n".encode(),
    "moved": lambda secret: f"-MOVED 1 {secret}:1\r\n".encode(),
    "a text": lambda secret: f"+{secret}\r\n".encode(),
    "no answer of its protocol": lambda secret: f"{secret}\r\n".encode(),
    "a list": lambda secret: f"*2\r\n+{secret}\r\n+{secret}\r\n".encode(),
}
# The ways of each service, by the option that says where it is.
WAYS = {
    "vault_url": HTTP,
    "cloudflare_url": HTTP,
    "postgresql_port": POSTGRESQL,
    "pgbouncer_port": POSTGRESQL,
    "redis_port": REDIS,
}


class Hostile:
    """Listens on loopback; answers every connection in one way, or not at all."""

    def __init__(self, secret: str, way: str = STALLS) -> None:
        self._secret = secret
        self.way = way
        self.asked = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_unused: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _unused = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            client.settimeout(60)
            while data := client.recv(65536):
                self.asked.set()
                if self.way == STALLS:
                    continue
                if self.way in POSTGRESQL:
                    if not self._postgresql(client, data):
                        return
                elif data.startswith(b"*"):
                    client.sendall(REDIS[self.way](self._secret))
                else:
                    client.sendall(HTTP[self.way](self._secret))
                    return

    def _postgresql(self, client: socket.socket, data: bytes) -> bool:
        at_login, at_statement = POSTGRESQL[self.way]
        if data[4:8] in (struct.pack(">I", SSL_REQUEST), struct.pack(">I", GSS_REQUEST)):
            client.sendall(b"N")
            return True
        notice = _trouble(b"N", "01000", self._secret)
        if at_login:
            client.sendall(_trouble(b"E", at_login, self._secret))
            return False
        if data[:1] == b"\0":  # a length, since a login has no kind
            client.sendall(READY + notice + IDLE)
        else:
            client.sendall(notice + _trouble(b"E", at_statement, self._secret) + IDLE)
        return True
