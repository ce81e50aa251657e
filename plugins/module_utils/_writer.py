# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""Which process writes, and whether it has ended: then nobody on its own machine waits for its claim to run out."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
from typing import Any

PROC = pathlib.Path("/proc")
ENDED = ("Z", "X")  # killed, and only not yet taken note of


def me() -> dict[str, Any]:
    """This process, as an intent names it."""
    return {"machine": machine(), "pid": os.getpid(), "began": _began(os.getpid())}


def machine() -> str | None:
    """This boot of this machine, and the space in which its process numbers count; none where that cannot be told."""
    with contextlib.suppress(OSError):
        boot = (PROC / "sys/kernel/random/boot_id").read_text() + os.readlink(PROC / "self/ns/pid")
        return hashlib.sha256(boot.encode()).hexdigest()[:16]
    return None


def ended(writer: dict[str, Any] | None) -> bool:
    """Whether it surely writes no more. Of another machine's process nothing is known."""
    if not writer or writer["machine"] is None or writer["machine"] != machine():
        return False
    return _began(int(writer["pid"])) != writer["began"]


def _began(pid: int) -> str | None:
    """When a process began, in the kernel's ticks, so that its number is not taken for a later one's; none where it ended."""
    with contextlib.suppress(OSError):
        state, *fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return None if state in ENDED else fields[18]
    return None
