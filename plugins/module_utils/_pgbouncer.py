# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""PgBouncer: its console, spoken to as PostgreSQL is, and its own file on its host. The session itself is that of ``_postgresql``."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

from . import _pgbouncer_ini, _postgresql
from ._control import Context
from ._errors import FirebreakError
from ._host_file import HOST_SECONDS
from ._redact import Held

REQUIRED = ("pgbouncer_host", "pgbouncer_user")
SPEC: dict[str, Any] = {
    "pgbouncer_host": {"type": "str"},
    "pgbouncer_port": {"type": "int", "default": 6432},
    "pgbouncer_user": {"type": "str"},
    "pgbouncer_password": {"type": "str", "no_log": True},
    "pgbouncer_sslmode": {
        "type": "str",
        "choices": ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"],
        "default": "prefer",
    },
    "pgbouncer_ca_cert": {"type": "str"},
}
CONSOLE = "pgbouncer"
COMMAND_SECONDS = 5.0
CLOSED = _pgbouncer_ini.CLOSED
# The pool's own words, which come without an SQLSTATE of their own.
REFUSALS = ("authentication failed", "no such user", "not allowed", "no password supplied", "pg_hba", "HBA")
psycopg: Any = None


def preload() -> None:
    """Import psycopg, once."""
    global psycopg
    _postgresql.preload()
    psycopg = _postgresql.psycopg


def addresses(params: dict[str, Any]) -> list[str]:
    """libpq takes a list of hosts; each of them counts."""
    return str(params["pgbouncer_host"]).split(",")


def connect(params: dict[str, Any], context: Context) -> Client:
    preload()
    return Client(params, context)


class Lost(FirebreakError):
    """The connection ended, or was ended because the pool did not answer in time."""


class Client:
    """The console of one pool, and its file."""

    def __init__(self, params: dict[str, Any], context: Context) -> None:
        self.held = Held()
        self.host = context.host
        self._params = params
        self._context = context
        self._console: Any = None
        self._open()

    def _open(self) -> None:
        try:
            self._console = self._session(CONSOLE, cursor_factory=psycopg.ClientCursor)
        except psycopg.Error as failure:
            refused = any(words in str(failure) for words in REFUSALS)
            why = (
                "it refuses pgbouncer_user or pgbouncer_password (the user must be one of admin_users)"
                if refused
                else "nothing answers there, or not in the way that pgbouncer_sslmode asks for"
            )
            raise FirebreakError(f"PgBouncer: cannot connect (pgbouncer_host, pgbouncer_port): {why}", "none") from None

    def _session(self, database: str, **more: Any) -> Any:
        """The console knows the simple protocol only, and nothing that a client of the pool prepares would last."""
        return _postgresql.session(
            "pgbouncer", self._params, self._context, dbname=database, prepare_threshold=None, **more
        )

    def close(self) -> None:
        if self._console is not None:
            self._console.close()

    # --- the console

    def _say(self, command: str, seconds: float = COMMAND_SECONDS) -> list[dict[str, Any]]:
        """One command. What does not answer in time is cut off."""
        verb, seconds = command.split()[0], self._context.at_most(seconds)
        try:
            with _bounded(self._console, seconds):
                answer = self._console.execute(command)
                names = [column.name for column in answer.description or ()]
                return [dict(zip(names, row, strict=True)) for row in (answer.fetchall() if names else ())]
        except psycopg.Error as failure:
            if failure.sqlstate is None:  # nobody said it
                raise Lost(
                    f"PgBouncer: {verb} had no answer within {seconds:.0f} s, or the connection was lost"
                ) from None
            raise FirebreakError(
                f"PgBouncer: {verb} was refused; is pgbouncer_user one of admin_users, and the database there?", "none"
            ) from None

    def conffile(self) -> str:
        """The file that it was started with."""
        found = [row["value"] for row in self._say("SHOW CONFIG") if row["key"] == "conffile"]
        return str(found[0] if found and found[0] else "")

    def runs(self, database: str) -> dict[str, Any]:
        """Where the running pool leads the database's clients, and whether it holds them."""
        row = next((row for row in self._say("SHOW DATABASES") if row["name"] == database), None)
        to = CLOSED if row is None else f"{row['host'] or ''}:{row['port']}"
        return {"to": to, "paused": bool(row and int(row["paused"]))}

    def clients(self, database: str) -> dict[str, int]:
        """How many clients there are, and how many are in a transaction or wait for one."""
        pools = [row for row in self._say("SHOW POOLS") if row["database"] == database]
        return {
            "clients": sum(int(row["cl_active"]) + int(row["cl_waiting"]) for row in pools),
            "in_transactions": sum(int(row["sv_active"]) for row in pools),
        }

    def switch(self, database: str, patience: float) -> None:
        """Take up the file, and wait until nobody is where it led before.

        There is no PAUSE in this: it outlives the run that gave it, and a request of a dead run that arrives late would hold
        everybody for ever. A server that hangs ends no transaction: then the connections of this database are dropped,
        which holds its new clients until RESUME; only between these two a death leaves it paused.
        """
        name = _quoted(database)
        self._context.still_ours()
        self._say("RELOAD")
        self._context.effective()
        if not self._settled(name, patience):
            self._context.still_ours()
            self._say(f"KILL {name}")
        if self.runs(database)["paused"]:
            self._say(f"RESUME {name}")

    def _settled(self, name: str, patience: float) -> bool:
        try:
            self._say(f"WAIT_CLOSE {name}", patience)
        except Lost:
            self._open()
            return False
        except FirebreakError:  # the route is closed: there is nobody to wait for
            pass
        return True

    # --- as a client of the pool

    def arrives(self, database: str) -> dict[str, Any] | None:
        """Where a new client of the pool lands, and whether it could write there, asking for that as a thief would.
        None where it does not get in."""
        try:
            with self._session(database) as session, _bounded(session, self._context.at_most(COMMAND_SECONDS)):
                standby = session.execute("SELECT pg_is_in_recovery()").fetchone()[0]
                return {"standby": bool(standby), "writes": _writes(session)}
        except psycopg.Error:
            return None

    # --- the file

    def look(self, conffile: str, database: str) -> dict[str, Any]:
        return _pgbouncer_ini.look(self.host, conffile, database, self._context.at_most(HOST_SECONDS))

    def change(self, conffile: str, database: str, seen: str, told: dict[str, str]) -> None:
        self._context.still_ours()
        _pgbouncer_ini.change(self.host, conffile, database, seen, told, self._context.at_most(HOST_SECONDS))


def _writes(session: Any) -> bool:
    """Nothing is left of the attempt: what it makes vanishes with its transaction."""
    try:
        session.execute("BEGIN READ WRITE")  # a server that is only set to be read only allows it, a standby does not
        session.execute("CREATE TEMPORARY TABLE firebreak_probe () ON COMMIT DROP")
        return True
    except (psycopg.errors.FeatureNotSupported, psycopg.errors.ReadOnlySqlTransaction):
        return False
    finally:
        session.execute("ROLLBACK")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@contextlib.contextmanager
def _bounded(session: Any, seconds: float) -> Iterator[None]:
    def cut() -> None:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(session.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)

    watch = threading.Timer(seconds, cut)
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()
