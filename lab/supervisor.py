# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one process that owns all others: it starts them side by side, waits for them, and takes them along when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from . import LabError, files, inventory
from .lock import MARKER, Lock
from .parts import CROWD_SIZE, Site, pool, postgresql, services, valkey

ACTORS = ("thief", "crowd")


def prepare(directory: Path) -> Lock:
    """Make the folder, or take over one that is a lab's; a folder of somebody else is never touched."""
    if directory.exists() and any(directory.iterdir()) and not (directory / MARKER).exists():
        raise LabError(f"{directory} is not empty and not a lab: set LAB_DIR to another folder")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    lock = Lock(directory)
    if not lock.take():
        raise LabError(f"a lab runs in {directory} already: `python -m lab down` ends it")
    for name in ("run", "log", "app"):
        _wipe(directory / name)
        (directory / name).mkdir(mode=0o700)
    for name in (
        "inventory.yml",
        "env",
        "state.json",
        "marks.json",
        "thief.json",
        "thief.jsonl",
        "crowd.json",
        "crowd.jsonl",
    ):
        (directory / name).unlink(missing_ok=True)
    (directory / "cases").mkdir(mode=0o700, exist_ok=True)
    return lock


def _wipe(folder: Path) -> None:
    """The servers of a lab that was killed a moment ago may still be writing."""
    for _unused in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.03)
    raise LabError(f"{folder} cannot be removed")


class Supervisor:
    def __init__(self, directory: Path, actors: bool = False) -> None:
        self.site = Site(directory)
        self._actors = actors
        self._stopping = False
        self._watchers: set[asyncio.Task[None]] = set()
        self._started_at = time.time()

    async def start(self) -> None:
        """Everything at once; what the first login needs goes before the rest."""
        site = self.site
        primary = asyncio.create_task(self._database())
        jobs: list[Awaitable[Any]] = [
            primary,
            valkey.cache(site),
            pool.pool(site),
            services.app(site),
            services.edge(site),
            services.vault(site),
        ]
        jobs.append(self._after(primary, services.first_login))
        jobs.append(self._after(primary, postgresql.standby))
        jobs += [services.sinks(site), services.ssh(site), services.s3(site)]
        await _all(jobs)
        self._write_people()
        inventory.write(site)
        for name in ACTORS:
            site.parts[name] = {"kind": "actor", "pid": None, "status": "off"}
        for name in list(site.processes):
            self._watch(name)
        if self._actors:
            for name in ACTORS:
                await self.start_actor(name)
        self.write_state()

    async def _database(self) -> None:
        await postgresql.primary(self.site)

    async def _after(self, task: asyncio.Task[None], step: Callable[[Site], Awaitable[Any]]) -> None:
        await task
        await step(self.site)

    def _write_people(self) -> None:
        """Passwords of the users: all for a person's tests, some for the crowd. Nobody whose things are stolen is in it."""
        people = [{name: row[name] for name in ("id", "email", "password")} for row in self.site.people]
        files.write_json(self.site.run / "users.json", people)
        files.write_json(self.site.run / "crowd.json", people[30 : 30 + CROWD_SIZE])

    # What can be asked of a running lab

    async def start_actor(self, name: str) -> None:
        site = self.site
        running = site.processes.get(name)
        if running and running.running:
            return
        env = {
            "LAB_DIR": site.dir,
            "LAB_EDGE_URL": services.app_url(site),
            "LAB_DIRECT_URL": site.url("app"),
            "PGPORT": site.port("pg1"),
        }
        process = site.python(name, f"lab.{name}", env={key: str(value) for key, value in env.items()})
        await process.start()
        site.parts[name] |= {"pid": process.pid, "status": "up"}
        self._watch(name)

    async def start_part(self, name: str) -> None:
        if name in ACTORS:
            await self.start_actor(name)
            return
        process = self._part(name)
        if process.running:
            return
        if name in ("pg1", "pg2"):
            await postgresql.start(process, self.site.run / name)
        else:
            await process.start()
            await process.listening(self.site.port({"sinks": "hook"}.get(name, name)))
        if name == "vault":  # it keeps nothing over a restart
            await services.seed_vault(self.site)
        if name == "app":
            files.write(self.site.app_dir / "app.pid", f"{process.pid}\n")
        if name == "cf":
            await process.listening(self.site.port("edge"))
        self.site.parts[name] |= {"pid": process.pid, "status": "up"}
        self._watch(name)

    async def stop_part(self, name: str, how: str = "stop") -> None:
        await self._part(name).stop(signal.SIGKILL if how == "kill" else None)
        self.site.parts[name] |= {"pid": None, "status": "down"}

    def _part(self, name: str) -> Any:
        if name not in self.site.processes:
            raise LabError(f"no such part: {name}; there are {', '.join(sorted(self.site.processes))}")
        return self.site.processes[name]

    async def obey(self, verb: str, name: str) -> None:
        if verb == "start":
            await self.start_part(name)
        elif verb in ("stop", "kill"):
            await self.stop_part(name, verb)
        elif verb in ("pause", "resume"):
            self._part(name).signal(signal.SIGSTOP if verb == "pause" else signal.SIGCONT)
            self.site.parts[name]["status"] = "paused" if verb == "pause" else "up"
        else:
            raise LabError(f"no such request: {verb}")
        self.write_state()

    # Its own children

    def _watch(self, name: str) -> None:
        async def end() -> None:
            process = self.site.processes[name]
            code = await process.wait()
            if (
                not self._stopping
                and self.site.processes[name] is process
                and self.site.parts[name].get("pid") is not None
            ):
                self.site.parts[name] |= {"pid": None, "status": "off" if name in ACTORS else "down", "exit": code}
                self.write_state()

        task = asyncio.create_task(end())
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)

    def write_state(self) -> None:
        if self._stopping:
            return
        state = {
            "dir": str(self.site.dir),
            "pid": os.getpid(),
            "started_at": self._started_at,
            "first_login_after": self.site.parts["login"]["ready_after"],
            "ready_after": max(part.get("ready_after", 0) for part in self.site.parts.values()),
            "parts": {name: part for name, part in self.site.parts.items() if name != "login"},
        }
        files.write_json(self.site.dir / "state.json", state)

    async def stop(self) -> None:
        self._stopping = True
        fast = {"pg1": signal.SIGQUIT, "pg2": signal.SIGQUIT}
        await asyncio.gather(*(process.stop(fast.get(name)) for name, process in self.site.processes.items()))
        (self.site.dir / "state.json").unlink(missing_ok=True)


