# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A thief with stolen credentials: tries each of its doors again and again, and notes each success and refusal.

A door is closed when every way to it refused three times in a row. A server that is down has refused nothing.
"""

from __future__ import annotations

import dataclasses
import hmac
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import psycopg.conninfo

from . import files
from .actor import Client, Ledger, Unreachable
from .app import sign
from .tcp_proxy import TcpProxy

ADDRESS = "127.66.0.66"  # 198.51.100.66 for the edge
EVERY = 0.2
EVERY_WHEN_CLOSED = 1.0
IN_A_ROW = 3
REFUSALS = (
    "password authentication failed", "not permitted to log in", "too many connections for role", "pg_hba.conf",
    "permission denied", "terminating connection due to administrator command", "not currently accepting connections",
)  # fmt: skip


class Refused(Exception):
    """A clear no."""


@dataclasses.dataclass
class Way:
    """One way to a door: through the edge, past it, or straight to the server."""

    door: str
    name: str
    attempt: Callable[[], int]  # how many things were taken
    taken: list[float] = dataclasses.field(default_factory=list)
    refused: int = 0
    unreachable: int = 0
    first_refused_at: float | None = None
    refused_since: float | None = None  # the first refusal after the last success
    in_a_row: int = 0

    @property
    def closed(self) -> bool:
        return self.in_a_row >= IN_A_ROW

    def note(self, outcome: str, now: float) -> None:
        if outcome == "taken":
            self.taken.append(now)
            self.in_a_row, self.refused_since = 0, None
        elif outcome == "refused":
            self.refused += 1
            self.in_a_row += 1
            self.first_refused_at = self.first_refused_at or now
            self.refused_since = self.refused_since or now
        else:
            self.unreachable += 1


def _checked(status: int) -> None:
    if status in (401, 403, 429):
        raise Refused(str(status))
    if status >= 300:
        raise Unreachable(str(status))


class Web:
    """The doors of the application, one way of reaching it."""

    def __init__(self, url: str, stolen: dict[str, str], way: str) -> None:
        self._url = url
        self._stolen = stolen
        self._refresh_token = stolen[way]
        self._users = itertools.cycle(range(1, 201))
        self._clients = {door: Client(url, ADDRESS) for door in ("jwt", "refresh", "webhook")}
        self._payments = itertools.count(1)

    def jwt(self) -> int:
        """A forged token reads somebody's profile."""
        claims = {"sub": str(next(self._users)), "iat": int(time.time()), "exp": int(time.time()) + 600}
        token = sign(claims, self._stolen["jwt_secret"])
        status, _unused = self._clients["jwt"].send("GET", "/api/me", Authorization=f"Bearer {token}")
        _checked(status)
        return 1

    def refresh(self) -> int:
        """A stolen session is kept alive."""
        status, body = self._clients["refresh"].send(
            "POST", "/api/auth/refresh", {"refresh_token": self._refresh_token}
        )
        _checked(status)
        self._refresh_token = str(body["refresh_token"])
        return 1

    def webhook(self) -> int:
        """A payment that nobody made."""
        body = json.dumps({"reference": f"forged-{next(self._payments)}", "amount": 100}).encode()
        signature = hmac.digest(self._stolen["webhook_secret"].encode(), body, "sha256").hex()
        status, _unused = self._clients["webhook"].send("POST", "/hooks/payment", body, **{"X-Signature": signature})
        _checked(status)
        return 1


class Database:
    """The doors of the database: the password of a role."""

    def __init__(self, port: int, password: str) -> None:
        self._where = psycopg.conninfo.make_conninfo(
            host="127.0.0.1", port=port, dbname="divan", user="reporting", password=password,
            connect_timeout=5, sslmode="disable", gssencmode="disable",
        )  # fmt: skip
        self._session: psycopg.Connection[Any] | None = None

    def steal(self) -> int:
        """A new login each time."""
        try:
            with psycopg.connect(self._where, autocommit=True) as connection:
                return len(connection.execute("SELECT email, password_hash FROM users LIMIT 50").fetchall())
        except psycopg.Error as error:
            raise _verdict(error) from None

    def tamper(self) -> int:
        """One session, open all the time, that writes; a thief lifts a mere default."""
        try:
            if self._session is None or self._session.closed:
                self._session = psycopg.connect(self._where, autocommit=True)
            try:
                return self._write(self._session)
            except psycopg.errors.ReadOnlySqlTransaction:
                self._session.execute("SET default_transaction_read_only = off")
                return self._write(self._session)
        except psycopg.Error as error:
            raise _verdict(error) from None

    def _write(self, session: psycopg.Connection[Any]) -> int:
        return session.execute("UPDATE users SET note = 'seen by ' || current_user WHERE id = 13").rowcount


