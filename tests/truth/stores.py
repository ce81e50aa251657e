# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Case stores that can be in trouble from any request on: a folder, and an S3 server behind a proxy that knows HTTP."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import email.utils
import http.client
import http.server
import json
import os
import resource
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import boto3

from ansible_collections.firebreak.incident.plugins.module_utils import _store
from lab.client import Lab

BUCKET = "cases"
SMALL = 64  # bytes: less than any entry


def first_number(kind: str) -> list[str]:
    """An incident that is taken, today and tomorrow: what one store's incidents mark in a service is not another's."""
    days = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=more) for more in (0, 1))
    return [f"{day:INC-%Y-%m%d}-{300 if kind == 'file' else 600}" for day in days]


class Place:
    """Where cases are kept. Trouble begins with a request and lasts until ``heal``, or is over after that request."""

    kind: ClassVar[str]
    troubles: ClassVar[tuple[str, ...]]
    uri: str

    def __init__(self) -> None:
        self.asked = 0
        self._lock = threading.Lock()
        self.heal()

    def heal(self) -> None:
        """No trouble any more; what is asked is counted anew."""
        self._trouble, self._from, self._lasts = "", 0, False
        self.asked = 0

    def trouble(self, kind: str, point: int = 1, lasts: bool = True) -> None:
        self.heal()
        self._trouble, self._from, self._lasts = kind, point, lasts

    def _now(self) -> str:
        """One more request: the trouble that it meets, if any."""
        with self._lock:
            self.asked += 1
            met = self.asked >= self._from if self._lasts else self.asked == self._from
            return self._trouble if met else ""

    def read(self, incident: str) -> dict[str, bytes]:
        """Everything that a case holds, by its place below the case, seen without the collection."""
        raise NotImplementedError

    def entries(self, incident: str) -> dict[str, list[dict[str, Any]]]:
        """The entries of each stream, in the order of their names; what lies in a blob is put back."""
        case = self.read(incident)
        found: dict[str, list[dict[str, Any]]] = {}
        for name in sorted(case):
            if name.startswith("journal/"):
                entry = json.loads(case[name])
                if set(entry["body"]) == {"blob"}:
                    entry["body"] = json.loads(case[f"blobs/{entry['body']['blob']}"])
                found.setdefault(name.split("/")[1], []).append(entry)
        return found

    def mirror(self, incident: str) -> None:
        """Bring the evidence to where rows look for it."""


# --- a folder


