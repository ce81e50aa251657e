# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The PostgreSQL controls through the engine, against the lab's servers, which are read without the collection."""

from __future__ import annotations

import csv
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from ansible_collections.firebreak.incident.plugins.module_utils import (
    _case,
    _deps,
    _engine,
    _postgresql,
    _release,
    _task,
)
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context
from ansible_collections.firebreak.incident.plugins.module_utils._errors import FirebreakError
from ansible_collections.firebreak.incident.plugins.modules import (
    incident,
    postgresql_export,
    postgresql_login_lock,
    postgresql_write_fence,
)
from lab.client import Lab
from lab.tcp_proxy import TcpProxy
from tests.controls.postgresql_export import OWN
from tests.controls.postgresql_write_fence import connection, observe, session

FENCE, LOCK, EXPORT = postgresql_write_fence.CONTROL, postgresql_login_lock.CONTROL, postgresql_export.CONTROL
PASSWORD = "probe-4711-password"
ROLES = ("probe_writer", "probe_bystander")


@pytest.fixture
def params(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An open incident in a store of the test's own."""
    monkeypatch.setenv("FIREBREAK_SPOOL", str(tmp_path / "spool"))
    common = {name: option.get("default") for name, option in _task.COMMON.items()}
    shared = {**common, "case_store": f"file://{tmp_path}/cases", "site": "lab", "owner": "lab", "host": "pg1"}
    options = {name: option.get("default") for name, option in incident.SPEC["argument_spec"].items()}
    opening = {**shared, **options, "type": "data_breach", "affected": ["pg1"]}
    opened = _engine.execute(incident.CONTROL, opening, Context(run_id="open", actor="tester"))
    connecting = {name: option.get("default") for name, option in _postgresql.SPEC.items()} | connection(lab)
    return {**shared, **connecting, "incident_id": opened["incident_id"]}


@pytest.fixture
def people(lab: Lab) -> Iterator[None]:
    """Two roles that may write, and a table of theirs; all gone afterwards, and the server writable."""
    with session(lab, default_transaction_read_only="off") as database:
        for role in ROLES:
            database.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'")
        database.execute("CREATE TABLE probes (id int, note text, at timestamptz DEFAULT now())")
        database.execute(f"GRANT SELECT, INSERT ON probes TO {', '.join(ROLES)}")
    yield
    with session(lab, default_transaction_read_only="off") as database:
        database.execute("ALTER SYSTEM RESET ALL")
        database.execute("SELECT pg_reload_conf()")
        database.execute(
            "SELECT pg_terminate_backend(pid, 2000) FROM pg_stat_activity WHERE usename = ANY (%s)", [list(ROLES)]
        )
        database.execute("DROP TABLE probes")
        for role in ROLES:
            database.execute(f"DROP ROLE {role}")
    lab.until(lambda: observe(lab)["read_only"] == ["off"], "the server does not reload")


def go(control: Any, params: dict[str, Any], **own: Any) -> dict[str, Any]:
    check = own.pop("check_mode", False)
    options = {name: option.get("default") for name, option in control.spec["argument_spec"].items()}
    context = Context(run_id=os.urandom(3).hex(), actor="tester", check_mode=check)
    context.secret(params["postgresql_password"])
    return _engine.execute(control, {**params, **options, **own}, context)


def release(params: dict[str, Any]) -> dict[str, Any]:
    context = Context(run_id="release", actor="tester")
    full = {**params, "turn": None, "controls": None, "force": False}
    return _release.release(_case.open_case(full, context), full, context)


def people_session(lab: Lab, role: str = ROLES[0]) -> Any:
    return session(lab, role, password=PASSWORD)


def write(connection: Any) -> str:
    """What becomes of a write: the SQLSTATE, or nothing where it worked."""
    try:
        connection.execute("INSERT INTO probes VALUES (1)")
    except psycopg.Error as failure:
        return failure.sqlstate or "lost"
    return ""


def rows(lab: Lab) -> int:
    with session(lab) as database:
        return int((database.execute("SELECT count(*) FROM probes").fetchone() or [0])[0])


@pytest.mark.usefixtures("people")
def test_after_the_fence_nobody_can_write_and_everybody_can_read(lab: Lab, params: dict[str, Any]) -> None:
    before = observe(lab)
    open_transaction, idle, lifted = people_session(lab), people_session(lab), people_session(lab)
    open_transaction.execute("BEGIN")
    assert write(open_transaction) == ""
    lifted.execute("SET default_transaction_read_only = off")

    planned = go(FENCE, params, check_mode=True)
    assert observe(lab) == before
    done = go(FENCE, params)
    for key in ("changed", "changes", "diff", "state_before", "state_after", "mark"):
        assert planned[key] == done[key], key
    assert done["outcome"] == "verified"
    assert planned["estimate"]["sessions"] >= 3
    assert [(one["role"], one["database"]) for one in planned["estimate"]["writing"]] == [(ROLES[0], "divan")]

    assert write(open_transaction) in ("57P01", "lost")
    assert write(idle) in ("57P01", "lost")
    assert write(lifted) in ("57P01", "lost")
    assert rows(lab) == 0
    fresh = people_session(lab)
    assert write(fresh) == "25006"
    assert fresh.execute("SELECT count(*) FROM probes").fetchone() == (0,)
    with session(lab) as database:
        assert database.execute("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'").fetchone() == (1,)

    again = go(FENCE, params)
    assert not again["changed"] and again["since"]
    assert fresh.execute("SELECT 1").fetchone() == (1,)

    assert [change["action"] for change in release(params)["changes"]] == ["disable", "delete"]
    assert observe(lab) == before
    assert write(fresh) == ""


@pytest.mark.usefixtures("people")
@pytest.mark.parametrize("value", [None, "off", "false"])
def test_undo_restores_exactly_what_stood_there(lab: Lab, params: dict[str, Any], value: str | None) -> None:
    with session(lab) as database:
        database.execute("ALTER SYSTEM SET log_min_duration_statement = '7s'")
        if value:
            database.execute(f"ALTER SYSTEM SET default_transaction_read_only = '{value}'")
        database.execute("SELECT pg_reload_conf()")
    before = observe(lab)
    go(FENCE, params)
    release(params)
    assert observe(lab) == before


@pytest.mark.usefixtures("people")
@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5])
def test_a_fence_that_was_cut_off_is_finished_by_the_same_command_and_undone_exactly(
    lab: Lab, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """After each statement that changes the server, and before each reload."""
    before = observe(lab)
    real = _postgresql.Client.reload
    calls = 0

    def reload(client: Any) -> None:
        nonlocal calls
        calls += 1
        if cut == 2 * calls - 1:
            raise KeyboardInterrupt
        real(client)
        if cut == 2 * calls:
            raise KeyboardInterrupt

    monkeypatch.setattr(_postgresql.Client, "reload", reload)
    with pytest.raises(KeyboardInterrupt):
        go(FENCE, params)
    monkeypatch.undo()
    result = go(FENCE, params)
    assert result.get("outcome") in ("verified", "ok"), result
    assert f"firebreak.fence = '{params['incident_id']}/1'" in observe(lab)["configuration"]
    assert write(people_session(lab)) == "25006"
    release(params)
    assert observe(lab) == before


@pytest.mark.usefixtures("people")
def test_a_fence_that_was_cut_off_can_be_released_at_once(
    lab: Lab, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = observe(lab)
    monkeypatch.setattr(
        _postgresql.Client, "reload", lambda client: (_unused for _unused in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        go(FENCE, params)
    monkeypatch.undo()
    release(params)
    assert observe(lab) == before
    assert write(people_session(lab)) == ""


@pytest.mark.usefixtures("people")
def test_a_fence_that_stands_in_the_file_alone_is_not_called_ok(lab: Lab, params: dict[str, Any]) -> None:
    go(FENCE, params)
    with session(lab) as database:
        database.execute("ALTER SYSTEM RESET default_transaction_read_only")
        database.execute("SELECT pg_reload_conf()")
        lab.until(lambda: observe(lab)["read_only"] == ["off"], "the server does not reload")
        database.execute("ALTER SYSTEM SET default_transaction_read_only = 'on'")
    writer = people_session(lab)
    assert write(writer) == ""
    assert go(FENCE, params)["outcome"] == "verified"
    assert write(writer) in ("57P01", "lost")
    assert write(people_session(lab)) == "25006"


@pytest.mark.usefixtures("people")
def test_another_incidents_fence_is_named_and_left_alone(lab: Lab, params: dict[str, Any]) -> None:
    go(FENCE, params)
    fenced = observe(lab)
    other = go(FENCE, {**params, "incident_id": "INC-2026-0101-007"}, check_mode=True)
    assert other["failed"] and f"{params['incident_id']}/1" in other["msg"]
    assert observe(lab) == fenced


@pytest.mark.usefixtures("people")
def test_roles_that_lift_the_fence_are_named(lab: Lab, params: dict[str, Any]) -> None:
    with session(lab) as database:
        database.execute(f"ALTER ROLE {ROLES[0]} SET default_transaction_read_only = off")
    estimate = go(FENCE, params, check_mode=True)["estimate"]
    assert estimate["lifted_for"] == [{"role": ROLES[0], "database": None}]


@pytest.mark.usefixtures("people")
def test_a_fence_that_our_own_role_lifts_is_not_called_proved(lab: Lab, params: dict[str, Any]) -> None:
    with session(lab) as database:
        database.execute("ALTER ROLE firebreak SET default_transaction_read_only = off")
    try:
        result = go(FENCE, params)
        assert result["failed"] and "default_transaction_read_only" in result["msg"]
    finally:
        with session(lab, default_transaction_read_only="off") as database:
            database.execute("ALTER ROLE firebreak RESET default_transaction_read_only")


@pytest.mark.usefixtures("people")
def test_a_role_is_locked_out_of_a_fenced_server_and_nobody_else(lab: Lab, params: dict[str, Any]) -> None:
    thief, bystander = people_session(lab), people_session(lab, ROLES[1])
    with session(lab) as database:
        database.execute(f"ALTER ROLE {ROLES[0]} VALID UNTIL '2031-01-01' CONNECTION LIMIT 7")
    before = observe(lab)
    planned = go(LOCK, params, roles=[ROLES[0]], check_mode=True)
    assert observe(lab) == before
    done = go(LOCK, params, roles=[ROLES[0]])
    assert (planned["diff"], planned["changes"], done["outcome"]) == (done["diff"], done["changes"], "verified")
    assert write(thief) in ("57P01", "lost")
    with pytest.raises(psycopg.OperationalError, match="not permitted to log in"):
        people_session(lab)
    assert write(bystander) == ""

    go(FENCE, params)
    again = go(LOCK, params, roles=[ROLES[0]])
    assert not again["changed"]
    more = go(LOCK, params, roles=[ROLES[1]])
    assert more["outcome"] == "verified"

    release(params)
    assert observe(lab) == before
    assert write(people_session(lab)) == ""


def test_a_lock_on_the_standby_says_what_is_wrong(params: dict[str, Any], lab: Lab) -> None:
    result = go(LOCK, {**params, **connection(lab, "pg2")}, roles=["analyst"])
    assert result["failed"] and "standby" in result["msg"] and "25006" in result["msg"]


def test_a_login_during_which_a_fence_is_lifted_is_tried_again(lab: Lab, params: dict[str, Any]) -> None:
    """The server says so to who has read the trigger and does not find its function; here, to the first login."""
    with session(lab) as database:
        database.execute(
            """CREATE SEQUENCE logins; CREATE FUNCTION gone() RETURNS event_trigger LANGUAGE plpgsql AS $$
               BEGIN IF session_user = 'firebreak' AND nextval('public.logins') = 1 THEN
                 RAISE EXCEPTION 'cache lookup failed for function 16703'; END IF; END $$;
               CREATE EVENT TRIGGER gone ON login EXECUTE FUNCTION gone(); ALTER EVENT TRIGGER gone ENABLE ALWAYS"""
        )
        try:
            assert go(FENCE, params, check_mode=True)["changed"]
            assert database.execute("SELECT last_value > 1 FROM logins").fetchone() == (True,)
        finally:
            database.execute("DROP EVENT TRIGGER gone; DROP FUNCTION gone; DROP SEQUENCE logins")


def test_who_is_logging_in_is_not_ended_by_the_fence(lab: Lab, params: dict[str, Any]) -> None:
    """PostgreSQL 18 shows a session before it is known whose it is; another run's would fail."""
    words = b"user\0firebreak\0database\0divan\0\0"
    with socket.create_connection(("127.0.0.1", params["postgresql_port"])) as line:
        line.sendall(struct.pack("!II", 8 + len(words), 3 << 16) + words)
        assert line.recv(1000)[:1] == b"R"  # it asks for the password
        assert go(FENCE, params)["outcome"] == "verified"
        release(params)
        line.settimeout(0.1)
        with pytest.raises(TimeoutError):  # and no farewell
            line.recv(1)


def test_a_role_that_is_not_there_touches_nothing(lab: Lab, params: dict[str, Any]) -> None:
    before = observe(lab)
    result = go(LOCK, params, roles=["analyst", "nobody"])
    assert result["failed"] and "nobody" in result["msg"]
    assert observe(lab) == before


def manifest_of(params: dict[str, Any], name: str = "incident_sessions.csv") -> tuple[dict[str, Any], bytes]:
    store = Path(params["case_store"].removeprefix("file://"))
    found = next(store.rglob(f"{name}.json"))
    manifest = json.loads(found.read_text())
    return manifest, (store / manifest["key"]).read_bytes()


@pytest.mark.parametrize("host", ["pg1", "pg2"])
def test_an_export_holds_the_rows_that_the_server_counts(lab: Lab, params: dict[str, Any], host: str) -> None:
    with session(lab) as database:
        since = (database.execute("SELECT now() - interval '30 hours'").fetchone() or [None])[0]
        counted = (
            database.execute("SELECT count(*) FROM audit_logs WHERE created_at > %s", [since]).fetchone() or [0]
        )[0]
    own = {
        "name": "incident_audit_logs.csv",
        "table": "audit_logs",
        "since": since.isoformat(),
        "covers": ["audit_logs"],
    }
    target = {**params, **connection(lab, host), "host": host}
    planned = go(EXPORT, target, **own, check_mode=True)
    assert planned["estimate"] == {"rows": counted, "counted": True}
    done = go(EXPORT, target, **own)
    assert (done["outcome"], done["evidence"]) == ("verified", [f"{host}/1/incident_audit_logs.csv"])
    manifest, data = manifest_of(params, "incident_audit_logs.csv")
    table = list(csv.DictReader(data.decode().splitlines()))
    assert len(table) == manifest["rows"] == counted
    assert [row["created_at"] for row in table] == sorted(row["created_at"] for row in table)
    assert not go(EXPORT, target, **own)["changed"]


@pytest.mark.usefixtures("people")
def test_an_export_of_a_fenced_server_counts_rows_not_lines(lab: Lab, params: dict[str, Any]) -> None:
    with session(lab) as database:
        database.execute("""INSERT INTO probes SELECT n, E'two\\nlines, "quoted"' FROM generate_series(1, 5000) n""")
    go(FENCE, params)
    assert go(EXPORT, params, name="probes.csv", table="probes")["outcome"] == "verified"
    manifest, data = manifest_of(params, "probes.csv")
    assert manifest["rows"] == 5000
    assert len(list(csv.reader(data.decode().splitlines(keepends=True)))) == 5001


def test_only_the_given_users_are_exported_and_no_entry_names_them(lab: Lab, params: dict[str, Any]) -> None:
    go(EXPORT, params, **OWN)
    manifest, data = manifest_of(params)
    assert {row["user_id"] for row in csv.DictReader(data.decode().splitlines())} == {"17", "42"}
    assert {row["revoked"] for row in csv.DictReader(data.decode().splitlines())} == {"f"}
    assert "42" not in [str(value) for value in manifest.values()]


@pytest.mark.parametrize(
    ("own", "word"),
    [
        ({"since": "'; DROP TABLE users"}, "since"),
        ({"user_ids": ["canary'); DROP TABLE users; --"]}, "value"),
        ({"table": "canary_table"}, "name"),
        ({"columns": ["canary_column"]}, "name"),
        ({"postgresql_password": "canary-password"}, "postgresql_password"),
        ({"postgresql_database": "canary_database"}, "postgresql_database"),
        ({"postgresql_port": 1}, "postgresql_port"),
        ({"postgresql_sslmode": "require"}, "postgresql_sslmode"),
    ],
)
def test_bad_input_names_the_option_and_shows_no_value(
    lab: Lab, params: dict[str, Any], own: dict[str, Any], word: str
) -> None:
    before = observe(lab)
    result = go(EXPORT, {**params, **own}, **{**OWN, **own})
    assert result["failed"] and word in result["msg"] and "unexpected" not in result["msg"]
    assert "canary" not in json.dumps(result)
    assert observe(lab) == before


def test_nothing_in_the_environment_leads_elsewhere(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hostile = {
        "PGHOSTADDR": "192.0.2.1",
        "PGSERVICE": "elsewhere",
        "PGOPTIONS": "-c role=app",
        "PGSSLMODE": "verify-full",
    }
    passfile = tmp_path / ".pgpass"
    passfile.write_text(f"*:*:*:*:{params['postgresql_password']}\n")
    passfile.chmod(0o600)
    for name, value in {**hostile, "PGPASSFILE": str(passfile), "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    client = _postgresql.connect(params, Context(correlation="INC-2026-1120-001"))
    assert client.rows("ask", "SELECT current_user::text AS name")[0]["name"] == "firebreak"
    client.close()
    assert os.environ["PGSERVICE"] == "elsewhere"
    with pytest.raises(FirebreakError, match="postgresql_password"):
        _postgresql.connect({**params, "postgresql_password": None}, Context())
    given = Context(env={"PGPASSWORD": params["postgresql_password"]})
    _postgresql.connect({**params, "postgresql_password": None}, given).close()


def test_a_database_name_is_no_connection_string(params: dict[str, Any]) -> None:
    with pytest.raises(FirebreakError, match="postgresql_database"):
        _postgresql.connect({**params, "postgresql_database": "postgresql://192.0.2.1/divan"}, Context())


def test_a_connection_lost_during_a_write_leaves_its_effect_unknown(params: dict[str, Any]) -> None:
    with TcpProxy(("127.0.0.1", params["postgresql_port"])) as proxy:
        client = _postgresql.connect({**params, "postgresql_port": proxy.port}, Context())
        proxy.fault("reset")
        with pytest.raises(FirebreakError) as failure:
            client.alter_system("firebreak.fence", "lost")
        client.close()
    assert failure.value.effect == "unknown"


def test_a_server_that_hangs_is_given_up(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with TcpProxy(("127.0.0.1", params["postgresql_port"])) as proxy:
        client = _postgresql.connect({**params, "postgresql_port": proxy.port}, Context())
        monkeypatch.setattr(_postgresql, "STATEMENT_SECONDS", 0.5)
        monkeypatch.setattr(_postgresql, "CONNECT_SECONDS", 0.5)
        proxy.fault("stall")
        began = time.monotonic()
        with pytest.raises(FirebreakError) as failure:
            client.rows("ask", "SELECT 1 AS one")
        assert time.monotonic() - began < 5
        client.close()
    assert failure.value.effect == "unknown"


def test_a_missing_library_is_named(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    _deps.require.cache_clear()
    result = go(FENCE, params)
    assert result["failed"] and "psycopg>=3.2" in result["msg"]


def test_an_old_server_is_refused_before_anything_is_touched(params: dict[str, Any]) -> None:
    client = _postgresql.connect(params, Context())
    with pytest.raises(FirebreakError, match="PostgreSQL 99") as failure:
        client.require_version(99, "a write fence")
    client.close()
    assert failure.value.effect == "none"
