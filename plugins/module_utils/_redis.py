# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""Redis and Valkey: options, connection, and the sweep of keys.

RESP 2 on purpose: no HELLO before AUTH, and redirected invalidation messages come on a plain subscription.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from ._control import Context
from ._deps import require
from ._errors import FirebreakError, Refused, Unproven
from ._redact import Held

REQUIRED = ("redis_host",)
SPEC: dict[str, Any] = {
    "redis_host": {"type": "str"},
    "redis_port": {"type": "int", "default": 6379},
    "redis_username": {"type": "str"},
    "redis_password": {"type": "str", "no_log": True},
    "redis_db": {"type": "int", "default": 0},
    "redis_tls": {"type": "bool", "default": False},
}
CONNECT_SECONDS = 5
ANSWER_SECONDS = 10
OLDEST_SERVER = (6, 2)
# The codes of errors that the server itself has; a script's, a module's or a proxy's could be any word.
CODES = frozenset(
    [
        *("ASK", "BUSY", "BUSYKEY", "CLUSTERDOWN", "CROSSSLOT", "ERR", "EXECABORT", "LOADING", "MASTERDOWN", "MISCONF"),
        *("MOVED", "NOAUTH", "NOPERM", "NOPROTO", "NOREPLICAS", "NOSCRIPT", "OOM", "READONLY", "TRYAGAIN", "WRONGPASS"),
        *("WRONGTYPE",),
    ]
)
LATE = "deadline: the sweep did not end in time."
MOST_PASSES = 5
MOST_REMEMBERED = 500
# A request that took an old session just before the last look may write its successor a moment later.
GRACE_SECONDS = 0.1
INVALIDATIONS = b"__redis__:invalidate"

Pick = Callable[[list[bytes]], list[bytes]]
Condemn = Callable[[list[bytes], list[bytes | None]], list[bytes]]

_redis: ModuleType | None = None


def preload() -> None:
    global _redis
    _redis = require("redis", "redis", "8.0")


def addresses(params: dict[str, Any]) -> list[str]:
    return [params["redis_host"]]


def connect(params: dict[str, Any], context: Context) -> Client:
    preload()
    password = params.get("redis_password") or context.env.get("REDISCLI_AUTH")
    context.secret(password)
    return Client(_redis, params, password, context)