class Folder(Place):
    kind = "file"
    troubles = ("gone", "another file", "read only", "full")
    METHODS = ("names", "walk", "get", "create", "put_file", "replace", "size", "exclusive")

    def __init__(self, lab: Lab, name: str) -> None:
        self.folder = lab.dir / "stores" / name
        self.uri = f"file://{self.folder}"
        self._away = self.folder.with_name(f"{name}.away")
        for taken in first_number(self.kind):
            (self.folder / taken).mkdir(parents=True, exist_ok=True)
        super().__init__()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Every request to this store is counted, and meets its trouble."""
        real = {name: getattr(_store.FileStore, name) for name in self.METHODS}

        def between(call: Callable[..., Any]) -> Callable[..., Any]:
            def asked(store: Any, *rest: Any) -> Any:
                if store.folder != self.folder:
                    return call(store, *rest)
                met = self._now()
                self._begin(met)
                try:
                    with narrow() if met == "full" else contextlib.nullcontext():
                        return call(store, *rest)
                finally:
                    if not self._lasts:
                        self._end()

            return asked

        try:
            for name, method in real.items():
                setattr(_store.FileStore, name, between(method))
            yield
        finally:
            for name, method in real.items():
                setattr(_store.FileStore, name, method)
            self._end()

    def heal(self) -> None:
        super().heal()
        self._end()

    def _begin(self, kind: str) -> None:
        if kind in ("gone", "another file") and self.folder.is_dir():
            self.folder.rename(self._away)
            if kind == "another file":
                self.folder.write_text("somebody's")
        elif kind == "read only":
            for folder, _folders, _files in os.walk(self.folder):
                os.chmod(folder, 0o500)
            override(False)

    def _end(self) -> None:
        override(True)
        if self._away.is_dir():
            with contextlib.suppress(FileNotFoundError):
                self.folder.unlink()
            self._away.rename(self.folder)
        for folder, _folders, _files in os.walk(self.folder):
            os.chmod(folder, 0o700)

    def read(self, incident: str) -> dict[str, bytes]:
        case = self.folder / incident
        found = [path for path in case.rglob("*") if path.is_file() and "locks" not in path.parts]
        return {path.relative_to(case).as_posix(): path.read_bytes() for path in found}


@contextlib.contextmanager
def narrow() -> Iterator[None]:
    """The kernel refuses every write beyond a few bytes, as a full disk does (EFBIG, where that one says ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def override(may: bool) -> None:
    """Whether root may, in this thread, what a folder's mode forbids (CAP_DAC_OVERRIDE and _READ_SEARCH, in effect)."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("Ii", 0x20080522, 0)
    data = ctypes.create_string_buffer(24)
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    effective, permitted, *rest = struct.unpack("6I", data.raw)
    effective = effective | (permitted & 0b110) if may else effective & ~0b110
    if libc.capset(header, struct.pack("6I", effective, permitted, *rest)):
        raise OSError(ctypes.get_errno(), "capset")


# --- S3


class S3(Place):
    """The lab's S3 behind a proxy. ``clock`` is what its answers are ahead of our time."""

    kind = "s3"
    troubles = ("gone", "stalled", "500", "503", "expired", "lost answer", "read only", "full", "skewed")
    ANSWERS: ClassVar[dict[str, tuple[int, str]]] = {
        "500": (500, "InternalError"),
        "503": (503, "SlowDown"),
        "expired": (403, "ExpiredToken"),
        "read only": (403, "AccessDenied"),
        "full": (507, "XMinioStorageFull"),
        "skewed": (403, "RequestTimeTooSkewed"),
    }
    WRITES_ONLY = ("read only", "full", "lost answer")

    def __init__(self, lab: Lab, name: str) -> None:
        self._lab = lab
        self._prefix = name
        self.ahead = 0.0
        self._target = urllib.parse.urlsplit(lab.env["AWS_ENDPOINT_URL_S3"])
        self._server: http.server.ThreadingHTTPServer | None = None
        self.port = 0
        self._up()
        self.uri = f"s3://{BUCKET}/{name}?endpoint=http://127.0.0.1:{self.port}&lock_mode=GOVERNANCE&retention_days=1"
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=lab.env["AWS_ENDPOINT_URL_S3"],
            region_name="us-east-1",
            aws_access_key_id=lab.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=lab.env["AWS_SECRET_ACCESS_KEY"],
        )
        for taken in first_number(self.kind):
            self._client.put_object(Bucket=BUCKET, Key=f"{name}/{taken}/taken", Body=b"")
        super().__init__()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        yield

    def _up(self) -> None:
        if self._server is None:
            self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), _handler(self))
            self._server.daemon_threads = True
            self.port = self._server.server_port
            threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Nobody listens any more: a connection is refused."""
        with self._lock:
            server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    @property
    def is_down(self) -> bool:
        return self._server is None

    def heal(self) -> None:
        super().heal()
        self._up()

    def met(self, method: str) -> str:
        """The trouble of one more request. What keeps nobody from reading is met by a later write."""
        kind = self._now()
        return "" if kind in self.WRITES_ONLY and method != "PUT" else kind

    def forward(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, list[Any], bytes]:
        server = http.client.HTTPConnection(str(self._target.hostname), self._target.port, timeout=20)
        try:
            server.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                server.putheader(name, value)
            server.endheaders(body)
            answer = server.getresponse()
            content = answer.read()
            return answer.status, answer.getheaders(), content
        finally:
            server.close()

    def read(self, incident: str) -> dict[str, bytes]:
        start = f"{self._prefix}/{incident}/" if incident else f"{self._prefix}/"
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=start)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {
            key.removeprefix(start): bytes(self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
            for key in keys
        }

    def mirror(self, incident: str) -> None:
        if list((self._lab.dir / "run").glob(f"s3/**/{self._prefix}/{incident}")):
            return  # this server keeps its objects as files below the lab
        for name, data in self.read(incident).items():
            if name.startswith("evidence/"):
                copy = Path(self._lab.dir) / "mirror" / self._prefix / incident / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(data)


def _handler(place: S3) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kind = "gone" if place.is_down else place.met(self.command)
            if kind == "gone":
                place.down()
                return self.reset()
            if kind == "stalled":
                time.sleep(1)
                return self.reset()
            if kind in S3.ANSWERS:
                status, code = S3.ANSWERS[kind]
                content = b"" if self.command == "HEAD" else f"<Error><Code>{code}</Code></Error>".encode()
                return self.told(status, [("Content-Type", "application/xml")], content)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            answer = place.forward(self.command, self.path, headers, body)
            if kind == "lost answer":
                return self.reset()
            return self.told(*answer)

        def do_GET(self) -> None:
            self.answer()

        def do_PUT(self) -> None:
            self.answer()

        def do_HEAD(self) -> None:
            self.answer()

        def told(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "keep-alive"):
                    self.send_header(name, value)
            length = {name.lower(): value for name, value in headers}.get("content-length")
            self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(content)))
            self.send_header("Date", email.utils.formatdate(time.time() + place.ahead, usegmt=True))
            self.end_headers()
            self.wfile.write(content)

        def reset(self) -> None:
            with contextlib.suppress(OSError):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.rfile.close()
                self.connection.close()
            self.close_connection = True

        def finish(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                super().finish()

        def log_message(self, format: str, *words: Any) -> None:
            """Nobody reads it."""

    return Handler
