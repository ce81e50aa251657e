# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One child of the supervisor: it dies with it, whatever happens to it."""

from __future__ import annotations

import asyncio
import os
import pwd
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import ROOT, LabError

SHIM = str(Path(__file__).with_name("shim.py"))
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONDONTWRITEBYTECODE", "SYSTEMROOT")


def base_environment() -> dict[str, str]:
    """Nothing of the user's own credentials reaches a server of the lab."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return {"PATH": os.defpath, **kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TZ": "UTC"}


def unprivileged_uid() -> int:
    """For root: the number of an account that exists, which initdb looks up. 65534 stands for foreign files. Else 0."""
    if os.geteuid():
        return 0
    return min(entry.pw_uid for entry in pwd.getpwall() if entry.pw_uid not in (0, 65534))


class Port:
    """A free port, held until the lab ends: a bound socket that does not listen keeps others away, not our server."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number: int = self._socket.getsockname()[1]


class Process:
    """A command, its log and its end."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        drop_root: bool = False,
        stop_signal: int = signal.SIGTERM,
        death_signal: int = signal.SIGKILL,
        mute: bool = False,
    ) -> None:
        self.name = name
        self.log = log
        self._env = {**base_environment(), **(env or {})}
        self._stop_signal = stop_signal
        self._mute = mute
        uid = unprivileged_uid() if drop_root else 0
        self._command = [sys.executable, "-IS", SHIM, str(os.getpid()), str(int(death_signal)), str(uid), *command]
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self.running and self._process else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self, stdin: bytes = b"") -> None:
        """Only ever called in the main thread: the death signal follows the thread that forked."""
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL if self._mute else log,
                stderr=log,
                env=self._env,
                cwd=ROOT,
                start_new_session=True,
            )
        if stdin and self._process.stdin:
            self._process.stdin.write(stdin)
            self._process.stdin.close()

    async def wait(self) -> int:
        return await self._process.wait() if self._process else 0

    async def finish(self, stdin: bytes = b"") -> None:
        """Run to the end; anything but success is an error."""
        await self.start(stdin)
        if await self.wait():
            raise self.failure()

    async def listening(self, port: int, patience: float = 20) -> None:
        """Wait until the port answers."""
        for _unused in range(int(patience / 0.01)):
            if not self.running:
                raise self.failure()
            try:
                _unused, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.01)
                continue
            writer.close()
            return
        raise LabError(f"{self.name} does not answer on its port after {patience:.0f} s; its log: {self.log}")

    def signal(self, number: int) -> None:
        if self.running and self._process:
            self._process.send_signal(number)

    async def stop(self, number: int | None = None, patience: float = 3) -> None:
        if not self.running:
            return
        self.signal(signal.SIGCONT)
        self.signal(number or self._stop_signal)
        try:
            await asyncio.wait_for(self.wait(), patience)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await self.wait()

    def failure(self) -> LabError:
        tail = self.log.read_text(errors="replace").strip().splitlines()[-6:]
        return LabError("\n  ".join([f"{self.name} ended; its log {self.log} says:", *tail]))
