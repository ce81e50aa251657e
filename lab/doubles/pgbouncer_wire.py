# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""PostgreSQL's protocol as far as a router needs it: messages, the beginning of a session, and SCRAM from both ends."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import secrets
import socket
import struct
from typing import Any

PROTOCOL = 196608
SSL_REQUEST, GSS_REQUEST = 80877103, 80877104
ITERATIONS = 4096
MECHANISM = b"SCRAM-SHA-256"


class Goodbye(Exception):
    """A refusal, in the router's own words or the server's."""

    def __init__(self, text: str, state: str = "08P01") -> None:
        super().__init__(text)
        self.text = text
        self.state = state


class Line:
    """Messages over one connection."""

    def __init__(self, reader: asyncio.StreamReader | None, writer: asyncio.StreamWriter | None) -> None:
        self._reader = reader
        self._writer = writer
        self.closed = False
        self.taken: list[tuple[bytes, bytes]] = []
        self.peer: list[Any] = list(writer.get_extra_info("peername")[:2]) if writer else []
        if writer:
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @classmethod
    async def open(cls, host: str, port: int) -> Line:
        return cls(*await asyncio.open_connection(host, port))

    @classmethod
    def captured(cls) -> Line:
        """What is sent to it is kept in ``taken``."""
        return cls(None, None)

    async def read(self) -> tuple[bytes, bytes]:
        if self._reader is None:
            raise EOFError
        head = await self._reader.readexactly(5)
        return head[:1], await self._reader.readexactly(struct.unpack("!I", head[1:])[0] - 4)

    async def startup(self) -> dict[str, str]:
        if self._reader is None:
            raise EOFError
        while True:
            length, code = struct.unpack("!II", await self._reader.readexactly(8))
            body = await self._reader.readexactly(length - 8)
            if code in (SSL_REQUEST, GSS_REQUEST):
                self.send_raw(b"N")
            elif code == PROTOCOL:
                words = body.decode().split("\0")
                return {name: value for name, value in zip(words[0::2], words[1::2], strict=False) if name}
            else:
                raise EOFError

    def send(self, kind: bytes, body: bytes) -> None:
        if self._writer is None:
            self.taken.append((kind, body))
        else:
            self.send_raw(message(kind, body))

    def send_raw(self, data: bytes) -> None:
        if self._writer is not None and not self.closed:
            self._writer.write(data)

    async def drain(self) -> None:
        if self._writer is not None:
            await self._writer.drain()

    def close(self) -> None:
        self.closed = True
        if self._writer is not None:
            self._writer.close()


def message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


def error(severity: str, text: str, state: str) -> bytes:
    fields = (("S", severity), ("V", severity), ("C", state), ("M", text))
    return b"".join(f"{name}{value}\0".encode() for name, value in fields) + b"\0"


def told(body: bytes) -> dict[str, str]:
    """The fields of an error."""
    return {field[:1].decode(): field[1:].decode() for field in body.split(b"\0") if field}


def parameters(values: dict[str, str]) -> bytes:
    statuses = (message(b"S", f"{name}\0{value}\0".encode()) for name, value in values.items())
    return message(b"R", struct.pack("!I", 0)) + b"".join(statuses)


def row_description(columns: list[tuple[str, int]], values: list[list[Any]]) -> bytes:
    """A whole answer but for its end."""
    heads = (
        name.encode() + b"\0" + struct.pack("!IhIhih", 0, 0, kind, 4 if kind == 23 else -1, -1, 0)
        for name, kind in columns
    )
    lines = [message(b"T", struct.pack("!h", len(columns)) + b"".join(heads))]
    for line in values:
        cells = (b"\xff\xff\xff\xff" if cell is None else _sized(str(cell).encode()) for cell in line)
        lines.append(message(b"D", struct.pack("!h", len(line)) + b"".join(cells)))
    return b"".join(lines)


def _sized(data: bytes) -> bytes:
    return struct.pack("!I", len(data)) + data


def rows(body: bytes) -> list[str | None]:
    """The cells of a DataRow."""
    found: list[str | None] = []
    place = 2
    for _unused in range(struct.unpack("!h", body[:2])[0]):
        length = struct.unpack("!i", body[place : place + 4])[0]
        place += 4
        found.append(None if length < 0 else body[place : place + length].decode())
        place += max(length, 0)
    return found


# --- SCRAM


