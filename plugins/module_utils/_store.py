# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""Case stores: where entries are created once and never rewritten.

Both stores offer the same few calls. A key is a path with slashes, without a leading one. Every failure of the store itself is
``StoreUnavailable``; that a key exists already is an answer, not a failure.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import io
import math
import os
import pathlib
import re
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, TypeAlias

from . import _aws
from ._control import Context
from ._errors import Busy, Refused, StoreUnavailable

BLOCK = 1 << 20
SMALL = 1 << 16
PART = 8 << 20
MOST = 64 << 20
SILENCE_SECONDS = 30
CLAIMS = "keys"
IN_A_CASE = re.compile(r"INC-(?!0000)[^/]+")
SIDE_BY_SIDE = 16


def local_folder(store: str) -> str:
    """Where this machine keeps what it cannot put into a store that is lost."""
    base = os.environ.get("FIREBREAK_SPOOL") or os.path.join(
        os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"), "firebreak", "spool"
    )
    return os.path.join(base, hashlib.sha256(store.encode()).hexdigest()[:16])


def attempt(call: Callable[[], Any], future: concurrent.futures.Future[Any] | None = None) -> Callable[[], Any]:
    """Do it now; what it returned or raised is handed out when asked for."""
    future = future or concurrent.futures.Future()
    try:
        future.set_result(call())
    except Exception as failure:
        future.set_exception(failure)
    return future.result


