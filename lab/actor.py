# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the thief and the crowd share: requests from an address of one's own, and a ledger of each try."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from . import files

LIMIT_SECONDS = 600


class Unreachable(Exception):
    """No answer that would be a yes or a no."""


class Client:
    """One kept connection from one source address."""

    def __init__(self, url: str, source: str) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(
            parts.hostname or "", parts.port, timeout=5, source_address=(source, 0)
        )

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            self._connection.request(method, path, data, {"Content-Type": "application/json", **headers})
            answer = self._connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise Unreachable(type(error).__name__) from None
        if answer.status >= 500:
            raise Unreachable(str(answer.status))
        with contextlib.suppress(ValueError):
            value = json.loads(text)
            return answer.status, value if isinstance(value, dict) else {}
        return answer.status, {}


class Ledger:
    """Each try as a line of JSON, and a summary that is written anew all the time."""

    def __init__(self, name: str, summarise: Callable[[], dict[str, Any]]) -> None:
        folder = Path(os.environ["LAB_DIR"])
        self._summary = folder / f"{name}.json"
        self._marks = folder / "marks.json"
        self._summarise = summarise
        self._lines = files.appending(folder / f"{name}.jsonl")
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.began = time.time()

    def add(self, **record: Any) -> None:
        """Called with the lock held."""
        self._lines.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")
        self._lines.flush()

    def marks(self) -> dict[str, float]:
        return dict(files.read_json(self._marks)) if self._marks.exists() else {}

    def run(self, loops: list[Callable[[], None]]) -> None:
        """All loops at once, until asked to stop or for ten minutes."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_unused: self.stop.set())
        threads = [threading.Thread(target=loop, daemon=True) for loop in loops]
        for thread in threads:
            thread.start()
        while not self.stop.wait(0.25) and time.time() - self.began < LIMIT_SECONDS:
            self._write()
        self.stop.set()
        for thread in threads:
            thread.join(timeout=1)
        self._write(ended=True)

    def _write(self, ended: bool = False) -> None:
        with self.lock:
            summary = {"began_at": self.began, "ended": ended, "marks": self.marks(), **self._summarise()}
        files.write_json(self._summary, summary)