class Client:
    """One server. Errors name the action and the server's error code; no key and no value gets into a message."""

    def __init__(self, redis: Any, params: dict[str, Any], password: str | None, context: Context) -> None:
        self.held = Held()
        self.clock = context.clock
        self._context = context
        self._sdk = redis
        left = self._context.at_most(ANSWER_SECONDS)
        self._redis = redis.Redis(
            host=params["redis_host"],
            port=params["redis_port"],
            db=params["redis_db"],
            username=params.get("redis_username"),
            password=password,
            ssl=params["redis_tls"],
            socket_connect_timeout=min(CONNECT_SECONDS, left),
            socket_timeout=left,
            retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0),
            protocol=2,
            driver_info=None,
        )

    def close(self) -> None:
        self._redis.close()

    def identity(self) -> dict[str, list[str]]:
        """How the server sees this connection. Over a Unix socket there is no address."""
        line = _text(self._call("ask who we are", "CLIENT", "INFO", effect="none"))
        seen = dict(word.split("=", 1) for word in line.split() if "=" in word)
        address = seen.get("addr", "").rpartition(":")[0].strip("[]")
        return {
            "roles": [seen["user"]] if seen.get("user") else [],
            "addresses": [address] if address and not address.startswith("/") else [],
        }

    def primary(self) -> None:
        """Refuse everything but one writable primary that holds all keys."""
        hello = self._call("ask for the role of the server", "HELLO", effect="none")
        known = dict(zip(map(_text, hello[::2]), map(_text, hello[1::2]), strict=True))
        version = tuple(int(part) for part in re.findall(r"\d+", known.get("version", "0"))[:2])
        if known.get("mode") != "standalone":
            raise Refused("redis_host: a cluster or sentinel node answers; only a standalone primary is supported")
        if known.get("role") != "master":
            raise Refused("redis_host: this server is a replica; name its primary")
        if known.get("server") == "redis" and version < OLDEST_SERVER:
            raise Refused("redis_host: the server is older than Redis 6.2")

    def size(self) -> int:
        return int(self._call("count the keys", "DBSIZE", effect="none"))

    def get(self, key: str) -> str | None:
        value = self._call("read a key", "GET", key, effect="none")
        return None if value is None else _text(value)

    def put(self, key: str, value: str, expire_at: int | None) -> None:
        """Set a key, conditionally on nothing; the same write twice is the same state."""
        expiry = ("EXAT", expire_at) if expire_at and expire_at > self.clock() else ()
        self._call("write a key", "SET", key, value, *expiry)
        self._context.effective()

    def existing(self, keys: list[bytes]) -> int:
        return int(self._call("look for keys", "EXISTS", *keys, effect="none")) if keys else 0

    def values(self, keys: list[bytes]) -> list[bytes | None]:
        return self._call("read keys", "MGET", *keys, effect="none") if keys else []

    def sample(self, pages: int, count: int) -> tuple[list[bytes], bool]:
        """The names on the first pages of a scan, and whether that was all. Hashing makes them a fair sample."""
        cursor: Any = b"0"
        names: list[bytes] = []
        for _page in range(pages):
            cursor, page = self._call("scan the keys", "SCAN", cursor, "COUNT", count, effect="none")
            names += page
            if cursor == b"0":
                return names, True
        return names, False

    def sweep(self, match: bytes, pick: Pick, condemn: Condemn | None, count: int, seconds: float) -> int:
        """Unlink what ``pick`` takes of every page of one full scan; returns how many keys went.

        Two connections overlap: while the server unlinks a page, or reads its values for ``condemn`` to choose among them,
        the next page is already asked for.
        """
        with self._translated("sweep the keys"), self._connections() as new:
            work = self._work(new, condemn)
            return self._scan_once(new, match, pick, work, count, time.monotonic() + self._context.at_most(seconds))

    def sweep_until_none(
        self, match: bytes, pick: Pick, condemn: Condemn, count: int, seconds: float, prefix: bytes
    ) -> int:
        """Sweep, and again until a full scan finds nothing.

        From the second scan on the server tells which keys below ``prefix`` others write, and these are looked at as well:
        a key that is renewed under a new name faster than the scan goes round would slip through every scan.
        """
        until = time.monotonic() + self._context.at_most(seconds)
        revoked = self.sweep(match, pick, condemn, count, seconds)
        with self._translated("sweep the keys"), self._connections() as new:
            work = self._work(new, condemn)
            watch = self._watch(new(), work.writer, prefix)
            for _pass in range(MOST_PASSES):
                found = self._scan_once(new, match, pick, work, count, until, watch)
                revoked += found
                if not found:
                    return revoked
        raise Unproven("every full scan finds further sessions from before: the application writes them back")

    def _work(self, new: Callable[[], Any], condemn: Condemn | None) -> _Work:
        return _Work(new(), condemn, self._context)

    def _scan_once(
        self,
        new: Callable[[], Any],
        match: bytes,
        pick: Pick,
        work: _Work,
        count: int,
        until: float,
        watch: _Watch | None = None,
    ) -> int:
        gone = 0
        for page in _scan(new(), match, count):
            if time.monotonic() > until:
                raise FirebreakError(f"{LATE} {gone} keys went in the last scan.")
            keys = pick(page + (watch.changed() if watch else []))
            self._remember(keys)
            gone += work.feed(keys)
        gone += work.drain()
        return gone + (_settle(watch, work, pick, until) if watch else 0)

    def _remember(self, keys: list[bytes]) -> None:
        """A few of the names, for the proof."""
        remembered = self.held.setdefault("swept", [])
        remembered += keys[: max(0, min(10, MOST_REMEMBERED - len(remembered)))]

    def _watch(self, listener: Any, writer: Any, prefix: bytes) -> _Watch | None:
        try:
            return _Watch(listener, writer, prefix)
        except self._sdk.exceptions.ResponseError:
            return None  # tracking is not permitted here: the scans alone have to show that nothing is left

    @contextmanager
    def _connections(self) -> Iterator[Callable[[], Any]]:
        taken: list[Any] = []

        def new() -> Any:
            taken.append(self._redis.connection_pool.get_connection())
            return taken[-1]

        try:
            yield new
        finally:  # answers may be under way, and tracking is on: never to be used again
            for connection in taken:
                connection.disconnect()
                self._redis.connection_pool.release(connection)

    def _call(self, action: str, *command: Any, effect: str = "unknown") -> Any:
        self._context.still_ours()
        with self._translated(action, effect), self._connection() as connection:
            return _ask(connection, *command)

    @contextmanager
    def _connection(self) -> Iterator[Any]:
        pool = self._redis.connection_pool
        connection = pool.get_connection()
        try:
            yield connection
        except self._sdk.exceptions.ResponseError:
            raise
        except BaseException:
            connection.disconnect()
            raise
        finally:
            pool.release(connection)

    @contextmanager
    def _translated(self, action: str, effect: str = "unknown") -> Iterator[None]:
        try:
            yield
        except (self._sdk.exceptions.RedisError, OSError) as exc:
            raise self._error(action, exc, effect) from None

    def _error(self, action: str, exc: Exception, effect: str) -> FirebreakError:
        sdk = self._sdk.exceptions
        code = getattr(exc, "status_code", None) or ""
        code = code if code in CODES else code and "an error"
        if isinstance(exc, sdk.AuthenticationError):
            return FirebreakError(
                f"Redis, {action}: {code or 'NOAUTH'}: redis_username or redis_password is missing or wrong",
                effect="none",
            )
        if isinstance(exc, sdk.TimeoutError | TimeoutError):
            return FirebreakError(f"Redis, {action}: no answer in time from redis_host, redis_port", effect=effect)
        if isinstance(exc, sdk.ConnectionError | OSError) and not code:
            return FirebreakError(f"Redis, {action}: no connection to redis_host, redis_port", effect=effect)
        if isinstance(exc, sdk.ReadOnlyError):
            return FirebreakError(f"Redis, {action}: READONLY: this server is a replica", effect="none")
        if isinstance(exc, sdk.NoPermissionError):
            return FirebreakError(
                f"Redis, {action}: NOPERM: the ACL of redis_username does not allow it", effect=effect
            )
        if not code:
            code = next((word for word in str(exc).split(" ")[:1] if word in CODES), type(exc).__name__)
        return FirebreakError(f"Redis, {action}: the server answered {code}", effect=effect)


