# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""PostgreSQL through psycopg 3. The only file that knows psycopg."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from ._control import Context
from ._deps import require
from ._errors import FirebreakError, Refused
from ._redact import Held

REQUIRED = ("postgresql_host", "postgresql_user")
SPEC: dict[str, Any] = {
    "postgresql_host": {"type": "str"},
    "postgresql_port": {"type": "int", "default": 5432},
    "postgresql_user": {"type": "str"},
    "postgresql_password": {"type": "str", "no_log": True},
    "postgresql_database": {"type": "str", "default": "postgres"},
    "postgresql_sslmode": {
        "type": "str",
        "choices": ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"],
        "default": "prefer",
    },
    "postgresql_ca_cert": {"type": "str"},
}
CONNECT_SECONDS = 5
STATEMENT_SECONDS = 20
LOCK_SECONDS = 5
# How long ended sessions, and a reloaded configuration, may take to show.
PATIENCE = 10.0
# libpq takes ~/.pgpass and a client certificate from the home directory unless told of files; these cannot exist.
NO_FILE = os.path.join(os.devnull, "none")
SESSION = {
    # A thief who may alter the role must not put functions of his own in front of the server's.
    "search_path": "pg_catalog",
    # Rows hidden by a policy are an error, never a shorter answer.
    "row_security": "off",
    # A lost synchronous standby must not hold up containment.
    "synchronous_commit": "local",
    "TimeZone": "UTC",
    "DateStyle": "ISO",
}
REASONS = {
    "08": ("the connection was lost", "unknown"),
    "08001": ("nothing answers there, or not in the way that postgresql_sslmode asks for", "none"),
    "22": ("a value does not fit its column", "none"),
    "25006": ("the server is read only: a standby, or fenced", "none"),
    "28": ("the server refuses postgresql_user or postgresql_password", "none"),
    "3D000": ("postgresql_database does not exist on this server", "none"),
    "40": ("a standby cancelled it to keep up with its primary; run it again", "none"),
    "42501": ("the role of postgresql_user lacks the privilege, or a row policy hides rows from it", "none"),
    "42": ("a name does not exist there, or does not fit its type", "none"),
    "53": ("the server is out of connections, memory or disk", "none"),
    "55P03": ("another session holds a lock on it", "none"),
    "57014": ("it took longer than allowed", "none"),
    "57P03": ("the server is starting up or shutting down", "none"),
    "57P": ("the server ended our session", "unknown"),
    "TLS": ("what TLS needs is not there or not accepted: see postgresql_sslmode and postgresql_ca_cert", "none"),
}
# Refusals before a session exists carry no SQLSTATE through libpq: these words are the server's and libpq's own.
REFUSALS = {
    "certificate": "TLS",
    "SSL": "TLS",
    "authentication failed": "28",
    "no password supplied": "28",
    "is not permitted to log in": "28",
    "pg_hba.conf": "28",
    "the database system is": "57P03",
    "too many": "53300",
    "remaining connection slots": "53300",
    "does not exist": "3D000",
}
# Sessions that a fence ends: not replication, not this collection's, and no idle one of the responder's own role. One that is
# starting (PostgreSQL 18 shows it before it is known whose it is) has no transaction, and begins under the fence.
OTHERS = """
    a.backend_type = 'client backend' AND a.pid <> pg_backend_pid() AND a.state IS DISTINCT FROM 'starting' AND NOT coalesce(
      a.usesysid = (SELECT oid FROM pg_roles WHERE rolname = session_user)
      AND (starts_with(a.application_name, 'firebreak ') OR a.xact_start IS NULL), false)
"""
SESSIONS_OF_ROLE = """
    a.backend_type IN ('client backend', 'walsender') AND a.usesysid = (SELECT oid FROM pg_roles WHERE rolname = %s)
"""
SESSIONS_HERE = """
    a.backend_type = 'client backend' AND a.datname = current_database() AND a.usename = ANY (%s)
"""
LOGIN_FENCE = "firebreak_login_fence"
CREATED_ONCE = f"""BEGIN IF NOT EXISTS (SELECT FROM pg_event_trigger WHERE evtname = '{LOGIN_FENCE}') THEN
    CREATE EVENT TRIGGER {LOGIN_FENCE} ON login EXECUTE FUNCTION {LOGIN_FENCE}.refuse(); END IF; END"""
