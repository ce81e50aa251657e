# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Looks for secrets in whatever was shown, written or started, in every spelling that a secret commonly gets."""

from __future__ import annotations

import base64
import contextlib
import json
import shlex
import threading
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path

SHORTEST = 8


def spellings(secret: str) -> set[bytes]:
    """As it stands, JSON-escaped once and twice, as Python and a shell write it, in a URL, and in Base64 at any offset."""
    once = json.dumps(secret)[1:-1]
    texts = {
        secret,
        once,
        json.dumps(once)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        repr(secret)[1:-1],
        shlex.quote(secret),
        urllib.parse.quote(secret),
        urllib.parse.quote(secret, safe=""),
        urllib.parse.quote_plus(secret),
    }
    data = secret.encode()
    encoded = {data.hex().encode()}
    for offset in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            # The characters that also hold bits of what stands before or after the secret are left out.
            encoded.add(encode(b"\0" * offset + data)[-(-offset * 8 // 6) : (offset + len(data)) * 8 // 6])
    return {text.encode() for text in texts} | {text for text in encoded if len(text) >= SHORTEST}


class Search:
    """Collects hits: where each was found. The secret itself is named by its number, never shown."""

    def __init__(self, secrets: Iterable[str]) -> None:
        known = sorted({secret for secret in secrets if len(secret) >= SHORTEST})
        self._spellings = [(number, form) for number, secret in enumerate(known) for form in sorted(spellings(secret))]
        self.hits: list[str] = []
        self.searched = 0

    def look(self, where: str, data: bytes) -> None:
        self.searched += len(data)
        for number, form in self._spellings:
            place = data.find(form)
            if place >= 0:
                around = data[max(0, place - 60) : place].decode("utf-8", "replace")
                self.hits.append(f"{where}: secret {number} after {around!r}")

    def look_below(self, folder: Path, but: Iterable[Path] = ()) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path not in but:
                self.look(str(path), path.read_bytes())


class CommandLines:
    """Every command line that is to be seen on this machine while the context is open."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CommandLines:
        self._thread.start()
        return self

    def __exit__(self, *_more: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.03):
            self.seen.update(self._now())

    @staticmethod
    def _now() -> Iterator[bytes]:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                yield path.read_bytes()