class _Work:
    """Unlinks pages, one behind the scan: what is sent for a page is answered when the next one comes."""

    def __init__(self, writer: Any, condemn: Condemn | None, context: Context) -> None:
        self.writer = writer
        self._context = context
        self._condemn = condemn
        self.condemned = 0
        self._unlinking = False
        self._reading: list[bytes] = []

    def feed(self, keys: list[bytes]) -> int:
        gone, doomed = self._answers()
        read = keys if self._condemn else []
        self._send(doomed if self._condemn else keys, read)
        return gone

    def drain(self) -> int:
        gone, doomed = self._answers()
        self._send(doomed, [])
        return gone + self._answers()[0]

    def _send(self, doomed: list[bytes], read: list[bytes]) -> None:
        commands = [("UNLINK", *doomed)] if doomed else []
        commands += [("MGET", *read)] if read else []
        self._unlinking, self._reading = bool(doomed), read
        if commands:
            self._context.still_ours()
            self.writer.send_packed_command(self.writer.pack_commands(commands))

    def _answers(self) -> tuple[int, list[bytes]]:
        gone = int(self.writer.read_response()) if self._unlinking else 0
        if gone:  # told at once: the very next answer may be an error
            self._context.effective()
        self._unlinking = False
        if not self._reading or not self._condemn:
            return gone, []
        keys, self._reading = self._reading, []
        doomed = self._condemn(keys, self.writer.read_response())
        self.condemned += len(doomed)
        return gone, doomed


class _Watch:
    """What other clients write below a prefix, told by the server (client side caching's broadcast mode)."""

    def __init__(self, listener: Any, writer: Any, prefix: bytes) -> None:
        self._listener = listener
        number = _ask(listener, "CLIENT", "ID")
        _ask(listener, "SUBSCRIBE", INVALIDATIONS)
        # NOLOOP: the writer's own unlinks are not news.
        _ask(writer, "CLIENT", "TRACKING", "ON", "REDIRECT", number, "BCAST", "PREFIX", prefix, "NOLOOP")

    def changed(self) -> list[bytes]:
        names: list[bytes] = []
        while self._listener.can_read(0):
            names += self._listener.read_response()[-1] or []  # none when the whole database was flushed
        return names

    def settled(self) -> list[bytes]:
        """All that was written before this call. The server tells it at the end of its turn: hence two of them."""
        names: list[bytes] = []
        for _turn in range(2):
            self._listener.send_command("PING")
            while (message := self._listener.read_response())[0] != b"pong":
                names += message[-1] or []
        return names


def _settle(watch: _Watch, work: _Work, pick: Pick, until: float) -> int:
    """Follow what is written until nothing of it is old, nor gone again when it is looked at, twice."""
    gone = quiet = 0
    while quiet < 2:
        if time.monotonic() > until:
            raise FirebreakError(LATE)
        condemned = work.condemned
        gone += work.feed(pick(watch.settled())) + work.drain()
        quiet = quiet + 1 if work.condemned == condemned else 0
        if quiet == 1:
            time.sleep(GRACE_SECONDS)
    return gone


def _scan(connection: Any, match: bytes, count: int) -> Iterator[list[bytes]]:
    def ask(cursor: bytes) -> None:
        connection.send_command("SCAN", cursor, "MATCH", match, "COUNT", count)

    ask(b"0")
    while True:
        cursor, page = connection.read_response()
        if cursor == b"0":
            yield page
            return
        ask(cursor)
        yield page


def _ask(connection: Any, *command: Any) -> Any:
    connection.send_command(*command)
    return connection.read_response()


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
