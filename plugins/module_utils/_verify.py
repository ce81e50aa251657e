# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""Seals, and the proof that nobody altered a case since."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
from typing import Any

from ._case import ENTRY, FIRST, RUN, UNREADABLE, Case, Entry, Stream, blob_of, canonical, intact
from ._incident import entries_of, shown_in_view


def seal(case: Case, begins: str | None = None) -> Entry:
    """Name the heads of all streams in one entry; its number is the turn. A phase may begin with it."""

    def body() -> dict[str, Any]:
        heads = {name: [entry.seq, entry.digest] for name, entry in case.heads().items()}
        heads.pop(RUN, None)
        turns = [entry.body["turn"] for entry in entries_of(case, RUN) if entry.kind == "seal"]
        return {"turn": max(turns, default=0) + 1, "heads": heads, "begins": begins, "at": case.store.now()}

    return case.record(RUN, "seal", body)


def turn_of(seals: list[dict[str, Any]], stream: str, seq: int) -> int:
    """The turn in which an entry was written: the first seal that covers it."""
    for one in seals:
        if int(one["heads"].get(stream, [0])[0]) >= seq:
            return int(one["turn"])
    return len(seals) + 1


def verify(case: Case, expect: str | None = None) -> dict[str, Any]:
    """Recompute every chain, seal and artefact; name the first bad entry."""
    return Verification(case).run(expect)


class Verification:
    """One reading of a case, each entry once.

    A run may go on meanwhile. So what names other things is listed before them: the view, then the seals, then all streams.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.chains: dict[str, list[str]] = {}
        self.own: list[Entry] = []
        self.manifests: list[tuple[str, dict[str, Any]]] = []
        self.bad: dict[str, str] = {}
        self.sealed: dict[str, int] = {}

    def run(self, expect: str | None) -> dict[str, Any]:
        case = self.case
        view = case.store.get(f"{case.id}/incident.json")
        newest = max(case.numbers(RUN), default=0)
        keys, odd = case.store.survey(f"{case.id}/journal")
        for part in ("blobs", "evidence"):
            odd |= case.store.survey(f"{case.id}/{part}")[1]
        streams, foreign = case.sorted_out(keys)
        streams[RUN] = [seq for seq in streams.get(RUN, []) if seq <= newest]
        for key, why in (odd | dict.fromkeys(foreign, "it is no entry, and nothing else belongs there")).items():
            self._is_bad(_shown(key.removeprefix(f"{case.id}/")), why)
        self._stream(RUN, streams.pop(RUN))
        if not self.own:
            self._is_bad(f"{RUN}/1", "the incident's first entry is missing")
        seals = [entry for entry in self.own if entry.kind == "seal"]
        self.sealed = _heads(seals[-1:])
        for name, seqs in streams.items():
            self._stream(name, seqs)
        for entry in seals:
            self._seal(entry)
        if expect and not self.bad and expect not in {entry.digest for entry in seals}:
            self._is_bad(RUN, "no seal has the expected hash: the chain was cut or written anew")
        if view is not None and not self.bad:
            self._view(view)
        for where, doc in self.manifests:
            self._evidence(where, doc)
        bad = [{"entry": where, "why": self.bad[where]} for where in sorted(self.bad, key=_order)]
        return {
            "valid": not bad,
            "first_bad": bad[0] if bad else {},
            "bad": bad[:100],
            "entries": sum(len(chain) for chain in self.chains.values()),
            "streams": len([chain for chain in self.chains.values() if chain]),
            "seals": [{"turn": entry.body.get("turn"), "digest": entry.digest} for entry in seals],
            "skew": _skew(self.own),
        }

    def _is_bad(self, where: str, why: str) -> None:
        """What was found first of an entry says most."""
        self.bad.setdefault(where, why)

    def _stream(self, name: str, seqs: list[int]) -> None:
        """One chain, up to the first entry that is bad."""
        chain = self.chains.setdefault(name, [])
        mark = f'","incident":"{self.case.id}","kind":"'.encode()
        sealed = 0 if name == RUN or name.endswith(".evidence") else self.sealed.get(name, 0)
        before = FIRST
        entries = self.case.store.many(map(Stream(self.case, name).key, seqs))
        for number, (seq, data) in enumerate(zip(seqs, entries, strict=True), 1):
            digest = _unparsed(data, mark, before) if data and 1 < seq == number <= sealed else ""
            if not digest:
                digest, why = self._read(name, number, seq, data, before)
                if why:
                    self._is_bad(f"{name}/{number}", why)
                    return
            chain.append(digest)
            before = digest

    def _read(self, name: str, number: int, seq: int, data: bytes | None, before: str) -> tuple[str, str]:
        """An entry's digest, or why it is bad."""
        if seq != number:
            return "", f"it is missing ({seq:08d}.json stands there)"
        if data is None:
            return "", "it is missing"
        try:
            doc = json.loads(data)
            return str(doc["digest"]), self._why_bad(name, number, doc, data, before)
        except UNREADABLE:
            return "", "it is not readable"

    def _why_bad(self, name: str, number: int, doc: dict[str, Any], data: bytes, before: str) -> str:
        """Why this is not the entry of that name that follows the one before; an empty text when it is."""
        blob = blob_of(doc)
        body = None if blob is None else self.case.store.get(f"{self.case.id}/blobs/{blob}")
        if blob is not None and (body is None or hashlib.sha256(body).hexdigest() != blob):
            return f"its blob {blob} is {'missing' if body is None else 'altered'}"
        if not intact(data, doc, body):
            return "its content does not match its digest"
        if (doc["incident"], doc["stream"], doc["seq"]) != (self.case.id, name, number):
            return f"it belongs to {doc['incident']} {doc['stream']}/{doc['seq']}"
        if doc["prev"] != before:
            return "it does not follow the entry before it"
        if name == RUN:
            self.own.append(Entry(doc if body is None else {**doc, "body": json.loads(body)}))
        elif name.endswith(".evidence"):
            self.manifests.append((f"{name}/{number}", doc if body is None else {**doc, "body": json.loads(body)}))
        return ""

    def _seal(self, entry: Entry) -> None:
        """What a seal names stands there, as it was then."""
        try:
            for name, (seq, digest) in entry.body["heads"].items():
                chain = self.chains.get(name, [])
                if len(chain) < seq:
                    self._is_bad(f"{name}/{len(chain) + 1}", f"seal {entry.body['turn']} names it, but it is missing")
                elif chain[seq - 1] != digest:
                    self._is_bad(f"{name}/{seq}", f"it, or one before it, is not what seal {entry.body['turn']} names")
        except UNREADABLE:
            self._is_bad(f"{RUN}/{entry.seq}", "it says not what a seal says")

    def _view(self, view: bytes) -> None:
        """incident.json is for people and tools; it must say what the entries say."""
        try:
            as_of = int(json.loads(view)["as_of"])
            same = as_of > 0 and canonical(shown_in_view(self.case, self.own[:as_of])) == view
        except UNREADABLE:
            same = False
        if not same:
            self._is_bad("incident.json", "it does not say what the entries say")

    def _evidence(self, where: str, doc: dict[str, Any]) -> None:
        """Each manifest is covered by the chain, each artefact by its manifest."""
        try:
            for artefact, digest in (doc["body"].get("manifests") or {}).items():
                name = f"{doc['stream'].removesuffix('.evidence')}/{doc['round']}/{artefact}"
                data = self.case.store.get(f"{self.case.id}/evidence/{name}.json")
                if data is None or hashlib.sha256(data).hexdigest() != digest:
                    self._is_bad(where, f"the manifest of {name} is missing or altered")
                elif self.case.store.digest(json.loads(data)["key"]) != json.loads(data)["sha256"]:
                    self._is_bad(where, f"the artefact {name} is missing or altered")
        except UNREADABLE:
            self._is_bad(where, "it names no readable manifest")


