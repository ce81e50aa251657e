# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""The case: streams of entries, each its own hash chain, and what is folded from them.

A stream has one writer at a time. On a file store that is a lock; on S3 it is the exclusive put of the next entry, and an
intent that carries ``until``, before which nobody else begins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import hashlib
import json
import os
import re
import secrets
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from . import _aws, _writer
from ._control import Context
from ._errors import Busy, FirebreakError, Refused, StoreUnavailable
from ._store import Store, local_folder, open_store

RUN = "_run"
NO_INCIDENT = "INC-0000-0000-000"
FIRST = "0" * 64
LARGE = 16 * 1024
LONGEST = 300.0  # seconds: no control claims a stream for longer
ENTRY = re.compile(r"(?!0{8})[0-9]{8}\.json")
KINDS = frozenset(
    [
        "opened",
        "note",
        "decision",
        "phase",
        "seal",
        "intent",
        "done",
        "failed",
        "refused",
        "override",
        "resumed",
        "check",
        "evidence",
        "clock",
        "notified",
        "released",
        "adopted",
        "erased",
        "closed",
    ]
)

# What a file that is no entry raises when it is taken for one.
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)

SPEC = _aws.SPEC


def preload() -> None:
    """The case's own client file is S3's."""
    _aws.preload()


def addresses(params: dict[str, Any]) -> list[str]:
    """Where the case store is, for the site guard."""
    uri = str(params.get("case_store") or "")
    if not uri.startswith("s3://"):
        return []
    place = _aws.S3Place.parse(uri)
    return [place.endpoint or f"https://s3.{place.region}.amazonaws.com"]


def canonical(document: Any) -> bytes:
    """The one spelling of a document, so that equal things have equal bytes."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def stamp(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def encode_host(host: str) -> str:
    """A host's name as one path element that cannot be taken for ``_run`` or for an evidence stream."""
    quoted = urllib.parse.quote(host, safe="")
    if quoted.startswith(("_", ".")):
        quoted = f"%{ord(quoted[0]):02X}{quoted[1:]}"
    return quoted.removesuffix(".evidence") + "%2Eevidence" if quoted.endswith(".evidence") else quoted


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a stream, as it is stored."""

    doc: dict[str, Any]

    @property
    def seq(self) -> int:
        return int(self.doc["seq"])

    @property
    def kind(self) -> str:
        return str(self.doc["kind"])

    @property
    def body(self) -> dict[str, Any]:
        return self.doc["body"]

    @property
    def digest(self) -> str:
        return str(self.doc["digest"])

    @property
    def run(self) -> str:
        return str(self.doc["run"])


def digest_of(doc: dict[str, Any]) -> str:
    return hashlib.sha256(canonical({key: value for key, value in doc.items() if key != "digest"})).hexdigest()


def intact(data: bytes, doc: dict[str, Any], body: bytes | None) -> bool:
    """Whether the bytes of an entry are those that its digest is of: all but the digest itself, which has one place only.

    Nothing is spelled anew, which makes reading a long case as fast as hashing it. ``body`` is the blob that the body went to.
    """
    place = f'"digest":"{doc["digest"]}",'.encode()
    before, found, after = data.partition(place + b'"incident":"')
    sha = hashlib.sha256()
    if body is not None:
        before = before.removesuffix(f'{{"blob":"{doc["body"]["blob"]}"}},'.encode())
        sha.update(before + body)
        before = b","
    sha.update(before + found[len(place) :] + after)
    return sha.hexdigest() == doc["digest"]


def blob_of(doc: dict[str, Any]) -> str | None:
    """The blob that an entry's body went to."""
    return doc["body"]["blob"] if doc["body"].keys() == {"blob"} else None


def numbers(names: Iterable[str]) -> list[int]:
    """The numbers of the entries among the names of a stream's files, of which there should be no others."""
    return [int(name[:8]) for name in names if ENTRY.fullmatch(name)]


