# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Servers that are far away: a register of settings, and a way to another server, each with a wait before every answer.

Both run in one process of their own. What is delayed is delayed like a long line does it, side by side, not one after another;
and the requests that passed are counted.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import multiprocessing
from collections.abc import AsyncIterator, Iterator
from multiprocessing.connection import Connection
from typing import Any

METHODS = (b"GET ", b"PUT ", b"HEAD ", b"POST ", b"DELETE ")


class Far:
    """Both servers, seen from the benchmark."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.url = f"http://127.0.0.1:{pipe.recv()}"

    def ask(self, **question: Any) -> Any:
        self._pipe.send(question)
        return self._pipe.recv()

    def wait(self, seconds: float) -> None:
        """From now on the register takes so long for an answer."""
        self.ask(wait=seconds)

    def line(self, host: str, port: int, wait: float) -> str:
        """A way to that server; returns its address."""
        return f"http://127.0.0.1:{self.ask(host=host, port=port, wait=wait)}"

    def requests(self) -> dict[str, int]:
        """What passed since the last time, by method and kind of key."""
        return dict(self.ask(count=True))


@contextlib.contextmanager
def far() -> Iterator[Far]:
    fresh = multiprocessing.get_context("spawn")
    ours, theirs = fresh.Pipe()
    process = fresh.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield Far(ours)
    finally:
        ours.close()
        process.terminate()
        process.join()


def _serve(pipe: Connection) -> None:
    asyncio.run(Server(pipe).run())


class Server:
    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._wait = 0.0
        self._values: dict[str, Any] = {}
        self._seen: collections.Counter[str] = collections.Counter()

    async def run(self) -> None:
        register = await asyncio.start_server(self._register, "127.0.0.1", 0, backlog=256)
        self._pipe.send(register.sockets[0].getsockname()[1])
        lines = []
        with contextlib.suppress(EOFError):
            while question := await asyncio.to_thread(self._pipe.recv):
                if "count" in question:
                    self._pipe.send(dict(self._seen))
                    self._seen.clear()
                elif "port" in question:
                    lines.append(await self._line(**question))
                    self._pipe.send(lines[-1].sockets[0].getsockname()[1])
                else:
                    self._wait = question["wait"]
                    self._pipe.send(None)

    async def _register(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next((int(line[15:]) for line in head.splitlines() if line.startswith("Content-Length:")), 0)
                body = await reader.readexactly(length)
                await asyncio.sleep(self._wait)
                method, name, _version = head.split(" ", 2)
                if method == "PUT":
                    self._values[name] = json.loads(body)["value"]
                answer = json.dumps({"value": self._values.get(name)}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))
        writer.close()

    async def _line(self, host: str, port: int, wait: float) -> asyncio.Server:
        async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                back, forth = await asyncio.open_connection(host, port)
                await asyncio.gather(
                    self._pump(_late(self._counted(reader), wait), forth), self._pump(_chunks(back), writer)
                )

        return await asyncio.start_server(meet, "127.0.0.1", 0, backlog=256)

    async def _counted(self, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        async for data in _chunks(reader):
            if data.startswith(METHODS):
                self._seen[_kind(data)] += 1
            yield data

    async def _pump(self, source: AsyncIterator[bytes], target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            async for data in source:
                target.write(data)
        with contextlib.suppress(OSError):
            target.close()


def _kind(request: bytes) -> str:
    method, where = request.split(b"\r\n", 1)[0].decode().split(" ")[:2]
    if "list-type" in where:
        return "LIST"
    return f"{method} HALT" if where.endswith("HALT") else method


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            yield data


async def _late(source: AsyncIterator[bytes], wait: float) -> AsyncIterator[bytes]:
    """Each piece that long after it came, however many are on their way."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def fill() -> None:
        async for data in source:
            queue.put_nowait((loop.time() + wait, data))
        queue.put_nowait((loop.time(), b""))

    filling = asyncio.create_task(fill())
    while True:
        due, data = await queue.get()
        if not data:
            break
        await asyncio.sleep(max(0.0, due - loop.time()))
        yield data
    await filling
