# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the parts of the Vault double share: a request, an answer, a refusal, and how Vault writes times."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lab.doubles.vault_token import Token

SECOND = 10**9
UNITS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": SECOND, "m": 60 * SECOND, "h": 3600 * SECOND}


class Clock:
    """The server's time in nanoseconds; a test can move it."""

    def __init__(self) -> None:
        self.offset = 0
        self.last = 0

    def now(self) -> int:
        # Never the same twice: two versions of one key must not share a time.
        self.last = max(self.last + 1, time.time_ns() + self.offset)
        return self.last


class Refused(Exception):
    """An error answer. ``wrapped`` is how Vault shows an error of its Go code, against one that a backend answers."""

    def __init__(self, status: int, text: str | None = None, wrapped: bool = False) -> None:
        super().__init__(text)
        self.status = status
        texts = [] if text is None else [text]
        self.errors = [f"1 error occurred:\n\t* {text}\n\n" for text in texts] if wrapped else texts


DENIED = "permission denied"


@dataclass
class Answer:
    """A logical answer; without anything in it the server answers 204."""

    data: dict[str, Any] | None = None
    status: int = 200
    warnings: list[str] | None = None
    auth: dict[str, Any] | None = None
    empty: bool = False  # a status and no body at all


@dataclass
class Call:
    """One authenticated request, with its path inside the mount."""

    id: str
    operation: str
    path: str
    full_path: str
    data: dict[str, Any]
    token: Token
    headers: dict[str, list[str]] = field(default_factory=dict)
    remote: str = ""

    def attribution(self) -> dict[str, str]:
        """Who did this, as the key-value engine records it."""
        return {
            "actor": self.token.display_name,
            "operation": self.operation,
            "client_id": client_id(self.token.policies),
        }


def client_id(policies: list[str]) -> str:
    """Tokens without an entity are told apart by their policies only."""
    return base64.b64encode(hashlib.sha256("\x1f".join(sorted(policies)).encode()).digest()).decode()


def rfc3339(nanoseconds: int | None, local: bool = False) -> str:
    """Go's RFC3339Nano: the fraction without trailing zeros. None is the empty string."""
    if nanoseconds is None:
        return ""
    seconds, fraction = divmod(nanoseconds, SECOND)
    digits = f".{fraction:09d}".rstrip("0").rstrip(".")
    if not local:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + digits + "Z"
    at = time.localtime(seconds)
    zone = time.strftime("%z", at)
    shown = "Z" if zone == "+0000" else f"{zone[:3]}:{zone[3:]}"
    return time.strftime("%Y-%m-%dT%H:%M:%S", at) + digits + shown


def duration(value: Any) -> int:
    """Seconds of ``"90"``, ``90`` or ``"1h30m"``. ValueError for anything else."""
    text = str(value or 0).strip()
    sign, bare = (-1, text[1:]) if text.startswith("-") else (1, text)
    if re.fullmatch(r"\d+", bare):
        return sign * int(bare)
    if re.fullmatch(r"\d+d", bare):
        return sign * int(bare[:-1]) * 86400
    parts = re.findall(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h)", bare)
    if not parts or "".join(number + unit for number, unit in parts) != bare:
        raise ValueError("not a duration")
    return sign * int(sum(float(number) * UNITS[unit] for number, unit in parts) // SECOND)


def go_duration(seconds: int) -> str:
    """``0s``, ``1m30s``, ``720h0m0s``."""
    sign, rest = ("-", -seconds) if seconds < 0 else ("", seconds)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{sign}{hours}h{minutes}m{rest}s"
    return f"{sign}{minutes}m{rest}s" if minutes else f"{sign}{rest}s"
