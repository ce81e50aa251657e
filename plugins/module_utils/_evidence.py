# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""Evidence: artefacts in the case, each with a manifest that is its mark.

``evidence/<host>/<round>/<sha256, shortened>/<name>`` is the artefact, ``evidence/<host>/<round>/<name>.json`` its manifest. The
manifest is written exclusively and last, so an artefact without one was never finished.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable
from typing import Any

from . import _case
from ._errors import FirebreakError, Refused


class Evidence:
    """What a control of one host may ask of the case's evidence."""

    def __init__(self, case: _case.Case | None, host: str, params: dict[str, Any]) -> None:
        self._case = case
        self._host = host
        self._round = int(params.get("round") or 1)
        self._params = params
        self._asked: list[str] = []

    def exists(self, name: str) -> dict[str, Any] | None:
        """The manifest of an artefact of this host and round."""
        if name not in self._asked:
            self._asked.append(name)
        return self._manifest(f"{self._host}/{self._round}/{name}")

    def references(self) -> list[str]:
        """The artefacts that this task makes or has made, for the option ``evidence`` of what destroys."""
        return [f"{self._host}/{self._round}/{name}" for name in self._asked]

    def digests(self) -> dict[str, str]:
        """The SHA-256 of each finished manifest, so that the chain of entries covers the artefacts too."""
        found = {name: self._stored(f"{self._host}/{self._round}/{name}") for name in self._asked}
        return {name: hashlib.sha256(data).hexdigest() for name, data in found.items() if data is not None}

    def write(self, name: str, chunks: Iterable[bytes], manifest: dict[str, Any]) -> dict[str, Any]:
        """Stream an artefact into the case: SHA-256 and size in one pass, the manifest last."""
        if self._case is None:
            raise FirebreakError("internal: evidence without a case", effect="none")
        sha, size = hashlib.sha256(), 0
        with tempfile.TemporaryFile() as copy:
            for chunk in chunks:
                sha.update(chunk)
                size += len(chunk)
                copy.write(chunk)
            copy.seek(0)
            folder = f"{self._case.id}/evidence/{_case.encode_host(self._host)}/{self._round}"
            key = f"{folder}/{sha.hexdigest()[:16]}/{name}"
            self._case.context.still_ours()
            self._case.store.put_file(key, copy)
        document = {
            **manifest,
            "name": name,
            "key": key,
            "sha256": sha.hexdigest(),
            "bytes": size,
            "incident": self._case.id,
            "round": self._round,
            "host": self._host,
            "time": _case.stamp(self._case.context.clock()),
            "actor": self._case.context.actor,
        }
        self._case.context.still_ours()
        if self._case.store.create(f"{folder}/{name}.json", _case.canonical(document)):
            return document
        return self._manifest(f"{self._host}/{self._round}/{name}") or document

    def missing(self, kinds: Iterable[str], references: list[str]) -> list[str]:
        """The kinds that no finished artefact covers; in check mode a planned artefact counts."""
        needed = set(kinds)
        for reference in references:
            manifest = self._manifest(reference)
            if manifest is not None:
                needed -= set(manifest.get("covers", []))
            elif self._case is None or self._case.context.check_mode:
                return []
        return sorted(needed)

    def begun(self, references: list[str]) -> tuple[float, str] | None:
        """When preserving began, in this round, and the incident's severity; None where nobody preserves."""
        if self._case is None or not references:
            return None
        entries = self._case.fetch([(_case.RUN, seq) for seq in self._case.numbers(_case.RUN)])
        for entry in entries:
            if entry.body.get("begins") == "preserve" and entry.doc["round"] == self._round:
                return float(entry.body["at"]), str(entries[0].body["severity"])
        return None

    def _manifest(self, reference: str) -> dict[str, Any] | None:
        data = self._stored(reference)
        return None if data is None else json.loads(data)

    def _stored(self, reference: str) -> bytes | None:
        host, turn, name = self._split(reference)
        if self._case is None or self._case.id == _case.NO_INCIDENT:
            return None
        return self._case.store.get(f"{self._case.id}/evidence/{_case.encode_host(host)}/{turn}/{name}.json")

    @staticmethod
    def _split(reference: str) -> tuple[str, int, str]:
        parts = reference.split("/")
        if len(parts) != 3 or not parts[1].isdigit() or not parts[2]:
            raise Refused(f"evidence: {reference} is not of the form host/round/name, as an export returns it")
        return parts[0], int(parts[1]), parts[2]
