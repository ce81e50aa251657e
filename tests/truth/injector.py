# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Between a client and a real server, knowing where a request begins and ends: the n-th one suffers what a test asks for.

``lab.tcp_proxy`` breaks connections by bytes; here the server can have done what it was asked for before its answer is lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import http.client
import ipaddress
import json
import re
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

LINGER_RESET = struct.pack("ii", 1, 0)
LONGEST_HANG = 60.0


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to a request. ``then`` says what becomes of the connection: stay, close, reset or hang."""

    name: str
    answer: bytes | None = None  # instead of the server's
    reaches: bool = False  # the server does it before
    then: str = "stay"
    cut: bool = False  # half of the server's answer
    half: bool = False  # the server gets half of what a bulk lists
    stale: int = 0  # so many times each later read still shows what it showed before
    times: int | None = 1  # how many requests suffer; None: all from there on
    on: str = ""  # writes, or a regular expression for the request's name
    seconds: float = 1.0  # that the run has

    def fits(self, request: Request) -> bool:
        return request.writes if self.on == "writes" else re.search(self.on, request.name) is not None

    @property
    def spares(self) -> bool:
        """Whether the request surely has no effect."""
        return not (self.reaches or self.cut or self.half or self.stale)


@dataclasses.dataclass
class Request:
    name: str
    writes: bool
    reached: bool = False
    well: bool = False  # the server says that it did it


class Injector:
    """Listens on loopback; a subclass knows the protocol."""

    def __init__(self, target: tuple[str, int], tls: ssl.SSLContext | None = None) -> None:
        self.target = target
        self.tls = tls
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])
        self.arm(None)
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.arm(None)
        self._ended.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def arm(self, fault: Fault | None, first: int = 1) -> None:
        """Count from here; the fault meets the first request from this number on that it fits. Whoever hangs is let go."""
        with self._lock:
            if hasattr(self, "let_go"):
                self.let_go.set()
            self.let_go = threading.Event()
            self.fault, self.first, self.hits = fault, first, 0
            self.seen: list[Request] = []

    def meet(self, name: str, writes: bool) -> tuple[Request, Fault | None]:
        request = Request(name, writes)
        with self._lock:
            self.seen.append(request)
            fault = self.fault
            if fault is None or len(self.seen) < self.first or not fault.fits(request):
                return request, None
            if fault.times is not None and self.hits >= fault.times:
                return request, None
            self.hits += 1
            return request, fault

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client, _address = self._listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        # What a client sends that speaks another protocol is a ValueError.
        with (
            contextlib.suppress(OSError, EOFError, ValueError, http.client.HTTPException),
            contextlib.ExitStack() as stack,
        ):
            stack.callback(client.close)
            self.converse(client, stack)

    def converse(self, client: socket.socket, stack: contextlib.ExitStack) -> None:
        raise NotImplementedError

    def connected(self, stack: contextlib.ExitStack) -> socket.socket:
        server = socket.create_connection(self.target, 10)
        server.settimeout(None)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stack.callback(server.close)
        return server

    def suffer(self, client: socket.socket, fault: Fault, answer: bytes) -> None:
        """Send what the fault leaves of the answer. An OSError ends the connection."""
        let_go = self.let_go
        if fault.answer is not None:
            client.sendall(fault.answer)
        elif fault.cut:
            client.sendall(answer[: len(answer) // 2])
        elif fault.half or fault.stale:
            client.sendall(answer if fault.then == "stay" else b"")
        if fault.then == "hang":
            let_go.wait(LONGEST_HANG)
        if fault.then == "reset":
            reset(client)
        if fault.then != "stay":
            raise OSError

    def secured(self, client: socket.socket, stack: contextlib.ExitStack) -> socket.socket:
        if self.tls is None:
            return client
        wrapped = self.tls.wrap_socket(client, server_side=True)
        stack.callback(wrapped.close)
        return wrapped


def reset(end: socket.socket) -> None:
    """A reset instead of a goodbye."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        end.shutdown(socket.SHUT_RD)
    end.close()


# --- HTTP


def http_answer(status: int, body: Any = b"", kind: str = "application/json", **headers: str) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Content-Type": kind, "Content-Length": str(len(content)), **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} -\r\n{head}\r\n".encode() + content


