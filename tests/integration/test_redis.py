# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sweep against real servers: who is refused, what slips through, what a crash leaves behind."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ansible_collections.firebreak.incident.plugins.module_utils import _redis
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context
from ansible_collections.firebreak.incident.plugins.module_utils._errors import FirebreakError, Refused
from ansible_collections.firebreak.incident.plugins.modules.redis_session_revocation import CONTROL, mark_key
from lab.parts.valkey import binary

PASSWORD = "canary-of-the-cache"
MOMENT = 1_795_143_600


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def valkey(folder: Path, *lines: str) -> Iterator[redis.Redis]:
    port = free_port()
    config = folder / f"{port}.conf"
    config.write_text("\n".join([f"bind 127.0.0.1\nport {port}\ndir {folder}", 'save ""', *lines, ""]))
    process = subprocess.Popen([binary(), str(config)], stdout=subprocess.DEVNULL)
    client = redis.Redis(port=port, password=PASSWORD, retry=Retry(NoBackoff(), 0))
    try:
        until = time.monotonic() + 10
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.02)
        yield client
    finally:
        client.close()
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    with valkey(tmp_path_factory.mktemp("valkey"), f"requirepass {PASSWORD}") as client:
        yield client


@pytest.fixture
def cache(started: redis.Redis) -> redis.Redis:
    started.flushall()
    started.config_resetstat()
    return started


def port_of(cache: redis.Redis) -> int:
    return int(cache.connection_pool.connection_kwargs["port"])


def params_for(cache: redis.Redis, **own: Any) -> dict[str, Any]:
    options = {**_redis.SPEC, **CONTROL.spec["argument_spec"]}
    params = {name: option.get("default") for name, option in options.items()}
    params |= {"redis_host": "127.0.0.1", "redis_port": port_of(cache), "redis_password": PASSWORD}
    return {**params, "mark": "INC-2026-1120-001/1", "incident_id": "INC-2026-1120-001", "scope": "all", **own}


def revoke(cache: redis.Redis, steps: int | None = None, **own: Any) -> list[str]:
    """Read, plan, apply and prove; ``steps`` stops before the rest, as a crash does."""
    params = params_for(cache, **own)
    client = _redis.connect(params, Context())
    try:
        changes = CONTROL.plan(params, CONTROL.read(client, params)).changes
        for change in changes[:steps]:
            CONTROL.apply(client, params, change)
            assert CONTROL.prove
            CONTROL.prove(client, params, change)
        if steps is None:
            assert not CONTROL.plan(params, CONTROL.read(client, params)).changes
    finally:
        client.close()
    return [change.action for change in changes]


def session(cache: redis.Redis, name: str, began: int) -> None:
    cache.set(f"session:refresh:{name}", json.dumps({"user_id": name, "iat": MOMENT + began}), ex=86400)


def sessions(cache: redis.Redis) -> set[str]:
    return {key.decode().removeprefix("session:refresh:") for key in cache.scan_iter("session:refresh:*", count=1000)}


def fill(cache: redis.Redis, count: int) -> None:
    pipe = cache.pipeline(transaction=False)
    for number in range(count):
        pipe.set(f"cache:{number}", number)
        if number % 10 == 0:
            pipe.set(f"session:refresh:{number % 97}:{number}", json.dumps({"iat": MOMENT - 1 - number % 2}))
    pipe.execute()


def test_all_go_in_pages_and_keys_is_never_sent(cache: redis.Redis) -> None:
    fill(cache, 20_000)
    assert revoke(cache) == ["revoke", "create"]
    assert sessions(cache) == set()
    assert cache.dbsize() == 20_000 + 1
    calls = {name.removeprefix("cmdstat_") for name in cache.info("commandstats")}
    assert {"scan", "unlink"} <= calls
    assert not {"keys", "del", "mget", "flushdb", "eval"} & calls