def _hmac(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def _pairs(text: str) -> dict[str, str]:
    return {part[:1]: part[2:] for part in text.split(",")}


class Scram:
    """What it takes to log in to a server: a password, or the key that a client's own login has shown."""

    def __init__(self, password: str = "", key: bytes = b"") -> None:
        self._password = password
        self._key = key

    def key(self, salt: bytes, iterations: int) -> bytes:
        if self._key:
            return self._key
        return _hmac(hashlib.pbkdf2_hmac("sha256", self._password.encode(), salt, iterations), b"Client Key")


class Verifier:
    """What is known of a user's password: itself, or the server's secret."""

    def __init__(self, secret: str) -> None:
        self._password = ""
        if secret.startswith("SCRAM-SHA-256$"):
            head, keys = secret.removeprefix("SCRAM-SHA-256$").split("$")
            iterations, salt = head.split(":")
            self._salt, self._iterations = base64.b64decode(salt), int(iterations)
            self._stored, self._server = (base64.b64decode(key) for key in keys.split(":"))
        else:
            self._password = secret
            self._salt, self._iterations = secrets.token_bytes(16), ITERATIONS
            salted = hashlib.pbkdf2_hmac("sha256", secret.encode(), self._salt, ITERATIONS)
            self._stored = hashlib.sha256(_hmac(salted, b"Client Key")).digest()
            self._server = _hmac(salted, b"Server Key")

    async def check(self, line: Line, known: bool) -> Scram:
        """The server's side. An unknown user is led through it all the same, and refused at its end."""
        line.send(b"R", struct.pack("!I", 10) + MECHANISM + b"\0\0")
        _kind, body = await line.read()
        name, _nul, rest = body.partition(b"\0")
        first = rest[4:].decode()
        bare = first.split(",", 2)[2]
        nonce = _pairs(bare)["r"] + secrets.token_urlsafe(18)
        salt = base64.b64encode(self._salt).decode()
        challenge = f"r={nonce},s={salt},i={self._iterations}"
        line.send(b"R", struct.pack("!I", 11) + challenge.encode())
        _kind, body = await line.read()
        final = body.decode()
        without, _comma, proof = final.rpartition(",p=")
        text = f"{bare},{challenge},{without}".encode()
        key = _xor(base64.b64decode(proof), _hmac(self._stored, text))
        right = hmac.compare_digest(hashlib.sha256(key).digest(), self._stored)
        if name != MECHANISM or not known or not right or _pairs(without)["r"] != nonce:
            raise Goodbye("SASL authentication failed", "28P01")
        signature = base64.b64encode(_hmac(self._server, text)).decode()
        line.send(b"R", struct.pack("!I", 12) + f"v={signature}".encode())
        return Scram(self._password, b"" if self._password else key)


async def login(line: Line, asked: dict[str, str], proof: Scram | None) -> bytes:
    """The client's side, to the end of the server's greeting, which is returned."""
    words = b"".join(f"{name}\0{value}\0".encode() for name, value in asked.items())
    line.send_raw(struct.pack("!II", len(words) + 9, PROTOCOL) + words + b"\0")
    nonce = secrets.token_urlsafe(18)
    bare, text = f"n=,r={nonce}", b""
    greeting = b""
    while True:
        kind, body = await line.read()
        if kind == b"E":
            line.close()
            fields = told(body)
            raise Goodbye(f"server login failed: {fields.get('S', '')} {fields.get('M', '')}")
        if kind == b"R":
            stage = struct.unpack("!I", body[:4])[0]
            if stage == 10:
                first = f"n,,{bare}".encode()
                line.send(b"p", MECHANISM + b"\0" + struct.pack("!I", len(first)) + first)
                continue
            if stage == 11:
                challenge = body[4:].decode()
                pairs = _pairs(challenge)
                key = (proof or Scram()).key(base64.b64decode(pairs["s"]), int(pairs["i"]))
                without = f"c=biws,r={pairs['r']}"
                text = f"{bare},{challenge},{without}".encode()
                sign = base64.b64encode(_xor(key, _hmac(hashlib.sha256(key).digest(), text))).decode()
                line.send(b"p", f"{without},p={sign}".encode())
                continue
            if stage == 12:
                continue
            if stage:
                raise Goodbye("server login failed: unknown authentication")
        greeting += message(kind, body)
        if kind == b"Z":
            return greeting
