# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A bad network between a client and a real server: slow, reset, deaf, hung, or cut after so many bytes.

In process: ``with TcpProxy(("127.0.0.1", 5432)) as proxy: proxy.fault("stall")``. As a program:
``python -m lab.tcp_proxy --target 127.0.0.1:5432 --port N --control-port M``, then ``PUT /`` with
``{"kind": "cut", "amount": 0, "way": "down"}``, ``DELETE /``, ``GET /`` on the control port.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Self

KINDS = ("delay", "reset", "drop", "stall", "cut")
WAYS = ("up", "down", "both")
LINGER_RESET = struct.pack("ii", 1, 0)


@dataclasses.dataclass
class Fault:
    """What goes wrong. ``up`` is from the client to the server. ``times`` connections meet it, then it is gone."""

    kind: str
    amount: float = 0  # seconds of a delay, bytes before a cut
    way: str = "both"
    times: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.way not in WAYS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}; way is one of {', '.join(WAYS)}")


class Connection:
    """One client and its server."""

    def __init__(self, proxy: TcpProxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._ends = {"up": (client, server), "down": (server, client)}
        self._met: Fault | None = None
        self._answered = threading.Event()
        self._patience = 0.0
        self._pumping = len(self._ends)
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for way in self._ends:
            threading.Thread(target=self._pump, args=(way,), daemon=True).start()

    def _pump(self, way: str) -> None:
        source, target = self._ends[way]
        passed = 0
        try:
            while data := source.recv(65536):
                if way == "down":
                    self._answered.set()
                passed = self._pass(way, data, target, passed)
            if way == "up" and self._patience:
                self._answered.wait(self._patience)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
        self._pumping -= 1
        if not self._pumping:
            self.close()

    @property
    def open(self) -> bool:
        return self._pumping > 0

    def outlive(self, seconds: float) -> None:
        """The server does not hear that its client is gone before it has answered what is on its way now."""
        self._answered.clear()
        self._patience = seconds

    def pass_on(self, way: str, data: bytes) -> None:
        """Send this now; for a tap that does something afterwards."""
        self._ends[way][1].sendall(data)

    def _pass(self, way: str, data: bytes, target: socket.socket, passed: int) -> int:
        if self._proxy.tap:
            data = self._proxy.tap(self, way, data)
        while (fault := self._fault(way)) and fault.kind == "stall":
            if self._proxy.changed.wait(0.05) and self._proxy.closed:
                raise OSError
        if fault and fault.kind == "reset":
            self.close(reset=True)
            raise OSError
        if fault and fault.kind == "drop":
            return passed
        if fault and fault.kind == "delay":
            time.sleep(fault.amount)
        if fault and fault.kind == "cut" and passed + len(data) >= fault.amount:
            with contextlib.suppress(OSError):
                target.sendall(data[: max(0, int(fault.amount) - passed)])
            self.close()
            raise OSError
        target.sendall(data)
        self._proxy.count(way, len(data))
        return passed + len(data)

    def _fault(self, way: str) -> Fault | None:
        fault = self._proxy.current
        if fault is None or fault.way not in (way, "both"):
            return None
        if fault.times is not None and self._met is not fault and not self._proxy.take(fault):
            return None
        self._met = fault
        return fault

    def close(self, reset: bool = False) -> None:
        for end in self._ends["up"]:
            if reset:
                _reset(end)
                continue
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


Tap = Callable[[Connection, str, bytes], bytes]


class TcpProxy:
    """Listens on loopback and passes on to ``target``; ``source`` is the address that the server sees.

    ``tap`` sees all that passes: it is asked with the connection, the way and what came, may take its time, and returns what
    goes on. An ``OSError`` from it ends the connection.
    """

    def __init__(
        self, target: tuple[str, int], port: int = 0, source: str | None = None, tap: Tap | None = None
    ) -> None:
        self.tap = tap
        self._target = target
        self.source = source
        self._lock = threading.Lock()
        self._connections: list[Connection] = []
        self.current: Fault | None = None
        self.changed = threading.Event()
        self.closed = False
        self.passed = {"up": 0, "down": 0}
        self.accepted = 0
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_unused: object) -> None:
        self.close()

    def fault(self, kind: str, amount: float = 0, way: str = "both", times: int | None = None) -> None:
        """From now on, for open connections too. A reset without ``times`` is a server that is down."""
        self.current = Fault(kind, amount, way, times)
        if self.refusing:
            self.disconnect(reset=True)

    @property
    def refusing(self) -> bool:
        return self.current is not None and self.current.kind == "reset" and self.current.times is None

    def clear(self) -> None:
        self.current = None

    def disconnect(self, reset: bool = False) -> None:
        """End every open connection."""
        with self._lock:
            connections, self._connections = self._connections, []
        for connection in connections:
            connection.close(reset)

    def take(self, fault: Fault) -> bool:
        with self._lock:
            fault.times = (fault.times or 0) - 1
            return fault.times >= 0

    def count(self, way: str, amount: int) -> None:
        with self._lock:
            self.passed[way] += amount

    def close(self) -> None:
        self.closed = True
        self.changed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.disconnect()

    def _accept(self) -> None:
        while not self.closed:
            try:
                client, _unused = self._listener.accept()
            except OSError:  # closed, or a client that is gone again
                time.sleep(0.01)
                continue
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        """In a thread of its own: a server that is slow to answer, or a client that left, keeps nobody else waiting."""
        try:
            if self.refusing:
                raise ConnectionRefusedError
            server = socket.create_connection(self._target, 5, (self.source, 0) if self.source else None)
            server.settimeout(None)
            connection = Connection(self, client, server)
        except OSError:
            _reset(client)
            return
        with self._lock:
            self.accepted += 1
            self._connections = [each for each in self._connections if each.open]
            self._connections.append(connection)


def _reset(end: socket.socket) -> None:
    """A reset instead of a goodbye. Who waits for data is woken first, or the kernel keeps the connection open for it."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        end.shutdown(socket.SHUT_RD)
    end.close()


def _handler(proxy: TcpProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200)

        def do_DELETE(self) -> None:
            proxy.clear()
            self._answer(200)

        def do_PUT(self) -> None:
            try:
                proxy.fault(**json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0))))
                self._answer(200)
            except (TypeError, ValueError):
                self._answer(400)

        def _answer(self, status: int) -> None:
            fault = dataclasses.asdict(proxy.current) if proxy.current else None
            data = json.dumps({"fault": fault, "passed": proxy.passed, "accepted": proxy.accepted}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *words: Any) -> None:
            """Nobody reads it."""

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", required=True, help="host:port")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--control-port", type=int, default=0)
    parser.add_argument("--source", help="the address that the server sees")
    options = parser.parse_args()
    host, _unused, port = options.target.rpartition(":")
    proxy = TcpProxy((host, int(port)), options.port, options.source)
    server = HTTPServer(("127.0.0.1", options.control_port), _handler(proxy))
    print(json.dumps({"port": proxy.port, "control_port": server.server_port}), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