def test_the_cut_spares_whoever_logs_in_since_in_a_rerun_too(cache: redis.Redis) -> None:
    fill(cache, 5_000)
    session(cache, "1:edge", 0)
    assert revoke(cache, issued_before=str(MOMENT)) == ["revoke", "create"]
    assert sessions(cache) == {"1:edge"}
    session(cache, "2:new", 60)
    session(cache, "3:forged", -60)
    assert revoke(cache, issued_before=str(MOMENT)) == []
    assert sessions(cache) == {"1:edge", "2:new", "3:forged"}
    assert revoke(cache, issued_before=str(MOMENT), mark="INC-2026-1120-001/2") == ["revoke", "create"]
    assert sessions(cache) == {"1:edge", "2:new"}


def test_without_a_cut_a_rerun_spares_later_logins(cache: redis.Redis) -> None:
    session(cache, "1:a", 0)
    revoke(cache, scope="users", users=["1"])
    session(cache, "1:b", 0)
    assert revoke(cache, scope="users", users=["1"]) == []
    assert sessions(cache) == {"1:b"}


def test_a_crash_before_the_mark_is_made_good_by_the_same_task(cache: redis.Redis) -> None:
    fill(cache, 3_000)
    revoke(cache, steps=1, issued_before=str(MOMENT))
    assert sessions(cache) == set()
    assert not list(cache.scan_iter("firebreak:*"))
    session(cache, "1:late", 5)
    assert revoke(cache, issued_before=str(MOMENT)) == ["revoke", "create"]
    assert sessions(cache) == {"1:late"}


def test_a_sweep_that_ends_in_the_middle_says_so_and_goes_on(cache: redis.Redis) -> None:
    fill(cache, 20_000)
    client = _redis.connect(params_for(cache), Context())
    with pytest.raises(FirebreakError, match="deadline") as failure:
        client.sweep(b"session:*", lambda keys: keys, None, 10, 0.002)
    assert failure.value.effect == "unknown"
    assert client.size() < 22_000 or "0 keys" in failure.value.msg
    client.close()
    revoke(cache)
    assert sessions(cache) == set()


def test_what_went_before_the_server_became_a_replica_is_told(cache: redis.Redis) -> None:
    """The answers to the last two pages come together, and the second is an error."""
    fill(cache, 5_000)
    context = Context()
    client = _redis.connect(params_for(cache), context)
    pages: list[int] = []

    def sweep(last: int | None) -> None:
        def condemn(keys: list[bytes], _values: list[bytes | None]) -> list[bytes]:
            pages.append(len(keys))
            if last is None or len(pages) < last - 1:
                return []
            if len(pages) == last:
                cache.replicaof("127.0.0.1", free_port())
            return keys

        client.sweep(b"session:*", lambda keys: keys, condemn, 1000, 10)

    sweep(None)
    last = len(pages)
    pages.clear()
    try:
        with pytest.raises(FirebreakError, match="READONLY"):
            sweep(last)
    finally:
        cache.replicaof("NO", "ONE")
    assert len(sessions(cache)) == 500 - pages[-2]
    assert context.effects == 1
    client.close()


def test_a_thief_that_renews_during_the_scan_is_caught(cache: redis.Redis) -> None:
    """Each renewal moves the session to a new name; in a long scan most of them are written where it has been already."""
    fill(cache, 60_000)
    stop = threading.Event()
    renewals = []

    def thief(number: int) -> None:
        with redis.Redis(port=port_of(cache), password=PASSWORD) as own:
            name, turn = f"session:refresh:7:thief{number}", 0
            own.set(name, json.dumps({"iat": MOMENT - 5}))
            while not stop.wait(0.003) and (value := own.getdel(name)):
                turn += 1
                name = f"session:refresh:7:thief{number}-{turn}"
                own.set(name, value)
                renewals.append(name)

    thieves = [threading.Thread(target=thief, args=(number,)) for number in range(4)]
    for one in thieves:
        one.start()
    try:
        while len(renewals) < 8:
            time.sleep(0.01)
        revoke(cache, scope="users", users=["7"], issued_before=str(MOMENT), batch=50)
        for one in thieves:
            one.join(2)
        assert not any(one.is_alive() for one in thieves)
        assert not [name for name in sessions(cache) if name.startswith("7:")]
    finally:
        stop.set()