def advance(live: list[dict[str, Any]], seq: int, kind: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """What is live for undo after one more entry: every intent that is not released, whatever became of it."""
    if kind == "intent":
        item = {
            key: body[key] for key in ("control", "what", "reversible", "releases", "at") if body.get(key) is not None
        }
        return [*live, {"seq": seq, "state": "open", **item}]
    if kind in ("done", "failed", "released"):
        gone = {body.get("of")} if kind == "released" else set()
        gone |= set(body.get("released", ()))
        result = []
        for item in live:
            release = item.get("releases")
            if item["seq"] in gone or (release and (item["seq"] == body.get("of") or release["seq"] in gone)):
                continue
            if item["seq"] == body.get("of"):
                item = {**item, "state": body.get("outcome", kind)}
            result.append(item)
        return result
    return live


def refusals(before: dict[str, Any], kind: str, body: dict[str, Any]) -> dict[str, Any]:
    """What was refused and not done since, after one more entry: by task, what it is about."""
    if kind == "refused" and "what" in body:
        before = {**before, body["what"]: {"control": body["control"], "about": body["about"]}}
    return {what: about for what, about in before.items() if what not in body.get("clears", ())}


class Moved(Exception):
    """Somebody else wrote the entry that we were about to write."""


class Stream:
    """One chain of entries, opened for one task."""

    def __init__(self, case: Case, name: str) -> None:
        self.case = case
        self.name = name
        self.folder = f"{case.id}/journal/{name}"
        self.head: Entry | None = None
        self.newest = 0
        self.locked = False
        self.resumed = False
        self.claimed_at = 0.0
        self.spooled: list[dict[str, Any]] = []
        self.tried: dict[str, Any] = {}

    def load(self) -> None:
        """Find the newest entry: one LIST and one GET."""
        self.find()
        self.head = self.entry(self.newest) if self.newest else None

    def find(self) -> None:
        """Which entry is the newest: one LIST."""
        self.newest = max(self.case.numbers(self.name), default=0)

    def entry(self, seq: int) -> Entry:
        return self.parse(seq, self.case.store.get(self.key(seq)))

    def key(self, seq: int) -> str:
        return f"{self.folder}/{seq:08d}.json"

    def parse(self, seq: int, data: bytes | None) -> Entry:
        """The entry that was read, when it is whole."""
        if data is None:
            raise self._damaged(seq, "missing")
        try:
            doc = json.loads(data)
            body = self.case.blob(doc)
            if not intact(data, doc, body):
                raise self._damaged(seq, "altered")
            return Entry(doc if body is None else {**doc, "body": json.loads(body)})
        except UNREADABLE:
            raise self._damaged(seq, "not readable") from None

    def _damaged(self, seq: int, how: str) -> StoreUnavailable:
        """Nothing is built on a damaged chain; what can be undone goes on without it, as when the store is lost."""
        return StoreUnavailable(f"case_store: entry {self.name}/{seq} of {self.case.id} is {how}; run verify_case")

    @property
    def live(self) -> list[dict[str, Any]]:
        return list(self.head.doc["live"]) if self.head else []

    def claim(self, seconds: float) -> dict[str, Any]:
        """Until when nobody else begins, in the store's time, and who we are. Our own deadline counts from the same moment."""
        self.claimed_at = self.case.context.clock()
        return {"until": round(self.case.store.at_latest() + seconds, 3), "writer": _writer.me()}

    def claimed(self, locked: bool = False) -> float:
        """For how many seconds, at most, another writer may be at work. Whoever holds a lock knows that none is, but for one
        on this machine that lost the store, and with it the lock."""
        if kept := _at_work(self):
            return kept
        if locked or self.head is None or self.head.kind not in ("intent", "resumed"):
            return 0.0
        if _writer.ended(self.head.body.get("writer")):
            return 0.0
        return max(0.0, float(self.head.body.get("until", 0)) - self.case.store.now())

    def append(self, kind: str, body: dict[str, Any], kept: dict[str, Any] | None = None) -> Entry:
        """Write the next entry; ``Moved`` where somebody else was faster. ``kept`` is what the spool knows of it."""
        seq = self.head.seq + 1 if self.head else 1
        doc = self.case.document(self.name, seq, kind, body, self.head, kept)
        stored = self.case.deflate(doc)
        # Where the store gives no answer, it may have taken the entry all the same: the spool keeps it under the same name.
        self.tried = {"body": body, "nonce": doc["nonce"]}
        if not self.case.store.create(self.key(seq), canonical(stored)):
            raise Moved
        self.tried = {}
        self.head = Entry(doc)
        return self.head

    @contextlib.contextmanager
    def writer(self, patience: float) -> Iterator[Stream]:
        """Become the only writer, where a lock can do that, and find the newest entry. ``settle`` comes next."""
        with self.case.store.exclusive(f"{self.case.id}/locks/{self.name}", patience) as self.locked:
            self.find()
            yield self

    def settle(self, patience: float) -> bool:
        """Wait for the writer before, and say ``resumed`` where that one died.

        True where there was none: then what was read of the service after ``find`` holds, for if anybody has written since,
        our own next entry is refused.
        """
        self.head = self.entry(self.newest) if self.newest else None
        ended = self.head is None or self.head.kind not in ("intent", "resumed", "closed")
        if ended and self.name not in spooled(self.case):
            return True
        while True:
            self.reload(patience, self.locked)
            with contextlib.suppress(Moved):  # another one took over: it is waited for
                merge_spool(self)
                if self.head is not None and self.head.kind in ("intent", "resumed"):
                    self.append("resumed", {"of": self.head.seq, **self.claim(patience)})
                    self.resumed = True
                return False

    def reload(self, patience: float, locked: bool = False) -> None:
        """Load the head, and wait while another writer may be at work."""
        self.resumed = False
        self.wait(2 * patience + 5, locked)
        if self.head is not None and self.head.kind == "closed":
            raise Refused(f"incident_id: {self.case.id} is closed; open a new incident (firebreak_incident_new)")

    def wait(self, seconds: float, locked: bool) -> None:
        """Load the head until nobody else is at work; what is waited for is told once."""
        context = self.case.context
        give_up = context.clock() + seconds
        self.load()
        if left := self.claimed(locked):
            run = self.head.run if self.head else ""
            context.tell(f"{self.name}: run {run} may still be at work here; going on in {left:.0f} s at the latest")
        while left := self.claimed(locked):
            if context.clock() >= give_up:
                raise Busy(
                    f"case_store: another run keeps writing for this host, for {left:.0f} s more; "
                    "wait for it to end, or end it, and try again"
                )
            context.sleep(0.2)
            self.load()


class Case:
    """One incident's record in one store."""

    def __init__(self, store: Store, incident: str, params: dict[str, Any], context: Context) -> None:
        self.store = store
        self.id = incident
        self.params = params
        self.context = context

    def stream(self, host: str, evidence: bool = False) -> Stream:
        if host == RUN:
            return Stream(self, RUN)
        return Stream(self, encode_host(host) + (".evidence" if evidence else ""))

    def document(
        self,
        stream: str,
        seq: int,
        kind: str,
        body: dict[str, Any],
        before: Entry | None,
        kept: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        if kind not in KINDS:
            raise ValueError(f"no such kind of entry: {kind}")
        doc = {
            "v": 1,
            "incident": self.id,
            "stream": stream,
            "seq": seq,
            "time": stamp(self.context.clock()),
            "run": self.context.run_id,
            "round": int(self.params.get("round") or 1),
            "phase": self.params.get("phase"),
            "actor": self.context.actor,
            "kind": kind,
            "body": body,
            "live": advance(list(before.doc["live"]) if before else [], seq, kind, body),
            "not_done": refusals(before.doc.get("not_done", {}) if before else {}, kind, body),
            "prev": before.digest if before else FIRST,
            "nonce": secrets.token_hex(8),
            **(kept or {}),
        }
        if self.context.secrets.found_in(doc):
            raise FirebreakError("internal: an entry would hold a secret; it was not written", effect="none")
        doc["digest"] = digest_of(doc)
        return doc

    def deflate(self, doc: dict[str, Any]) -> dict[str, Any]:
        """A large body goes to a blob, named by its hash; the chain covers the body itself."""
        data = canonical(doc["body"])
        if len(data) <= LARGE:
            return doc
        name = hashlib.sha256(data).hexdigest()
        self.store.create(f"{self.id}/blobs/{name}", data)
        return {**doc, "body": {"blob": name}}

    def blob(self, doc: dict[str, Any]) -> bytes | None:
        """The body of an entry whose body is large."""
        name = blob_of(doc)
        if name is None:
            return None
        data = self.store.get(f"{self.id}/blobs/{name}")
        if data is None or hashlib.sha256(data).hexdigest() != name:
            raise StoreUnavailable(f"case_store: blob {name} of {self.id} is missing or altered; run verify_case")
        return data

    def check_open(self, stream: Stream) -> None:
        """Refuse an unknown incident; a stream with entries proves that the incident exists."""
        if stream.head is None and self.store.get(f"{self.id}/journal/{RUN}/00000001.json") is None:
            raise Refused(
                f"incident_id: {self.id} is not in this case store; check firebreak_incident_id and case_store"
            )

    def check_halt(self) -> None:
        if self.store.get("HALT") is not None:
            raise Refused("HALT stands in the case store: every run but release stops", guard="halt")

    def record(self, stream_name: str, kind: str, body: dict[str, Any] | Callable[[], dict[str, Any]]) -> Entry:
        """Add an entry that claims nothing, however many others write beside us. A body that tells what others wrote is made
        once nobody else can write, and anew where somebody did."""
        return self._record(Stream(self, stream_name), kind, body)

    def keep(self, stream: Stream, kind: str, body: dict[str, Any]) -> Entry | None:
        """The same; while the store is lost the entry goes to the spool."""
        try:
            return self._record(stream, kind, body)
        except StoreUnavailable:
            spool(stream, kind, body)
            return None

    def _record(self, stream: Stream, kind: str, body: dict[str, Any] | Callable[[], dict[str, Any]]) -> Entry:
        with self.store.exclusive(f"{self.id}/locks/{stream.name}", 30) as locked:
            for attempt in range(60):
                stream.wait(LONGEST, locked)  # over an intent, an entry would hide that a writer is at work
                with contextlib.suppress(Moved):
                    return stream.append(kind, body() if callable(body) else body)
                self.context.sleep(0.02 * (1 + attempt % 5))
        raise StoreUnavailable("case_store: too many writers at once; run the same command again")

    def numbers(self, stream: str) -> list[int]:
        """The numbers of a stream's entries: one LIST."""
        return numbers(self.store.names(f"{self.id}/journal/{stream}"))

    def streams(self) -> dict[str, list[int]]:
        """The numbers of all entries, by stream."""
        return self.sorted_out(self.store.walk(f"{self.id}/journal"))[0]

    def sorted_out(self, keys: list[str]) -> tuple[dict[str, list[int]], list[str]]:
        """The numbers of the entries among the keys of the journal, by stream, and the keys of what is no entry."""
        start = len(f"{self.id}/journal/")
        files: dict[str, list[str]] = {}
        foreign: list[str] = []
        for key in keys:
            name, _slash, file = key[start:].partition("/")
            if ENTRY.fullmatch(file):
                files.setdefault(name, []).append(file)
            else:
                foreign.append(key)
        return {name: [int(file[:8]) for file in found] for name, found in files.items()}, foreign

    def heads(self) -> dict[str, Entry]:
        """The newest entry of each stream, fetched side by side."""
        newest = {name: seqs[-1] for name, seqs in self.streams().items()}
        return dict(zip(newest, self.fetch(list(newest.items())), strict=True))

    def fetch(self, places: list[tuple[str, int]]) -> list[Entry]:
        """Many entries at once; on S3 the waits overlap."""
        streams = [Stream(self, name) for name, _seq in places]
        keys = [stream.key(seq) for stream, (_name, seq) in zip(streams, places, strict=True)]
        read = zip(streams, places, self.store.many(keys), strict=True)
        return [stream.parse(seq, data) for stream, (_name, seq), data in read]

    def close(self) -> None:
        """Nothing is held open."""


def open_case(params: dict[str, Any], context: Context) -> Case:
    incident = params.get("incident_id")
    if not incident:
        raise Refused("incident_id: name the incident (firebreak_incident_id), or run firebreak.incident.open first")
    return Case(open_store(params, context), str(incident), params, context)


def connect(params: dict[str, Any], context: Context) -> Case:
    """The case as a service, for readers and gates."""
    return open_case(params, context)


# --- the spool: where entries go while the store is lost ---------------------------------------------------------------


def spool_folder(case: Case, stream: str) -> str:
    return os.path.join(local_folder(str(case.params.get("case_store"))), case.id, stream)


def spool(stream: Stream, kind: str, body: dict[str, Any]) -> str:
    """Keep an entry on this machine's disk, durably, until the store is back. Returns its name, by which others refer to it."""
    folder = spool_folder(stream.case, stream.name)
    context = stream.case.context
    if context.secrets.found_in(body):
        raise FirebreakError("internal: an entry would hold a secret; it was not written", effect="none")
    nonce = stream.tried["nonce"] if stream.tried.get("body") is body else secrets.token_hex(8)
    entry = {
        "kind": kind,
        "body": body,
        "time": stamp(context.clock()),
        "run": context.run_id,
        "kept": {
            "round": int(stream.case.params.get("round") or 1),
            "phase": stream.case.params.get("phase"),
            "actor": context.actor,
            "nonce": nonce,
        },
    }
    try:
        _keep(folder, canonical(entry))
    except OSError as exc:
        code = errno.errorcode.get(exc.errno or 0, "OSError")
        raise StoreUnavailable(
            f"case_store: it is lost, and the spool {folder} takes no entry either ({code}); set FIREBREAK_SPOOL"
        ) from None
    stream.spooled.append(entry)
    return nonce


def _keep(folder: str, data: bytes) -> None:
    os.makedirs(folder, mode=0o700, exist_ok=True)
    unfinished = os.path.join(folder, f".{secrets.token_hex(8)}")
    with open(unfinished, "xb", opener=_private) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    while True:
        number = max((int(name[:8]) + 1 for name in _kept(folder)), default=0)
        with contextlib.suppress(FileExistsError):  # another process of this machine has just kept one
            os.link(unfinished, os.path.join(folder, f"{number:08d}.json"))
            break
    os.unlink(unfinished)
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _at_work(stream: Stream) -> float:
    """Whether a process of this machine, which lost the store, is still at work for this stream."""
    kept = _spooled_of(stream.case, stream.name)
    if not kept or kept[-1]["kind"] not in ("intent", "resumed"):
        return 0.0
    writer = kept[-1]["body"].get("writer") or {}
    return 0.0 if _writer.ended(writer) or writer.get("pid") == os.getpid() else 1.0


def _kept(folder: str) -> list[str]:
    """The finished entries of a stream's spool, in their order."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


def spooled(case: Case) -> list[str]:
    """Streams of this case that still have entries on this machine only."""
    root = os.path.dirname(spool_folder(case, "x"))
    if not os.path.isdir(root):
        return []
    return sorted(name for name in os.listdir(root) if _kept(os.path.join(root, name)))


def spooled_entries(case: Case) -> dict[str, list[dict[str, Any]]]:
    """What is on this machine only, by stream, in its order."""
    return {stream: _spooled_of(case, stream) for stream in spooled(case)}


def _spooled_of(case: Case, stream: str) -> list[dict[str, Any]]:
    folder = spool_folder(case, stream)
    if not os.path.isdir(folder):
        return []
    return [entry for name in _kept(folder) if (entry := _spooled_entry(folder, name)) is not None]


def _spooled_entry(folder: str, name: str) -> dict[str, Any] | None:
    try:
        with open(os.path.join(folder, name), "rb") as file:
            return dict(json.loads(file.read()))
    except FileNotFoundError:  # another process of this machine has just brought it into the case
        return None


def merge_spools(case: Case) -> None:
    """Bring everything that is on this machine only into the case. What cannot go now goes with the stream's next writer."""
    for name in spooled(case):
        stream = Stream(case, name)
        with (
            contextlib.suppress(Moved, Busy, StoreUnavailable),
            case.store.exclusive(f"{case.id}/locks/{name}", 1) as locked,
        ):
            stream.load()
            if not stream.claimed(locked):
                merge_spool(stream)


def merge_spool(stream: Stream) -> None:
    """Bring spooled entries into the stream, in their order, once; each says when and by which run it was first kept."""
    folder = spool_folder(stream.case, stream.name)
    names = _kept(folder) if os.path.isdir(folder) else []
    if not names:
        return
    # An entry may be there already: its answer was lost, or a merge was cut off.
    newest = stream.head.seq if stream.head else 0
    there = {entry.doc["nonce"]: entry.seq for entry in (stream.entry(seq) for seq in range(1, newest + 1))}
    for name in names:
        entry = _spooled_entry(folder, name)
        if entry is None:
            continue
        nonce = entry["kept"]["nonce"]
        if nonce not in there:
            body = {**entry["body"], "spooled": {"time": entry["time"], "run": entry["run"]}}
            body.pop("until", None)  # it was counted by another clock than the store's, and its writer has ended
            if isinstance(body.get("of"), str):
                body["of"] = there.get(body["of"])
            there[nonce] = stream.append(entry["kind"], body, entry["kept"]).seq
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, name))