class HttpInjector(Injector):
    """Requests that only ask are GET, HEAD and LIST, and what ``asks`` names."""

    def __init__(self, target: tuple[str, int], tls: ssl.SSLContext | None = None, asks: str = "$^") -> None:
        self._asks = re.compile(asks)
        self._known: dict[str, bytes] = {}
        self._stale: dict[str, int] = {}
        super().__init__(target, tls)

    def arm(self, fault: Fault | None, first: int = 1) -> None:
        super().arm(fault, first)
        self._known, self._stale = {}, {}

    def converse(self, client: socket.socket, stack: contextlib.ExitStack) -> None:
        client = self.secured(client, stack)
        lines = client.makefile("rb")
        while head := lines.readline().split():
            method, path = head[0].decode(), head[1].decode()
            headers = dict(http.client.parse_headers(lines))
            body = lines.read(int(headers.get("Content-Length") or 0))
            writes = method not in ("GET", "HEAD", "LIST") and not self._asks.search(path)
            request, fault = self.meet(f"{method} {path}", writes)
            if fault is None:
                client.sendall(self._plainly(request, method, path, headers, body))
                continue
            answer = b""
            if not fault.spares:
                answer = self._forward(request, method, path, headers, halved(body) if fault.half else body)
                self._stale = dict.fromkeys(self._known, fault.stale)
            self.suffer(client, fault, answer)

    def _plainly(self, request: Request, method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
        if self._stale.get(path):
            self._stale[path] -= 1
            return self._known[path]
        answer = self._forward(request, method, path, headers, body)
        if not request.writes:
            self._known[path] = answer
        return answer

    def _forward(self, request: Request, method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
        request.reached = True
        connection = http.client.HTTPConnection(*self.target, timeout=10)
        try:
            kept = {
                name: value for name, value in headers.items() if name.lower() not in ("content-length", "connection")
            }
            connection.request(method, path, body or None, {**kept, "Connection": "close"})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        request.well = answer.status < 400
        known = {name: answer.headers[name] for name in ("Location", "Retry-After") if name in answer.headers}
        kind = answer.headers.get("Content-Type", "application/json")
        return http_answer(answer.status, content, kind, **{name.replace("-", "_"): known[name] for name in known})


def halved(body: bytes) -> bytes:
    """A bulk with half of its elements: a list, or a list named items."""
    given = json.loads(body)
    if isinstance(given, list):
        return json.dumps(given[: len(given) // 2]).encode()
    return json.dumps({**given, "items": given["items"][: len(given["items"]) // 2]}).encode()


# --- PostgreSQL

READY, ENDED = b"Z", b"X"
SSL_REQUEST, GSS_REQUEST = 80877103, 80877104
WRITING = re.compile(r"ALTER|pg_terminate_backend|pg_reload_conf", re.IGNORECASE)


def postgresql_error(code: str, text: str = "canary of a server's text", fatal: bool = False) -> bytes:
    severity = "FATAL" if fatal else "ERROR"
    fields = {"S": severity, "V": severity, "C": code, "M": text}
    content = b"".join(name.encode() + value.encode() + b"\0" for name, value in fields.items()) + b"\0"
    error = b"E" + struct.pack("!i", len(content) + 4) + content
    return error if fatal else error + READY + struct.pack("!i", 5) + b"I"


class PostgresqlInjector(Injector):
    """A request is all up to the server's "ready for query": the start of a session is one, a statement is one."""

    def converse(self, client: socket.socket, stack: contextlib.ExitStack) -> None:
        while True:
            length, code = struct.unpack("!ii", exactly(client, 8))
            if code not in (SSL_REQUEST, GSS_REQUEST):
                break
            secure = code == SSL_REQUEST and self.tls is not None
            client.sendall(b"S" if secure else b"N")
            client = self.secured(client, stack) if secure else client
        start = struct.pack("!ii", length, code) + exactly(client, length - 8)
        server = self.connected(stack)
        request, fault = self.meet("connect", writes=False)
        if fault is not None and fault.spares:
            self.suffer(client, fault, b"")
        server.sendall(start)
        last = self._log_in(client, server)
        request.reached = True
        self._deliver(client, fault, last)
        while True:
            asked = b""
            while True:
                kind, message = self._message(client)
                asked += message
                if kind in (b"Q", b"S", ENDED):
                    break
            self._statement(client, server, kind, asked)

    def _statement(self, client: socket.socket, server: socket.socket, kind: bytes, asked: bytes) -> None:
        if kind == ENDED:
            server.sendall(asked)
            raise EOFError
        text = " ".join(asked.decode("utf-8", "replace").split())
        request, fault = self.meet(text[:300], WRITING.search(text) is not None)
        answer = b""
        if fault is None or not fault.spares:
            request.reached = True
            server.sendall(asked)
            answer = b"".join(self._until_ready(server))
            request.well = b"E\0" not in answer[:2]
        self._deliver(client, fault, answer)

    def _deliver(self, client: socket.socket, fault: Fault | None, answer: bytes) -> None:
        if fault is None:
            client.sendall(answer)
        else:
            self.suffer(client, fault, answer)

    def _log_in(self, client: socket.socket, server: socket.socket) -> bytes:
        """Pass on what both say until the password was taken; what comes then, the last, is returned."""
        while True:
            kind, message = self._message(server)
            if kind == b"R" and struct.unpack("!i", message[5:9])[0] == 0:
                return message + b"".join(self._until_ready(server))
            client.sendall(message)
            if kind == b"E":
                raise EOFError
            if kind == b"R" and struct.unpack("!i", message[5:9])[0] != 12:
                server.sendall(self._message(client)[1])

    def _until_ready(self, server: socket.socket) -> Iterator[bytes]:
        kind = b""
        while kind != READY:
            try:
                kind, message = self._message(server)
            except EOFError:  # the server ended the session in its answer
                return
            yield message

    @staticmethod
    def _message(end: socket.socket) -> tuple[bytes, bytes]:
        head = exactly(end, 5)
        return head[:1], head + exactly(end, struct.unpack("!i", head[1:])[0] - 4)


def exactly(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = end.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data


# --- Redis

REDIS_WRITES = (b"SET", b"UNLINK", b"DEL")


class UnderWay:
    """The commands of one connection that the server has yet to answer, with the fault that each answer meets."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._faults: list[Fault | None] = []

    def add(self, fault: Fault | None) -> None:
        with self._changed:
            self._faults.append(fault)

    def first(self) -> Fault | None:
        with self._changed:
            return self._faults[0] if self._faults else None

    def done(self) -> None:
        """The answer was passed on, or something that nobody had asked for."""
        with self._changed:
            del self._faults[:1]
            self._changed.notify_all()

    def wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._faults, LONGEST_HANG)


class RedisInjector(Injector):
    """A request is a command. The server also speaks unasked, so that its answers are passed on as they come."""

    def converse(self, client: socket.socket, stack: contextlib.ExitStack) -> None:
        client = self.secured(client, stack)
        server = self.connected(stack)
        under_way = UnderWay()
        threading.Thread(target=self._answers, args=(client, server, under_way), daemon=True).start()
        lines = client.makefile("rb")
        while words := self._command(lines):
            name = b" ".join(words[:2]).decode("utf-8", "replace") if words[0] == b"CLIENT" else words[0].decode()
            request, fault = self.meet(name, words[0] in REDIS_WRITES)
            if fault is None or not fault.spares:
                if fault is not None and fault.half:
                    words = words[: 1 + (len(words) - 1) // 2]
                request.reached = request.well = True
                under_way.add(fault)
                server.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))
            else:
                under_way.wait()  # answers keep the order of what was asked
                self.suffer(client, fault, b"")

    def _answers(self, client: socket.socket, server: socket.socket, under_way: UnderWay) -> None:
        lines = server.makefile("rb")
        with contextlib.suppress(OSError):
            while answer := resp(lines):
                fault = under_way.first()
                if fault is not None:
                    self.suffer(client, fault, answer)
                else:
                    client.sendall(answer)
                under_way.done()
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _command(lines: BinaryIO) -> list[bytes]:
        head = lines.readline()
        words = []
        for _word in range(int(head[1:] or 0)):
            size = int(lines.readline()[1:])
            words.append(lines.read(size + 2)[:-2])
        return words


def resp(lines: BinaryIO) -> bytes:
    """One whole answer, as it was sent; nothing at the end of the connection."""
    head = lines.readline()
    number = int(head[1:]) if head[:1] in (b"$", b"*") else 0
    if head[:1] == b"$" and number >= 0:
        return head + lines.read(number + 2)
    return head + b"".join(resp(lines) for _item in range(number))


# --- places that no client gets anything from


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def deaf_port() -> Iterator[int]:
    """A listener whose queue is full: who connects gets no answer at all."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _number in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(listener.getsockname())
        yield int(listener.getsockname()[1])


@functools.cache
def _key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def certificate(folder: Path, name: str = "127.0.0.1", days: int = 1) -> Path:
    """A file with a key and a certificate that signs itself; ``days`` from now it ends, perhaps in the past."""
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lab")])
    try:
        known: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        known = x509.DNSName(name)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(_key().public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=10))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([known]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(_key(), hashes.SHA256())
    )
    key = _key().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = folder / f"{name}-{days}.pem"
    file.write_bytes(key + made.public_bytes(serialization.Encoding.PEM))
    return file


def serving(file: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context