def test_the_mark_names_the_round_and_ends_with_the_incident(cache: redis.Redis) -> None:
    params = {"scope": "users", "users": ["1"], "issued_before": str(MOMENT)}
    revoke(cache, **params, expires="2200-01-01T00:00:00Z")
    key = mark_key(params_for(cache, **params))
    assert key.startswith("firebreak:revocation:INC-2026-1120-001/1:")
    assert cache.expiretime(key) == 7258118400
    assert json.loads(cache.get(key)) == {"issued_before": "2026-11-20T03:00:00Z", "scope": "users", "users": 1}


def test_sessions_that_do_not_tell_their_time_are_left_alone_when_none_does(cache: redis.Redis) -> None:
    session(cache, "1:a", -5)
    with pytest.raises(Refused, match="issued_at"):
        revoke(cache, issued_before=str(MOMENT), issued_at="issued")
    assert sessions(cache) == {"1:a"}


def test_without_tracking_the_scans_alone_must_find_none(cache: redis.Redis) -> None:
    cache.acl_setuser(
        "plain", enabled=True, passwords=[f"+{PASSWORD}"], keys="*", commands=["+@all", "-client|tracking"]
    )
    fill(cache, 3_000)
    revoke(cache, redis_username="plain", issued_before=str(MOMENT))
    assert sessions(cache) == set()


def test_a_replica_is_refused(cache: redis.Redis, tmp_path: Path) -> None:
    master = f"replicaof 127.0.0.1 {port_of(cache)}"
    lines = (f"requirepass {PASSWORD}", f"masterauth {PASSWORD}", master)
    with valkey(tmp_path, *lines) as replica, pytest.raises(Refused, match="redis_host: this server is a replica"):
        revoke(replica)


def test_a_node_of_a_cluster_is_refused(tmp_path: Path) -> None:
    lines = (f"requirepass {PASSWORD}", "cluster-enabled yes", f"cluster-port {free_port()}")
    with valkey(tmp_path, *lines) as node, pytest.raises(Refused, match="redis_host: a cluster"):
        revoke(node)


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"redis_password": "canary-that-is-wrong"}, "WRONGPASS: redis_username or redis_password"),
        ({"redis_password": None}, "NOAUTH: redis_username or redis_password"),
        ({"redis_port": 1}, "no connection to redis_host, redis_port"),
        ({"redis_host": "cache.invalid"}, "no connection to redis_host, redis_port"),
        ({"redis_tls": True}, "no answer in time from redis_host, redis_port"),
        ({"redis_username": "reader"}, "NOPERM: the ACL of redis_username"),
    ],
)
def test_an_error_names_the_option_and_no_value(cache: redis.Redis, own: dict[str, Any], told: str) -> None:
    cache.acl_setuser("reader", enabled=True, passwords=[f"+{PASSWORD}"], keys="*", commands=["+ping"])
    session(cache, "1:a", 0)
    with pytest.raises(FirebreakError) as failure:
        revoke(cache, **own)
    assert told in failure.value.msg
    assert failure.value.effect == "none"
    assert "canary" not in failure.value.msg
    assert sessions(cache) == {"1:a"}


def test_the_environment_moves_nothing(cache: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REDIS_URL", "REDIS_HOST", "REDIS_PORT", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "redis://127.0.0.1:1")
    session(cache, "1:a", 0)
    revoke(cache)
    assert sessions(cache) == set()
    off_the_lab = Context(env={"REDISCLI_AUTH": PASSWORD})
    client = _redis.connect(params_for(cache, redis_password=None), off_the_lab)
    assert client.size() == 1
    assert off_the_lab.secrets.found_in({"told": PASSWORD})
    client.close()
