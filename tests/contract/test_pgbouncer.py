# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The same commands and clients at the lab's double of PgBouncer and at the real one: both answer as it says here."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from lab import ROOT, real
from lab.client import Lab
from lab.parts.pool import SETTINGS
from lab.process import SHIM, unprivileged_uid
from tests.contract.vault_servers import free_port

PATIENCE = 1.5  # of a client in the pool, in seconds
HELD = 0.4  # what does not answer for so long is held


class Pool:
    """A running router, its file, and sessions with it."""

    def __init__(self, lab: Lab, file: Path, port: int, process: subprocess.Popen[bytes]) -> None:
        self.lab = lab
        self.file = file
        self.text = file.read_text()
        self.port = port
        self.process = process
        lines = (lab.dir / "app" / "app.env").read_text().splitlines()
        app = next(line.partition("=")[2] for line in lines if line.startswith("DATABASE_PASSWORD="))
        self.passwords = {"app": app, "firebreak": lab.hostvars("pg1")["firebreak_postgresql_password"]}
        self.ports = {lab.hostvars(name)["firebreak_postgresql_port"]: name for name in ("pg1", "pg2")}
        self._open: list[psycopg.Connection[Any]] = []

    def client(self, user: str = "app", database: str = "divan", password: str = "", **more: Any) -> Any:
        session = psycopg.connect(
            host="127.0.0.1", port=self.port, user=user, password=password or self.passwords.get(user, "none"),
            dbname=database, sslmode="disable", autocommit=True, prepare_threshold=None, connect_timeout=10, **more,
        )  # fmt: skip
        self._open.append(session)
        return session

    def console(self) -> Any:
        return self.client("firebreak", "pgbouncer", cursor_factory=psycopg.ClientCursor)

    def say(self, command: str) -> Any:
        """What the console answers: rows, the end of the command, or a refusal."""

        def ask() -> Any:
            with self.console() as console:
                answer = console.execute(command)
                return answer.fetchall() if answer.description else answer.statusmessage

        return self.told(ask)

    def told(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except psycopg.Error as failure:
            text = str(failure).strip().rpartition("FATAL:")[2].strip().partition("\n")[0]
            return [failure.sqlstate, re.sub(r"\d+", "N", text)]

    def lands(self, session: Any) -> str:
        port = session.execute("SELECT inet_server_port()").fetchone()[0]
        return self.ports[port]

    def routes(self) -> dict[str, list[Any]]:
        rows = self.say("SHOW DATABASES")
        return {row[0]: [self.ports.get(row[2], row[2]), row[11], row[12]] for row in rows if row[0] != "pgbouncer"}

    def write(self, old: str = "", new: str = "") -> None:
        assert old in self.text
        self.file.write_text(self.text.replace(old, new, 1))

    def to_standby(self) -> tuple[str, str]:
        primary, standby = sorted(self.ports, key=lambda port: self.ports[port])
        return f"divan = host=127.0.0.1 port={primary}", f"divan = host=127.0.0.1 port={standby}"

    def reset(self) -> None:
        for session in self._open:
            session.close()
        self._open.clear()
        self.write()
        with self.console() as console:
            for row in console.execute("SHOW DATABASES").fetchall():
                if row[11]:
                    console.execute(f'RESUME "{row[0]}"')
                if row[12]:
                    console.execute(f'ENABLE "{row[0]}"')
            console.execute("RELOAD")


class Apart:
    """Something that may take its time."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result: Any = None
        self._thread = threading.Thread(target=self._work, args=(work,), daemon=True)
        self._thread.start()

    def _work(self, work: Callable[[], Any]) -> None:
        self.result = work()

    @property
    def waits(self) -> bool:
        self._thread.join(HELD)
        return self._thread.is_alive()

    def end(self) -> Any:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.result


def command_of(kind: str, file: Path) -> list[str]:
    if kind == "double":
        return [sys.executable, "-m", "lab.doubles.pgbouncer", str(file)]
    program = real.find("pgbouncer")
    if program is None:
        missing = "the real PgBouncer is not here (`make real` unpacks it): its half of the contract was not run"
        if "pgbouncer" in os.environ.get("FIREBREAK_REAL", "").replace(",", " ").split():
            pytest.fail(missing)
        pytest.skip(missing)
    return [sys.executable, "-IS", SHIM, str(os.getpid()), "9", str(unprivileged_uid()), str(program), str(file)]


@pytest.fixture(scope="module", params=["double", "real"])
def running(request: pytest.FixtureRequest, lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    home = tmp_path_factory.mktemp(request.param)
    file, port = home / "pgbouncer.ini", free_port()
    ports = {
        name: lab.hostvars(host)["firebreak_postgresql_port"] for name, host in (("primary", "pg1"), ("standby", "pg2"))
    }
    text = SETTINGS.format(port=port, users=lab.dir / "run" / "pool1" / "userlist.txt", **ports)
    text = text.replace("query_wait_timeout = 5", f"query_wait_timeout = {PATIENCE:.0f}")
    file.write_text(
        text.replace("[pgbouncer]", f"nowhere = host=127.0.0.1 port={free_port()} dbname=divan\n\n[pgbouncer]")
    )
    command = command_of(request.param, file)
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        pool = Pool(lab, file, port, process)
        for _unused in range(500):
            with contextlib.suppress(psycopg.OperationalError):
                pool.console()
                break
            assert process.poll() is None, (home / "log").read_text()
            time.sleep(0.02)
        yield pool
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def pool(running: Pool) -> Iterator[Pool]:
    running.reset()
    yield running
    running.reset()


COLUMNS = {
    "VERSION": "version",
    "CONFIG": "key value default changeable",
    "DATABASES": "name host port# database force_user pool_size# min_pool_size# reserve_pool# pool_mode max_connections#"
    " current_connections# paused# disabled#",
    "POOLS": "database user cl_active# cl_waiting# cl_active_cancel_req# cl_waiting_cancel_req# sv_active# sv_active_cancel#"
    " sv_being_canceled# sv_idle# sv_used# sv_tested# sv_login# maxwait# maxwait_us# pool_mode",
    "SERVERS": "type user database state addr port# local_addr local_port# connect_time request_time wait# wait_us# close_needed#"
    " ptr link remote_pid# tls application_name",
}
COLUMNS["CLIENTS"] = COLUMNS["SERVERS"]


@pytest.mark.parametrize("what", COLUMNS)
def test_what_is_shown(pool: Pool, what: str) -> None:
    pool.client().execute("SELECT 1")
    with pool.console() as console:
        answer = console.execute(f"SHOW {what}")
        numbers = {23: "#", 20: "#"}
        shown = [column.name + numbers.get(column.type_code, "") for column in answer.description]
        rows = answer.fetchall()
    wanted = COLUMNS[what].split()
    # A newer one shows more; what the older one shows stays.
    assert [name for name in wanted if name not in shown] == []
    assert rows
    if what == "CONFIG":
        values = {row[0]: row[1] for row in rows}
        assert (values["conffile"], values["pool_mode"]) == (str(pool.file), "transaction")
    if what == "VERSION":
        assert rows[0][0].startswith("PgBouncer ")


def test_the_counts_of_a_pool(pool: Pool) -> None:
    session = pool.client()
    session.execute("BEGIN")
    with pool.console() as console:
        shown = console.execute("SHOW POOLS")
        names = [column.name for column in shown.description]
        rows = [dict(zip(names, row, strict=True)) for row in shown.fetchall()]
    (mine,) = [row for row in rows if (row["database"], row["user"]) == ("divan", "app")]
    assert [mine[name] for name in ("cl_active", "cl_waiting", "sv_active", "pool_mode")] == [1, 0, 1, "transaction"]


def test_refusals_of_the_console(pool: Pool) -> None:
    assert pool.say("PAUSE nodb") == ["08P01", "no such database: nodb"]
    assert pool.say("RESUME divan") == ["08P01", "database divan is not paused"]
    assert pool.say("HELLO") == ["08P01", "invalid command 'HELLO', use SHOW HELP;"]
    assert pool.say("PAUSE my-db") == ["08P01", "invalid command 'PAUSE my-db', use SHOW HELP;"]
    assert pool.say('PAUSE "no ""such"""')[0] == "08P01"
    with pytest.raises(psycopg.Error):  # it speaks the simple protocol only
        pool.client("firebreak", "pgbouncer").execute("SELECT %s", [1])
    assert pool.told(lambda: pool.client("firebreak", "pgbouncer", "wrong")) == [None, "SASL authentication failed"]


def test_who_gets_in(pool: Pool) -> None:
    assert pool.lands(pool.client()) == pool.lands(pool.client("firebreak")) == "pg1"
    assert pool.lands(pool.client(database="reports")) == "pg2"
    assert pool.told(lambda: pool.client(password="wrong")) == [None, "SASL authentication failed"]
    assert pool.told(lambda: pool.client("nobody")) == [None, "no such user"]
    assert pool.told(lambda: pool.client(database="nodb")) == [None, "SASL authentication failed"]
    assert pool.told(lambda: pool.client("firebreak", "nodb")) == [None, "no such database: nodb"]
    assert pool.say("DISABLE divan") == "DISABLE"
    assert pool.told(pool.client) == [None, 'database "divan" is disabled']
    assert pool.routes()["divan"] == ["pg1", 0, 1]
    assert pool.say("RELOAD") == "RELOAD"
    assert pool.told(pool.client) == [None, 'database "divan" is disabled']
    assert pool.say("ENABLE divan") == "ENABLE"
    assert pool.lands(pool.client()) == "pg1"


def test_a_server_that_does_not_answer(pool: Pool) -> None:
    began = time.monotonic()
    assert pool.told(lambda: pool.client("firebreak", "nowhere").execute("SELECT 1")) == [None, "query_wait_timeout"]
    assert PATIENCE * 0.5 < time.monotonic() - began < PATIENCE * 4


def test_pause_holds_one_database(pool: Pool) -> None:
    session, other = pool.client(), pool.client(database="reports")
    assert (pool.lands(session), pool.lands(other)) == ("pg1", "pg2")
    assert [pool.say("PAUSE divan"), pool.say('PAUSE "divan"')] == ["PAUSE", "PAUSE"]
    assert pool.routes()["divan"] == ["pg1", 1, 0]
    held, new = Apart(lambda: pool.lands(session)), Apart(lambda: pool.lands(pool.client()))
    assert held.waits and new.waits
    assert pool.lands(other) == "pg2"
    assert pool.say("RESUME divan") == "RESUME"
    assert [held.end(), new.end()] == ["pg1", "pg1"]


def test_a_pause_is_not_for_ever(pool: Pool) -> None:
    session = pool.client()
    pool.lands(session)
    assert pool.say("PAUSE divan") == "PAUSE"
    assert pool.told(lambda: pool.lands(session)) == ["08P01", "query_wait_timeout"]


def test_pause_waits_for_a_transaction(pool: Pool) -> None:
    session = pool.client()
    session.execute("BEGIN")
    pause = Apart(lambda: pool.say("PAUSE divan"))
    assert pause.waits
    session.execute("SELECT 1")
    session.execute("COMMIT")
    assert pause.end() == "PAUSE"
    assert pool.say("RESUME divan") == "RESUME"
    assert pool.lands(session) == "pg1"


def test_a_pause_that_is_cut_off_stays_and_kill_ends_what_it_waits_for(pool: Pool) -> None:
    session = pool.client()
    session.execute("BEGIN")
    console = pool.console()
    pause = Apart(lambda: pool.told(lambda: console.execute("PAUSE divan")))
    assert pause.waits
    console.close()
    pause.end()
    assert pool.routes()["divan"] == ["pg1", 1, 0]
    assert pool.say("KILL divan") == "KILL"
    assert pool.told(lambda: session.execute("SELECT 1")) == ["08P01", "database removed"]
    assert pool.routes()["divan"] == ["pg1", 1, 0]  # it holds whoever comes
    assert [pool.say("RELOAD"), pool.say("RESUME divan")] == ["RELOAD", "RESUME"]
    assert pool.lands(pool.client()) == "pg1"


def test_reload_leads_elsewhere_at_the_end_of_a_transaction(pool: Pool) -> None:
    busy, idle = pool.client(), pool.client()
    assert pool.lands(idle) == "pg1"
    busy.execute("BEGIN")
    pool.write(*pool.to_standby())
    assert pool.routes()["divan"] == ["pg1", 0, 0]
    assert pool.say("RELOAD") == "RELOAD"
    assert pool.routes()["divan"] == ["pg2", 0, 0]
    assert (pool.lands(idle), pool.lands(busy)) == ("pg2", "pg1")
    busy.execute("COMMIT")
    assert pool.lands(busy) == "pg2"
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        busy.execute("UPDATE users SET note = 'tampered' WHERE id = 1")


def test_pause_reload_resume_is_a_switch(pool: Pool) -> None:
    session = pool.client()
    assert pool.lands(session) == "pg1"
    assert pool.say("PAUSE divan") == "PAUSE"
    pool.write(*pool.to_standby())
    held = Apart(lambda: pool.lands(session))
    assert held.waits
    assert [pool.say("RELOAD"), pool.say("RECONNECT divan"), pool.say("RESUME divan")] == [
        "RELOAD",
        "RECONNECT",
        "RESUME",
    ]
    assert held.end() == "pg2"


def test_wait_close_waits_for_whoever_is_still_where_the_file_led_before(pool: Pool) -> None:
    busy, idle = pool.client(), pool.client()
    busy.execute("BEGIN")
    pool.lands(idle)
    pool.write(*pool.to_standby())
    assert pool.say("WAIT_CLOSE nodb") == ["08P01", "no such database: nodb"]
    assert pool.say("RELOAD") == "RELOAD"
    cut_off = pool.console()
    first = Apart(lambda: pool.told(lambda: cut_off.execute("WAIT_CLOSE divan")))
    second = Apart(lambda: pool.say("WAIT_CLOSE divan"))
    assert first.waits and second.waits
    cut_off.close()
    first.end()
    assert pool.lands(idle) == "pg2"  # nobody is held
    busy.execute("COMMIT")
    assert second.end() == "WAIT_CLOSE"
    assert pool.lands(busy) == "pg2"
    assert [pool.say("WAIT_CLOSE divan"), pool.say("WAIT_CLOSE")] == ["WAIT_CLOSE", "WAIT_CLOSE"]


def test_a_mistake_in_the_file_changes_nothing(pool: Pool) -> None:
    session = pool.client()
    pool.write("divan = ", "divan = nonsense ")
    assert pool.say("RELOAD") == "RELOAD"
    assert pool.routes()["divan"] == ["pg1", 0, 0]
    assert pool.lands(session) == "pg1"


def test_a_line_that_is_gone(pool: Pool) -> None:
    session, other = pool.client(), pool.client(database="reports")
    pool.lands(session)
    pool.write(pool.to_standby()[0], "; " + pool.to_standby()[0])
    assert pool.say("RELOAD") == "RELOAD"
    assert "divan" not in pool.routes()
    assert pool.told(lambda: pool.lands(session)) == ["08P01", "database removed"]
    assert pool.told(lambda: pool.client("firebreak")) == [None, "no such database: divan"]
    assert pool.lands(other) == "pg2"


def test_a_session_that_the_server_ends(pool: Pool) -> None:
    idle, busy = pool.client(), pool.client()
    pool.lands(idle)
    busy.execute("BEGIN")
    pid = busy.execute("SELECT pg_backend_pid()").fetchone()[0]
    with psycopg.connect(
        host="127.0.0.1", port=pool.lab.hostvars("pg1")["firebreak_postgresql_port"], user="postgres",
        password=pool.lab.env["PGPASSWORD"], dbname="divan", autocommit=True,
    ) as server:  # fmt: skip
        server.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        server.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = 'app'")
    with pytest.raises(psycopg.OperationalError):
        busy.execute("SELECT 1")
    assert pool.lands(idle) == "pg1"  # it had no transaction


def test_statements_of_all_kinds_pass(pool: Pool) -> None:
    session = pool.client()
    with session.transaction():
        session.execute("CREATE TEMPORARY TABLE kept (n int) ON COMMIT DROP")
        with session.cursor().copy("COPY kept FROM STDIN") as copy:
            for number in range(1000):
                copy.write_row((number,))
        with session.cursor() as cursor:
            cursor.executemany("INSERT INTO kept VALUES (%s)", [(number,) for number in range(50)])
        assert session.execute("SELECT count(*) FROM kept WHERE n >= %s", [0]).fetchone()[0] == 1050
    with session.pipeline():
        answers = [session.execute("SELECT %s::int", [number]) for number in range(20)]
    assert [answer.fetchone()[0] for answer in answers] == list(range(20))
    with pytest.raises(psycopg.errors.DivisionByZero):
        session.execute("SELECT 1 / 0")
    assert pool.lands(session) == "pg1"