psycopg: Any = None


def preload() -> None:
    """Import psycopg, once."""
    global psycopg
    psycopg = require("psycopg", "psycopg", "3.2")


def addresses(params: dict[str, Any]) -> list[str]:
    """libpq takes a list of hosts; each of them counts."""
    return str(params["postgresql_host"]).split(",")


def connect(params: dict[str, Any], context: Context) -> Client:
    preload()
    return Client(params, context)


@contextlib.contextmanager
def no_environment() -> Iterator[None]:
    """libpq lets PGHOSTADDR, PGOPTIONS, PGSERVICE and thirty others redirect or extend what was given explicitly."""
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("PG")}
    try:
        yield
    finally:
        os.environ.update(kept)


def session(service: str, params: dict[str, Any], context: Context, **more: Any) -> Any:
    """A session as the options of this service say, with autocommit."""
    given = {name: params.get(f"{service}_{name}") for name in ("host", "port", "user", "sslmode")}
    authority = {"sslrootcert": params[f"{service}_ca_cert"]} if params.get(f"{service}_ca_cert") else {}
    with no_environment():
        return psycopg.connect(
            **given,
            password=context.secret(params[f"{service}_password"] or context.env.get("PGPASSWORD")),
            sslcert=NO_FILE,
            passfile=NO_FILE,
            gssencmode="disable",
            connect_timeout=math.ceil(context.at_most(CONNECT_SECONDS)),
            application_name=f"firebreak {context.correlation}",
            autocommit=True,
            **authority,
            **more,
        )