def _unparsed(data: bytes, mark: bytes, before: str) -> str:
    """The digest of an entry whose bytes show, without being parsed, that it is whole and follows the one before; else nothing.

    Parsing takes longer than all the rest. This is for what a seal covers: it vouches for the bytes without the digest, and so
    for what stands in them. ``mark`` stands behind the digest, and once: whoever parses them finds the digest there too.
    """
    here = data.find(mark)
    if here < 75 or data[here - 75 : here - 64] != b',"digest":"' or data.find(mark, here + 1) > 0:
        return ""
    if data.find(b',"prev":"' + before.encode() + b'","round":', here) < 0:
        return ""
    digest = hashlib.sha256(data[: here - 74] + data[here + 2 :]).hexdigest()
    return digest if data.startswith(digest.encode(), here - 64) else ""


def _skew(own: list[Entry]) -> float:
    """By how many seconds the clocks of the machines differ, at least: how far an entry seems older than the one before it."""
    try:
        times = [datetime.datetime.fromisoformat(entry.doc["time"]) for entry in own]
    except UNREADABLE:
        return 0.0
    return max([0.0, *((one - other).total_seconds() for one, other in itertools.pairwise(times))])


def _heads(seals: list[Entry]) -> dict[str, int]:
    """How far these seals reach, by stream."""
    try:
        return {name: int(seq) for entry in seals for name, (seq, _digest) in entry.body["heads"].items()}
    except UNREADABLE:
        return {}


def _shown(key: str) -> str:
    """An entry's key as a person says it."""
    name, _slash, file = key.removeprefix("journal/").rpartition("/")
    return f"{name}/{int(file[:8])}" if key.startswith("journal/") and ENTRY.fullmatch(file) else key


def _order(where: str) -> tuple[int, str, int]:
    """The run's own stream first, the others by name and number, then what is no entry."""
    name, _slash, number = where.partition("/")
    if where == RUN or number.isdigit():
        return (0 if name == RUN else 1, name, int(number or 0))
    return (2, where, 0)
