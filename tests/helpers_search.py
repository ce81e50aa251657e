# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Looks for secrets in whatever was shown, written or started, in every spelling that a secret commonly gets."""

from __future__ import annotations

import base64
import binascii
import contextlib
import html
import io
import json
import re
import shlex
import threading
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import zstandard

SHORTEST = 8
# What is packed inside something else: a stream by its first bytes, and Base64 that is longer than a secret would be.
GZIP, ZIP, ZSTANDARD = b"\x1f\x8b\x08", b"PK\x03\x04", b"\x28\xb5\x2f\xfd"
BASE64 = re.compile(rb"(?:[A-Za-z0-9+/]{4}[\r\n]*){30,}(?:[A-Za-z0-9+/]{2,3}={0,2})?")
DEEPEST = 3
# What a terminal or a MIME encoder puts between two pieces of a long word.
BROKEN = re.compile(rb"\\n|\r?\n[ \t]*")


def spellings(secret: str) -> set[bytes]:
    """As it stands, JSON-escaped once and twice, as Python, HTML and a shell write it, in a URL, and in Base64 at any offset."""
    once = json.dumps(secret)[1:-1]
    texts = {
        secret,
        once,
        json.dumps(once)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        repr(secret)[1:-1],
        shlex.quote(secret),
        html.escape(secret),
        html.escape(secret, quote=False),
        urllib.parse.quote(secret),
        urllib.parse.quote(secret, safe=""),
        urllib.parse.quote_plus(secret),
    }
    data = secret.encode()
    texts |= {urllib.parse.quote(secret, safe="").replace(f"%{byte:02X}", f"%{byte:02x}") for byte in data}
    encoded = {
        data.hex().encode(),
        data.hex().upper().encode(),
        data.hex(":").encode(),
        base64.b32encode(data)[: len(data) * 8 // 5],
    }
    for offset in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            # The characters that also hold bits of what stands before or after the secret are left out.
            encoded.add(encode(b"\0" * offset + data)[-(-offset * 8 // 6) : (offset + len(data)) * 8 // 6])
    return {text.encode() for text in texts} | {text for text in encoded if len(text) >= SHORTEST}


def unpacked(data: bytes, depth: int = 0) -> Iterator[bytes]:
    """What is compressed or spelled in Base64 inside, at any place and in one another."""
    if depth == DEEPEST:
        return
    inner: list[bytes] = []
    for magic, unpack in ((GZIP, _inflated), (ZSTANDARD, _decompressed), (ZIP, _unzipped)):
        place = data.find(magic)
        while place >= 0:
            inner += unpack(data[place:])
            place = data.find(magic, place + 1) if magic != ZIP else -1
    for word in BASE64.findall(data):
        whole = re.sub(rb"[\r\n=]", b"", word)
        with contextlib.suppress(binascii.Error):
            inner.append(base64.b64decode(whole[: len(whole) // 4 * 4]))
    for one in inner:
        yield one
        yield from unpacked(one, depth + 1)


def _inflated(data: bytes) -> list[bytes]:
    with contextlib.suppress(zlib.error):
        return [zlib.decompressobj(31).decompress(data)]
    return []


def _decompressed(data: bytes) -> list[bytes]:
    with contextlib.suppress(zstandard.ZstdError):
        return [zstandard.ZstdDecompressor().decompressobj().decompress(data)]
    return []


def _unzipped(data: bytes) -> list[bytes]:
    with contextlib.suppress(zipfile.BadZipFile, zlib.error), zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [archive.read(name) for name in archive.namelist()]
    return []


class Search:
    """Collects hits: where each was found. The secret itself is named by its number, never shown."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._known = sorted({secret for secret in secrets if len(secret) >= SHORTEST})
        forms = {(BROKEN.sub(b"", form), number) for number, one in enumerate(self._known) for form in spellings(one)}
        self._spellings = [(number, form) for form, number in sorted(forms)]
        self.hits: list[str] = []
        self.searched = 0

    def found(self, hit: str) -> str:
        """What a hit is of."""
        return next(self._known[int(number)] for number in re.findall(r": secret (\d+) after ", hit))

    def look(self, where: str, data: bytes) -> None:
        for text in (BROKEN.sub(b"", one) for one in {data, *unpacked(data)}):
            self.searched += len(text)
            for number, form in self._spellings:
                place = text.find(form)
                if place >= 0:
                    around = text[max(0, place - 60) : place].decode("utf-8", "replace")
                    self.hits.append(f"{where}: secret {number} after {around!r}")

    def look_below(self, folder: Path, but: Iterable[Path] = ()) -> None:
        for path in sorted(folder.rglob("*")):
            self.look(f"name of {path}", path.name.encode())
            if path.is_file() and path not in but:
                self.look(str(path), path.read_bytes())


class CommandLines:
    """Every command line that is to be seen on this machine while the context is open, and what processes that began
    meanwhile have in their environment."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self.environments: set[bytes] = set()
        self._older = {path.parent.name for path in Path("/proc").glob("[0-9]*/environ")}
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
            for path in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    self.seen.add((path / "cmdline").read_bytes())
                    if path.name not in self._older:
                        self.environments.add((path / "environ").read_bytes())
