# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""Seals, and the proof that nobody altered a case since."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
from typing import Any

from ._case import FIRST, RUN, Case, Entry, canonical, digest_of
from ._errors import FirebreakError
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
    streams = case.streams()
    rewritten = [key for part in ("journal", "blobs", "evidence") for key in case.store.rewritten(f"{case.id}/{part}")]
    chains: dict[str, list[str]] = {}
    bad: list[dict[str, str]] = [
        {"entry": key.removeprefix(f"{case.id}/journal/"), "why": "it was rewritten or deleted"} for key in rewritten
    ]
    for name in sorted(streams, key=lambda one: (one != RUN, one)):
        chains[name], wrong = _verify_stream(case, name, streams[name])
        bad += wrong
    run = entries_of(case, RUN) if not bad else []
    for entry in run:
        if entry.kind == "seal":
            bad += _verify_seal(chains, entry)
    if RUN not in streams:
        bad.append({"entry": f"{RUN}/1", "why": "the incident's first entry is missing"})
    if expect and not bad and expect not in {entry.digest for entry in run if entry.kind == "seal"}:
        bad.append({"entry": RUN, "why": "no seal has the expected hash: the chain was cut or written anew"})
    if not bad:
        bad += [*_verify_view(case, run), *_verify_evidence(case)]
    return {
        "valid": not bad,
        "first_bad": bad[0] if bad else {},
        "bad": bad[:100],
        "entries": sum(len(chain) for chain in chains.values()),
        "streams": len(chains),
        "seals": [{"turn": e.body["turn"], "digest": e.digest} for e in run if e.kind == "seal"],
    }


def _verify_stream(case: Case, name: str, files: list[str]) -> tuple[list[str], list[dict[str, str]]]:
    digests: list[str] = []
    before = FIRST
    keys = [f"{case.id}/journal/{name}/{file}" for file in files]
    with concurrent.futures.ThreadPoolExecutor(16 if case.store.scheme == "s3" else 1) as pool:
        for number, (file, data) in enumerate(zip(files, pool.map(case.store.get, keys), strict=True), 1):
            why = _why_bad(case, name, number, file, data, before)
            if why:
                return digests, [{"entry": f"{name}/{number}", "why": why}]
            before = json.loads(data or b"")["digest"]
            digests.append(before)
    return digests, []


def _why_bad(case: Case, name: str, number: int, file: str, data: bytes | None, before: str) -> str:
    if file != f"{number:08d}.json":
        return f"it is missing ({file} stands there)"
    try:
        doc = json.loads(data or b"")
        full = case.inflate(doc)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "it is not readable"
    except FirebreakError as failure:
        return failure.msg
    if data != canonical(doc) or digest_of(full) != doc.get("digest"):
        return "its content does not match its digest"
    if (doc["incident"], doc["stream"], doc["seq"]) != (case.id, name, number):
        return f"it belongs to {doc['incident']} {doc['stream']}/{doc['seq']}"
    if doc["prev"] != before:
        return "it does not follow the entry before it"
    return ""


def _verify_seal(chains: dict[str, list[str]], entry: Entry) -> list[dict[str, str]]:
    bad = []
    for name, (seq, digest) in sorted(entry.body["heads"].items()):
        chain = chains.get(name, [])
        if len(chain) < seq:
            bad.append(
                {"entry": f"{name}/{len(chain) + 1}", "why": f"seal {entry.body['turn']} names it, but it is missing"}
            )
        elif chain[seq - 1] != digest:
            bad.append({"entry": f"{name}/{seq}", "why": f"it is not what seal {entry.body['turn']} names"})
    return bad


def _verify_view(case: Case, run: list[Entry]) -> list[dict[str, str]]:
    """incident.json is for people and tools; it must say what the entries say."""
    data = case.store.get(f"{case.id}/incident.json")
    if data is None:
        return []
    try:
        as_of = int(json.loads(data)["as_of"])
    except (ValueError, KeyError, TypeError):
        as_of = 0
    if as_of < 1 or canonical(shown_in_view(case, run[:as_of])) != data:
        return [{"entry": "incident.json", "why": "it does not say what the entries say"}]
    return []


def _verify_evidence(case: Case) -> list[dict[str, str]]:
    """Each manifest is covered by the chain, each artefact by its manifest."""
    bad: list[dict[str, str]] = []
    for name in case.streams():
        if not name.endswith(".evidence"):
            continue
        for entry in entries_of(case, name):
            for artefact, digest in (entry.body.get("manifests") or {}).items():
                where = f"{name.removesuffix('.evidence')}/{entry.doc['round']}/{artefact}"
                data = case.store.get(f"{case.id}/evidence/{where}.json")
                if data is None or hashlib.sha256(data).hexdigest() != digest:
                    bad.append(
                        {"entry": f"{name}/{entry.seq}", "why": f"the manifest of {where} is missing or altered"}
                    )
                    continue
                content = case.store.get(json.loads(data)["key"])
                if content is None or hashlib.sha256(content).hexdigest() != json.loads(data)["sha256"]:
                    bad.append({"entry": f"{name}/{entry.seq}", "why": f"the artefact {where} is missing or altered"})
    return bad