class FileStore:
    """``file:///folder``: one file an entry, made durable before its name appears."""

    scheme = "file"

    def __init__(self, folder: str, context: Context) -> None:
        self.folder = pathlib.Path(folder)
        self._context = context

    def now(self) -> float:
        return self._context.clock()

    at_latest = now

    def beside(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """A disk answers at once: it is asked when the answer is wanted."""
        return call

    def names(self, prefix: str) -> list[str]:
        """Names directly below ``prefix``, sorted."""
        with self._errors("read"):
            try:
                return sorted(name for name in os.listdir(self.folder / prefix) if not name.startswith("."))
            except FileNotFoundError:
                self._expect(prefix)
                return []

    def walk(self, prefix: str) -> list[str]:
        """All keys below ``prefix``, sorted."""
        return self.survey(prefix)[0]

    def survey(self, prefix: str) -> tuple[list[str], dict[str, str]]:
        """The same, and the keys that ``create`` cannot have written, with what shows it. Content shows in the chain only."""
        with self._errors("read"):
            files, others = self._below(prefix)
        return sorted(files), dict.fromkeys(others, "it is a link or no file")

    def _below(self, prefix: str) -> tuple[list[str], list[str]]:
        """Files below ``prefix``, and what is neither file nor folder. No link is followed, no unfinished file is told."""
        files: list[str] = []
        others: list[str] = []
        folders = [prefix]
        while folders:
            folder = folders.pop()
            with contextlib.suppress(FileNotFoundError), os.scandir(f"{self.folder}/{folder}") as listing:
                for entry in listing:
                    name = entry.name
                    if name[0] == ".":
                        continue
                    if entry.is_file(follow_symlinks=False):
                        files.append(f"{folder}/{name}")
                    elif entry.is_dir(follow_symlinks=False):
                        folders.append(f"{folder}/{name}")
                    else:
                        others.append(f"{folder}/{name}")
        return files, others

    def get(self, key: str) -> bytes | None:
        with self._errors("read"):
            data = _read(f"{self.folder}/{key}")
            if data is None:
                self._expect(key)
            return data

    def many(self, keys: Iterable[str]) -> Iterator[bytes | None]:
        """What ``get`` returns, of each key in turn. Of what is too long for an entry its beginning only."""
        folder = f"{self.folder}/"
        with self._errors("read"):
            for key in keys:
                yield _read(folder + key, MOST)

    def digest(self, key: str) -> str | None:
        """The SHA-256 of what may be too large for the memory."""
        with self._errors("read"):
            try:
                with open(self.folder / key, "rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def create(self, key: str, data: bytes) -> bool:
        """Write a new key. False where it exists with other content; the same content again is a success."""
        with self._errors("write"):
            self._expect(key)
            target = self.folder / key
            _make_folder(target.parent)
            # link(2) fails where the name exists. O_EXCL would leave an empty entry after a kill between open and write.
            with self._temporary(target.parent) as (name, stream):
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
                try:
                    os.link(name, target)
                except FileExistsError:
                    return target.read_bytes() == data
            _sync_folder(target.parent)
            return True

    def replace(self, key: str, data: bytes) -> None:
        """Write a view, which may be made anew at any time."""
        self.put_file(key, io.BytesIO(data))

    def put_file(self, key: str, source: BinaryIO) -> None:
        """Copy a file in, whole or not at all. An artefact's key names its content's hash, so an existing one is the same."""
        with self._errors("write"):
            self._expect(key)
            target = self.folder / key
            _make_folder(target.parent)
            with self._temporary(target.parent) as (name, stream):
                while block := source.read(BLOCK):
                    stream.write(block)
                stream.flush()
                os.fsync(stream.fileno())
                os.replace(name, target)
            _sync_folder(target.parent)

    def size(self, key: str) -> int | None:
        with self._errors("read"):
            try:
                return (self.folder / key).stat().st_size
            except FileNotFoundError:
                return None

    @contextlib.contextmanager
    def exclusive(self, key: str, patience: float) -> Iterator[bool]:
        """Hold the only writer's lock. The kernel frees it when its holder dies."""
        with self._errors("lock"):
            self._expect(key)
            _make_folder((self.folder / key).parent)
            descriptor = os.open(self.folder / key, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            until = self._context.clock() + patience
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as exc:
                    if exc.errno not in (errno.EAGAIN, errno.EACCES):
                        raise StoreUnavailable(
                            f"case_store: locking failed ({errno.errorcode.get(exc.errno or 0)})"
                        ) from None
                if self._context.clock() >= until:
                    raise Busy(
                        f"case_store: another run has been writing for this host for {patience:.0f} s; "
                        "wait for it to end, or end it, and run the same command again"
                    )
                self._context.sleep(0.05)
            yield True
        finally:
            os.close(descriptor)

    def _expect(self, key: str) -> None:
        """Where there is a case, there is a claim of one. A folder without is a file system that is not mounted: nothing is
        written into it that would lie hidden below, once it is mounted again."""
        case = IN_A_CASE.match(key)
        if case and not any((self.folder / name).is_dir() for name in (case[0], CLAIMS)):
            raise StoreUnavailable(
                f"case_store: {self.folder} holds no case at all, nor {case[0]}; mount the file system, "
                "or check firebreak_case_store and firebreak_incident_id"
            )

    @contextlib.contextmanager
    def _temporary(self, folder: pathlib.Path) -> Iterator[tuple[str, BinaryIO]]:
        descriptor, name = tempfile.mkstemp(prefix=".new-", dir=folder)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                yield name, stream
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)

    @contextlib.contextmanager
    def _errors(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            code = errno.errorcode.get(exc.errno or 0, "OSError")
            remedy = {"ENOSPC": "free disk space", "EROFS": "name a folder on a writable file system"}.get(
                code, "name a folder that this user may write to"
            )
            raise StoreUnavailable(f"case_store: cannot {verb} {self.folder} ({code}); {remedy}") from None


def _read(path: str, most: float = math.inf) -> bytes | None:
    """A file's content in as few calls as there can be; a pipe in its place does not make us wait."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        data = os.read(descriptor, SMALL)
        if len(data) < SMALL:
            return data
        blocks = [data]
        while len(blocks) * BLOCK < most and (block := os.read(descriptor, BLOCK)):
            blocks.append(block)
        return b"".join(blocks)
    finally:
        os.close(descriptor)


def _make_folder(folder: pathlib.Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        _sync_folder(folder.parent)


def _sync_folder(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class S3Store:
    """``s3://bucket/prefix``: put-if-absent, each object under Object Lock retention of its own."""

    scheme = "s3"

    def __init__(self, place: _aws.S3Place, params: dict[str, Any], context: Context) -> None:
        self._place = place
        self._context = context
        # How far the store's clock is ahead of ours, at least and at most.
        self._ahead = (0.0, 0.0)
        self._silence = os.path.join(local_folder(str(params.get("case_store"))), f"silent-{context.run_id}")
        self._s3 = _aws.s3_client(place, params, context)

    def now(self) -> float:
        """The store's time, as its last answer told it: one clock for all machines. It is this late at least."""
        return self._context.clock() + self._ahead[0]

    def at_latest(self) -> float:
        """The same; it is no later than this. A claim that ends then has ended for whoever asks ``now``."""
        return self._context.clock() + self._ahead[1]

    def beside(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Ask now and wait later. A daemon thread, so that a store that hangs keeps no worker from ending."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        threading.Thread(target=attempt, args=(call, future), daemon=True).start()
        return future.result

    def names(self, prefix: str) -> list[str]:
        below = self._folder(prefix)
        found = []
        for page in self._pages(Prefix=below, Delimiter="/"):
            found += [entry["Key"][len(below) :] for entry in page.get("Contents", [])]
            found += [entry["Prefix"][len(below) :].rstrip("/") for entry in page.get("CommonPrefixes", [])]
        return sorted(found)

    def walk(self, prefix: str) -> list[str]:
        below = self._folder(prefix)
        start = len(self._key(""))
        return sorted(entry["Key"][start:] for page in self._pages(Prefix=below) for entry in page.get("Contents", []))

    def get(self, key: str) -> bytes | None:
        answer = self._call("get_object", Key=self._key(key), missing=True)
        return None if answer is None else bytes(answer["Body"])

    def many(self, keys: Iterable[str]) -> Iterator[bytes | None]:
        """What ``get`` returns, of each key in turn; the waits overlap, and few answers are held at a time."""
        waiting: collections.deque[concurrent.futures.Future[bytes | None]] = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            for key in keys:
                waiting.append(pool.submit(self.get, key))
                if len(waiting) >= 2 * SIDE_BY_SIDE:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def digest(self, key: str) -> str | None:
        """The SHA-256 of what may be too large for the memory."""
        sha, start, size = hashlib.sha256(), 0, self.size(key)
        while size is not None and start < size:
            answer = self._call("get_object", Key=self._key(key), Range=f"bytes={start}-{start + PART - 1}")
            sha.update(answer["Body"])
            start += len(answer["Body"])
        return None if size is None else sha.hexdigest()

    def create(self, key: str, data: bytes) -> bool:
        # The entry carries a nonce: the same bytes mean that our own answer was lost.
        return self._put_new(key, lambda: data) or self.get(key) == data

    def replace(self, key: str, data: bytes) -> None:
        """A view is not locked, so that it can be made anew."""
        self._call("put_object", Key=self._key(key), Body=data)

    def put_file(self, key: str, source: BinaryIO) -> None:
        def rewound() -> BinaryIO:
            source.seek(0)
            return source

        self._put_new(key, rewound)  # a second version of an artefact would be taken for a forgery

    def size(self, key: str) -> int | None:
        answer = self._call("head_object", Key=self._key(key), missing=True)
        return None if answer is None else int(answer["ContentLength"])

    def survey(self, prefix: str) -> tuple[list[str], dict[str, str]]:
        """The same, and keys with more than one version, or with a delete marker: somebody wrote over an entry, or hid it."""
        start = len(self._key(""))
        seen: dict[str, int] = {}
        bad: dict[str, str] = {}
        marker: dict[str, Any] = {}
        while True:
            page = self._call("list_object_versions", Prefix=self._folder(prefix), **marker)
            for entry in page.get("Versions", []):
                seen[entry["Key"]] = seen.get(entry["Key"], 0) + 1
            for entry in page.get("DeleteMarkers", []):
                bad[entry["Key"][start:]] = "it was deleted (a delete marker stands over it)"
            if not page.get("IsTruncated"):
                break
            marker = {"KeyMarker": page["NextKeyMarker"], "VersionIdMarker": page.get("NextVersionIdMarker", "")}
        for key, versions in seen.items():
            if versions > 1:
                bad.setdefault(key[start:], f"it was written over ({versions} versions)")
        return self.walk(prefix), bad

    @contextlib.contextmanager
    def exclusive(self, key: str, patience: float) -> Iterator[bool]:
        """There are no locks in S3: the exclusive put of the intent is the claim."""
        yield False

    def _key(self, key: str) -> str:
        return f"{self._place.prefix}/{key}" if self._place.prefix else key

    def _folder(self, prefix: str) -> str:
        key = self._key(prefix)
        return key if not key or key.endswith("/") else f"{key}/"

    def _pages(self, **arguments: Any) -> Iterator[dict[str, Any]]:
        token: dict[str, Any] = {}
        while True:
            page = self._call("list_objects_v2", **arguments, **token)
            yield page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _put_new(self, key: str, body: Callable[[], bytes | BinaryIO]) -> bool:
        """Put what is not there yet. False where it is."""
        for _attempt in range(4):
            lock = self._place.lock(self.now())
            try:
                self._call("put_object", Key=self._key(key), Body=body(), IfNoneMatch="*", **lock)
                return True
            except _aws.Answer as answer:
                if answer.code == "PreconditionFailed":
                    return False
                if answer.code not in ("ConditionalRequestConflict", "OperationAborted"):
                    raise StoreUnavailable(answer.text("put an entry into case_store")) from None
            self._context.sleep(0.05)
        raise StoreUnavailable("case_store: the bucket keeps answering 409 to a conditional put; try again")

    def _silent(self) -> bool:
        """Whether the store gave another task of this run no answer just now: then not every task waits for it again."""
        try:
            return time.time() - os.stat(self._silence).st_mtime < SILENCE_SECONDS
        except OSError:
            return False

    def _note_silence(self) -> None:
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(self._silence), mode=0o700, exist_ok=True)
            pathlib.Path(self._silence).touch(mode=0o600)

    def _call(self, operation: str, missing: bool = False, **arguments: Any) -> Any:
        if self._silent():
            raise StoreUnavailable(
                "case_store: it has just given no answer in this run; repair it and run the same command again"
            )
        asked = self._context.clock()
        try:
            answer = _aws.call(self._s3, operation, Bucket=self._place.bucket, **arguments)
        except _aws.Answer as failure:
            if missing and failure.status == 404 and failure.code != "NoSuchBucket":
                return None
            if operation == "put_object" and failure.status in (409, 412):
                raise
            raise StoreUnavailable(failure.text(f"{operation} in case_store")) from None
        except StoreUnavailable:
            self._note_silence()
            raise
        told = _aws.server_time(answer)
        if told is not None:  # in whole seconds, at some moment between question and answer
            self._ahead = (told - self._context.clock(), told + 1 - asked)
        return answer


Store: TypeAlias = "FileStore | S3Store"


def open_store(params: dict[str, Any], context: Context) -> Store:
    """The store that the option ``case_store`` names."""
    uri = params.get("case_store")
    if not uri:
        raise Refused("case_store: name the case store (set firebreak_case_store), for example s3://bucket/prefix?...")
    parts = urllib.parse.urlsplit(str(uri))
    if parts.scheme == "file" and parts.path.startswith("/") and not parts.netloc:
        if params.get("site") != "lab" and _inside_throw_away_job():
            raise Refused(
                "case_store: file:// would be lost with this job's disk; name an s3:// store in firebreak_case_store"
            )
        return FileStore(urllib.parse.unquote(parts.path), context)
    if parts.scheme == "s3" and parts.netloc:
        return S3Store(_aws.S3Place.parse(str(uri)), params, context)
    raise Refused(
        "case_store: give file:///absolute/folder or s3://bucket/prefix?region=..&lock_mode=..&retention_days=.."
    )


def _inside_throw_away_job() -> bool:
    return (
        bool(os.environ.get("JOB_ID") and os.environ.get("AWX_PRIVATE_DATA_DIR"))
        or "AWX_ISOLATED_DATA_DIR" in os.environ
    )