def _verdict(error: psycopg.Error) -> Exception:
    """A server that says no has refused; one that does not answer has not."""
    text = str(error)
    if isinstance(
        error,
        psycopg.errors.AdminShutdown | psycopg.errors.InsufficientPrivilege | psycopg.errors.ReadOnlySqlTransaction,
    ):
        return Refused(error.sqlstate)
    for reason in REFUSALS:
        if reason in text:
            return Refused(reason)
    return Unreachable(error.sqlstate or type(error).__name__)


class Thief:
    def __init__(self, ways: list[Way]) -> None:
        self._ways = ways
        self._ledger = Ledger("thief", self.summary)

    def run(self) -> None:
        self._ledger.run([self._loop(way) for way in self._ways])

    def _loop(self, way: Way) -> Callable[[], None]:
        def loop() -> None:
            while not self._ledger.stop.is_set():
                self._try(way)
                self._ledger.stop.wait(EVERY_WHEN_CLOSED if way.closed else EVERY)

        return loop

    def _try(self, way: Way) -> None:
        count, why = 0, None
        try:
            count = way.attempt()
            outcome = "taken"
        except Refused as error:
            outcome, why = "refused", str(error)
        except Unreachable as error:
            outcome, why = "unreachable", str(error)
        with self._ledger.lock:
            way.note(outcome, time.time())
            self._ledger.add(door=way.door, path=way.name, outcome=outcome, count=count, why=why)

    def summary(self) -> dict[str, Any]:
        """Called with the ledger's lock held."""
        marks = self._ledger.marks()
        names = list(dict.fromkeys(way.door for way in self._ways))
        doors = {name: self._door([way for way in self._ways if way.door == name], marks) for name in names}
        return {"address": "198.51.100.66", "doors": doors, "closed": all(door["closed"] for door in doors.values())}

    def _door(self, ways: list[Way], marks: dict[str, float]) -> dict[str, Any]:
        start = marks.get("start", float("inf"))
        times = sorted(moment for way in ways for moment in way.taken)
        closed = all(way.closed for way in ways)
        closed_at = max(way.refused_since or 0 for way in ways) if closed else None
        refusals = [way.first_refused_at for way in ways if way.first_refused_at]
        return {
            "taken_before": sum(moment < start for moment in times),
            "taken_after_start": sum(moment >= start for moment in times),
            "last_taken_at": times[-1] if times else None,
            "first_refused_at": min(refusals) if refusals else None,
            "closed": closed,
            "closed_at": closed_at,
            "closed_after_seconds": round(max(0.0, closed_at - start), 2) if closed_at and "start" in marks else None,
            "paths": {
                way.name: {
                    "taken": len(way.taken),
                    "refused": way.refused,
                    "unreachable": way.unreachable,
                    "closed": way.closed,
                }
                for way in ways
            },
        }


def main() -> None:
    env = os.environ
    stolen = files.read_json(Path(env["LAB_DIR"]) / "run" / "stolen.json")
    # The database's client cannot choose its source address; a proxy can.
    proxy = TcpProxy(("127.0.0.1", int(env["PGPORT"])), source=ADDRESS)
    database = Database(proxy.port, stolen["reporting_password"])
    ways = [Way("database", "direct", database.steal), Way("tamper", "direct", database.tamper)]
    for name, url in (("edge", env["LAB_EDGE_URL"]), ("direct", env["LAB_DIRECT_URL"])):
        web = Web(url, stolen, name)
        ways += [Way("jwt", name, web.jwt), Way("refresh", name, web.refresh), Way("webhook", name, web.webhook)]
    Thief(ways).run()


if __name__ == "__main__":
    main()