async def _all(jobs: list[Awaitable[Any]]) -> None:
    """The first failure is the one that is told; the others are ended, not left to fail as well."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Control:
    """Requests to a running lab: one line of JSON each way, on loopback, with a word that only the lab's user can read."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._word = secrets.token_hex(16)

    async def open(self) -> None:
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        files.write_json(self._supervisor.site.run / "control.json", {"port": port, "word": self._word})

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            try:
                asked = json.loads(await reader.readline())
                if not secrets.compare_digest(str(asked.get("word")), self._word):
                    raise LabError("the word is wrong")
                await self._supervisor.obey(asked["verb"], asked["part"])
                answer: dict[str, Any] = {"ok": True}
            except (LabError, ValueError, KeyError) as error:
                answer = {"ok": False, "why": str(error)}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
            writer.close()


async def supervise(
    directory: Path, actors: bool, notify: Callable[[dict[str, Any]], None], guard: socket.socket | None
) -> int:
    """Start, stay until a signal comes (or the one who waits for the start is gone), and end everything."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    waiting = asyncio.create_task(stop.wait())
    guarding = asyncio.create_task(_guard(guard, stop)) if guard else None
    supervisor = Supervisor(directory, actors)
    starting = asyncio.create_task(_start(supervisor))
    try:
        await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return 130
        starting.result()
        notify({"ok": True})
        await waiting
        return 0
    except LabError as error:
        notify({"ok": False, "why": str(error)})
        return 1
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await supervisor.stop()
        for task in (waiting, guarding):
            if task:
                task.cancel()


async def _start(supervisor: Supervisor) -> None:
    await supervisor.start()
    await Control(supervisor).open()


async def _guard(guard: socket.socket, stop: asyncio.Event) -> None:
    """`up` says a word when it has seen the lab start; when it goes away without it, nobody wants the lab."""
    guard.setblocking(False)
    with contextlib.suppress(OSError):
        if await asyncio.get_running_loop().sock_recv(guard, 1):
            return
    stop.set()


def run(
    directory: Path, actors: bool, notify: Callable[[dict[str, Any]], None], guard: socket.socket | None = None
) -> int:
    """The whole life of a lab. The lock lives as long as this call."""
    os.umask(0o077)
    try:
        lock = prepare(directory)
    except LabError as error:
        notify({"ok": False, "why": str(error)})
        return 1
    try:
        return asyncio.run(supervise(directory, actors, notify, guard))
    except BrokenPipeError:  # nobody is there any more to hear that it is up
        return 1
    finally:
        lock.release()
