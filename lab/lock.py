# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which process owns a lab's folder."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Any

MARKER = ".firebreak-lab"


class Lock:
    """Held by the supervisor as long as it lives; the kernel lets go of it, whatever the end."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / MARKER
        self._file: Any = None

    def take(self) -> bool:
        """Once more where somebody is just asking who holds it."""
        for _unused in range(4):
            if self._try():
                return True
            time.sleep(0.05)
        return False

    def _try(self) -> bool:
        self._file = self._path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            return False
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()
        return True

    def release(self) -> None:
        self._file.close()

    def holder(self) -> int | None:
        """The pid of the supervisor that is alive, else None."""
        if not self._path.exists():
            return None
        with self._path.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return int(file.read() or 0) or None
        return None