class Client:
    """One session, with autocommit."""

    def __init__(self, params: dict[str, Any], context: Context) -> None:
        self.held = Held()
        self.evidence = context.evidence
        self._params = params
        self._context = context
        self._lifted = False
        self._cutoff: Any = None
        self._connection: Any = None
        with self._errors("connect (postgresql_host, postgresql_port)", CONNECT_SECONDS):
            self._connection = self._connect()

    def _connect(self) -> Any:
        params = self._params
        limits = {"statement_timeout": STATEMENT_SECONDS, "lock_timeout": LOCK_SECONDS}
        settings = {
            **SESSION,
            **{name: f"{1000 * self._context.at_most(seconds):.0f}ms" for name, seconds in limits.items()},
        }
        connecting = functools.partial(
            session,
            "postgresql",
            params,
            self._context,
            dbname=params["postgresql_database"],
            client_encoding="utf8",
            options=" ".join(f"-c {name}={value}" for name, value in settings.items()),
            row_factory=psycopg.rows.dict_row,
        )
        try:
            return connecting()
        except psycopg.OperationalError as failure:
            # A login trigger went while we logged in: another run has lifted a login fence just now.
            if "cache lookup failed" not in str(failure):
                raise
            return connecting()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    @contextlib.contextmanager
    def another(self) -> Iterator[Client]:
        """A new session, as any client would get it."""
        fresh = Client(self._params, self._context)
        try:
            yield fresh
        finally:
            fresh.close()

    def identity(self) -> dict[str, list[str]]:
        """How the server sees this session."""
        query = "SELECT session_user AS role, current_user AS acting, host(inet_client_addr()) AS address"
        seen = self.rows("ask who we are", query)[0]
        return {"roles": [seen["role"], seen["acting"]], "addresses": [seen["address"]] if seen["address"] else []}

    # --- statements

    def rows(self, action: str, statement: Any, values: Sequence[Any] | None = None) -> list[dict[str, Any]]:
        self._context.still_ours()
        with self._errors(action, STATEMENT_SECONDS):
            return list(self._connection.execute(statement, values).fetchall())

    def run(self, action: str, statement: Any, seconds: float = STATEMENT_SECONDS) -> None:
        """A statement without an answer."""
        self._context.still_ours()
        with self._errors(action, seconds):
            self._connection.execute(statement)

    def write(self, action: str, statement: Any) -> None:
        """The same, also on a fenced server: the fence is lifted for this session alone."""
        if not self._lifted:
            self.run(action, "SET default_transaction_read_only = off")
            self._lifted = True
        self.run(action, statement)
        self._context.effective()

    def copy(self, action: str, statement: Any, seconds: float) -> Iterator[bytes]:
        """The rows of a SELECT as CSV, a row at a time, the header first."""
        statement = psycopg.sql.SQL("COPY ({}) TO STDOUT WITH (FORMAT csv, HEADER)").format(statement)
        self.run("set the time limit", f"SET statement_timeout = '{seconds:.0f}s'")
        with self._errors(action, seconds), self._connection.cursor().copy(statement) as lines:
            for line in lines:
                yield bytes(line)

    @contextlib.contextmanager
    def _errors(self, action: str, seconds: float) -> Iterator[None]:
        """Our own words for what goes wrong: DETAIL and even the first line can hold rows. A server that hangs is cut off."""
        watch = threading.Timer(self._context.at_most(seconds + CONNECT_SECONDS), self._cut)
        watch.daemon = True
        watch.start()
        try:
            yield
        except psycopg.Error as failure:
            state = failure.sqlstate or self._guess(failure)
            key = next((k for k in (state, state[:3], state[:2]) if k in REASONS), "")
            reason, effect = REASONS.get(key, ("the server refuses it", "none"))
            shown = f" (SQLSTATE {state})" if failure.sqlstate else ""
            if self._connection is None:
                effect = "none"
            raise ServerError(f"PostgreSQL: cannot {action}: {reason}{shown}", effect=effect, state=state) from None
        finally:
            watch.cancel()

    def _guess(self, failure: Exception) -> str:
        """The class of a failure that carries no SQLSTATE."""
        if not isinstance(failure, (psycopg.OperationalError, psycopg.InterfaceError)):
            return "22"
        if self._connection is not None:
            return "08006"
        text = str(failure)
        return next((state for words, state in REFUSALS.items() if words in text), "08001")

    def _cut(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as line:
                line.shutdown(socket.SHUT_RDWR)

    # --- the server's configuration

    def require_version(self, major: int, what: str) -> None:
        if self._connection.info.server_version < major * 10000:
            raise Refused(f"postgresql_host: {what} needs PostgreSQL {major} or newer")

    def configured(self, parameter: str) -> str | None:
        """The value that ALTER SYSTEM left, exactly as it is written."""
        found = self.rows(
            "read the server's configuration",
            """SELECT setting FROM pg_file_settings WHERE name = %s
               AND sourcefile = current_setting('data_directory') || '/postgresql.auto.conf' ORDER BY seqno DESC LIMIT 1""",
            [parameter],
        )
        return found[0]["setting"] if found else None

    def loaded(self, parameter: str) -> bool:
        """Whether the running server uses what its files say of a boolean. Where the role or the database has a value of
        its own, a session cannot see it."""
        found = self.rows(
            "read the server's configuration",
            """SELECT source IN ('database', 'user', 'database user') OR setting::bool = coalesce(
                 (SELECT setting::bool FROM pg_file_settings WHERE name = s.name ORDER BY seqno DESC LIMIT 1),
                 boot_val::bool) AS loaded FROM pg_settings s WHERE name = %s""",
            [parameter],
        )
        return bool(found[0]["loaded"])

    def alter_system(self, parameter: str, value: str | None) -> None:
        """Set or reset a parameter for the whole server. Both work on a read-only one."""
        name = psycopg.sql.Identifier(*parameter.split("."))
        if value is None:
            statement = psycopg.sql.SQL("ALTER SYSTEM RESET {}").format(name)
        else:
            statement = psycopg.sql.SQL("ALTER SYSTEM SET {} = {}").format(name, psycopg.sql.Literal(value))
        self.run(f"change {parameter}", statement)
        self._context.effective()
        self.reload()

    def reload(self) -> None:
        """Reload the configuration, and wait until new sessions have it."""
        asked = self.now()
        self.rows("reload the configuration", "SELECT pg_reload_conf()")
        for _attempt in self._until():
            with self.another() as fresh:
                if fresh.rows("see the reload", "SELECT WHERE pg_conf_load_time() >= %s", [asked]):
                    return
        raise FirebreakError(
            "PostgreSQL: the server does not reload its configuration; look for an error in its configuration files"
        )

    def now(self) -> Any:
        """The server's clock."""
        return self.rows("read the clock", "SELECT clock_timestamp() AS now")[0]["now"]

    def _until(self) -> Iterator[None]:
        """Attempts, for as long as is worth waiting."""
        give_up = self._context.clock() + self._context.at_most(PATIENCE)
        while self._context.clock() < give_up:
            yield
            self._context.sleep(0.01)

    # --- writing sessions

    def writers(self, parameter: str) -> dict[str, Any]:
        """What a fence meets: the sessions it ends, and as far as visible what could still write under it."""
        counts = self.rows(
            "read the sessions",
            f"""SELECT (SELECT count(*) FROM pg_stat_activity a WHERE {OTHERS}) AS sessions,
                       (SELECT count(*) FROM pg_prepared_xacts) AS prepared_transactions""",
        )[0]
        writing = self.rows(
            "read the sessions",
            """SELECT pid, usename AS role, datname AS database FROM pg_stat_activity a
               WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid() ORDER BY pid LIMIT 20""",
        )
        lifted = self.rows(
            "read the roles' settings",
            """SELECT rolname AS role, datname AS database FROM pg_db_role_setting
               LEFT JOIN pg_roles r ON r.oid = setrole LEFT JOIN pg_database d ON d.oid = setdatabase
               WHERE EXISTS (SELECT FROM unnest(setconfig) c WHERE split_part(c, '=', 1) = %s
                             AND NOT split_part(c, '=', 2)::bool) ORDER BY 1, 2""",
            [parameter],
        )
        return {**counts, "writing": writing, "lifted_for": lifted}

    def end_sessions_before_now(self) -> None:
        """End the sessions that began before this moment, which a fence does not reach."""
        self.reload()
        self._cutoff = self.now()
        self.end_sessions(f"{OTHERS} AND a.backend_start < %s", [self._cutoff])

    def sessions_before(self) -> int:
        """How many are left of those that ``end_sessions_before_now`` was to end."""
        counted = self.rows(
            "read the sessions",
            f"SELECT count(*) AS left FROM pg_stat_activity a WHERE {OTHERS} AND a.backend_start < %s",
            [self._cutoff],
        )
        return int(counted[0]["left"])

    def end_sessions(self, which: str, values: Sequence[Any]) -> None:
        """Signal them all at once, until none is left: waiting for one after the other takes 100 ms each."""
        for _attempt in self._until():
            if not self.rows(
                "end sessions", f"SELECT pg_terminate_backend(a.pid) FROM pg_stat_activity a WHERE {which}", values
            ):
                return
            self._context.effective()
        raise FirebreakError("PostgreSQL: some sessions did not end; run the same command again")

    def end_sessions_of(self, role: str) -> None:
        self.end_sessions(SESSIONS_OF_ROLE, [role])

    def sessions_of(self, role: str) -> int:
        statement = f"SELECT count(*) AS sessions FROM pg_stat_activity a WHERE {SESSIONS_OF_ROLE}"
        return int(self.rows("read the sessions", statement, [role])[0]["sessions"])

    def write_is_refused(self) -> bool:
        """Whether a new session cannot write. What the attempt makes would vanish with its transaction."""
        with self.another() as fresh:
            fresh.run("begin a transaction", "BEGIN")
            try:
                fresh.run("try a write", "CREATE TEMPORARY TABLE firebreak_probe () ON COMMIT DROP")
            except ServerError as failure:
                return failure.state == "25006"
            fresh.run("take the attempt back", "ROLLBACK")
            return False

    # --- roles

    def role(self, name: str, parameter: str) -> dict[str, Any] | None:
        """Whether the role may log in, and what it has for a parameter."""
        found = self.rows(
            "read the roles",
            """SELECT rolcanlogin AS login, (SELECT substr(c, length(%s) + 2) FROM unnest(rolconfig) c
                 WHERE split_part(c, '=', 1) = %s) AS value FROM pg_roles WHERE rolname = %s""",
            [parameter, parameter, name],
        )
        return found[0] if found else None

    def login_roles(self, but: Sequence[str]) -> dict[str, Any]:
        """The role in use, and how many more could log in if these could not."""
        return self.rows(
            "read the roles",
            """SELECT session_user AS own_role, (SELECT count(*) FROM pg_roles
                 WHERE rolcanlogin AND rolname <> session_user AND rolname <> ALL (%s)) AS other_login_roles""",
            [list(but)],
        )[0]

    def alter_login(self, name: str, login: bool) -> None:
        option = psycopg.sql.SQL("LOGIN" if login else "NOLOGIN")
        statement = psycopg.sql.SQL("ALTER ROLE {} {}").format(psycopg.sql.Identifier(name), option)
        self.write("change the role", statement)

    def alter_role_setting(self, name: str, parameter: str, value: str | None) -> None:
        role, setting = psycopg.sql.Identifier(name), psycopg.sql.Identifier(*parameter.split("."))
        if value is None:
            statement = psycopg.sql.SQL("ALTER ROLE {} RESET {}").format(role, setting)
        else:
            statement = psycopg.sql.SQL("ALTER ROLE {} SET {} = {}").format(role, setting, psycopg.sql.Literal(value))
        self.write("change the role's settings", statement)

    # --- logins on this server alone

    def login_fence(self) -> dict[str, Any] | None:
        """Whom the fence of this database refuses, for which incident, under which mark; and whether it is as we made it."""
        found = self.rows(
            "read the login fence",
            """SELECT obj_description(e.oid, 'pg_event_trigger') AS mark, obj_description(p.oid, 'pg_proc') AS told, p.prosrc AS body,
                 e.evtenabled = 'A' AND current_setting('event_triggers')::bool AS fires
               FROM pg_event_trigger e JOIN pg_proc p ON p.oid = e.evtfoid WHERE e.evtname = %s""",
            [LOGIN_FENCE],
        )
        if not found:
            return None
        told = json.loads(found[0]["told"] or "{}")
        sound = found[0]["fires"] and found[0]["body"] == _fence_body(told.get("roles", []))
        return {"roles": told.get("roles"), "incident": told.get("incident"), "mark": found[0]["mark"], "sound": sound}

    def raise_login_fence(self, roles: Sequence[str], incident: str) -> None:
        """All of it at once, and the second time nothing. A standby has it too, and lets them in."""
        sql = psycopg.sql
        told = json.dumps({"incident": incident, "roles": list(roles)})
        values = map(sql.Literal, (_fence_body(roles), told, CREATED_ONCE))
        statement = sql.SQL(
            "CREATE SCHEMA IF NOT EXISTS {0}; CREATE OR REPLACE FUNCTION {0}.refuse() RETURNS event_trigger LANGUAGE plpgsql"
            " SET search_path = pg_catalog AS {1}; COMMENT ON FUNCTION {0}.refuse() IS {2}; DO {3};"
            " ALTER EVENT TRIGGER {0} ENABLE ALWAYS"
        )
        self.write("raise the login fence", statement.format(sql.Identifier(LOGIN_FENCE), *values))

    def mark_login_fence(self, mark: str) -> None:
        statement = psycopg.sql.SQL("COMMENT ON EVENT TRIGGER {} IS {}")
        self.write(
            "mark the login fence", statement.format(psycopg.sql.Identifier(LOGIN_FENCE), psycopg.sql.Literal(mark))
        )

    def lift_login_fence(self) -> None:
        statement = psycopg.sql.SQL("DROP EVENT TRIGGER {0}; DROP SCHEMA {0} CASCADE")
        self.write("lift the login fence", statement.format(psycopg.sql.Identifier(LOGIN_FENCE)))

    def end_sessions_here(self, roles: Sequence[str]) -> None:
        self.end_sessions(SESSIONS_HERE, [list(roles)])

    def fenced_roles(self, roles: Sequence[str]) -> dict[str, Any]:
        """Their sessions in this database, which of them are not there or could lift the fence, and the role in use."""
        return self.rows(
            "read the roles",
            f"""SELECT (SELECT count(*) FROM pg_stat_activity a WHERE {SESSIONS_HERE}) AS sessions, session_user AS own_role,
                 ARRAY(SELECT n FROM unnest(%s::text[]) n WHERE n NOT IN (SELECT rolname FROM pg_roles)) AS missing,
                 ARRAY(SELECT rolname::text FROM pg_roles WHERE rolsuper AND rolname = ANY (%s)) AS superusers""",
            [list(roles)] * 3,
        )[0]

    # --- rows

    def select(self, table: Sequence[str], columns: Sequence[str], after: Sequence[str] | None,
               among: tuple[str, Sequence[str]] | None) -> Any:  # fmt: skip
        """A SELECT from given parts: names are quoted as names and values as values, typed by their columns."""
        sql = psycopg.sql
        names = sql.SQL(", ").join(map(sql.Identifier, columns)) if columns else sql.SQL("*")
        where, order = [], sql.SQL("")
        if after:
            where.append(sql.SQL("{} > {}").format(sql.Identifier(after[0]), sql.Literal(after[1])))
            order = sql.SQL(" ORDER BY {}").format(sql.Identifier(after[0]))
        if among:
            values = sql.SQL(", ").join(map(sql.Literal, among[1]))
            where.append(sql.SQL("{} IN ({})").format(sql.Identifier(among[0]), values))
        condition = sql.SQL(" WHERE {}").format(sql.SQL(" AND ").join(where)) if where else sql.SQL("")
        return sql.SQL("SELECT {} FROM {}{}{}").format(names, sql.Identifier(*table), condition, order)

    def read_only(self) -> None:
        """From here on nothing that is called by a view or a policy can write."""
        self.run(
            "begin to read", "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"
        )

    def count(self, action: str, select: Any, seconds: int) -> dict[str, Any]:
        """The number of rows: counted, or the planner's guess where that takes too long."""
        self.run("set the time limit", f"SET statement_timeout = '{seconds}s'")
        try:
            statement = psycopg.sql.SQL("SELECT count(*) AS rows FROM ({}) AS selected").format(select)
            return {**self.rows(action, statement)[0], "counted": True}
        except ServerError as failure:
            if failure.state != "57014":
                raise
        explained = self.rows(action, psycopg.sql.SQL("EXPLAIN (FORMAT JSON) {}").format(select))
        return {"rows": explained[0]["QUERY PLAN"][0]["Plan"]["Plan Rows"], "counted": False}


def _fence_body(roles: Sequence[str]) -> str:
    """What is done at each login. It reads nothing that a role could change."""
    names = ", ".join("'" + name.replace("'", "''") + "'" for name in roles)
    return (
        f"BEGIN IF session_user = ANY (ARRAY[{names}]::name[]) AND NOT pg_is_in_recovery() THEN "
        "RAISE EXCEPTION 'role % is not permitted to log in to the primary', session_user USING ERRCODE = '28000'; END IF; END"
    )


class ServerError(FirebreakError):
    """What the server answered; ``state`` is its SQLSTATE."""

    def __init__(self, msg: str, effect: str, state: str) -> None:
        super().__init__(msg, effect=effect, sqlstate=state)
        self.state = state
