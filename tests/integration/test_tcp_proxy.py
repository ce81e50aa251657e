# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The fault proxy does what it says to a real server."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest
import redis
from psycopg.conninfo import make_conninfo
from redis.backoff import NoBackoff
from redis.retry import Retry

from lab import ROOT
from lab.client import Lab
from lab.faults import proxied
from lab.parts.services import request
from lab.tcp_proxy import TcpProxy


def cache(lab: Lab, port: int) -> redis.Redis:
    password = lab.hostvars("cache1")["firebreak_redis_password"]
    return redis.Redis(
        port=port, password=password, socket_timeout=0.5, socket_connect_timeout=0.5, retry=Retry(NoBackoff(), 0)
    )


@pytest.fixture
def proxy(lab: Lab) -> TcpProxy:
    return TcpProxy(("127.0.0.1", lab.hostvars("cache1")["firebreak_redis_port"]))


def test_passes_everything_on(lab: Lab, proxy: TcpProxy) -> None:
    with proxy, cache(lab, proxy.port) as client:
        client.set("proxy:big", "x" * 1_000_000)
        assert client.strlen("proxy:big") == 1_000_000
        client.delete("proxy:big")
        assert proxy.passed["up"] > 1_000_000 and proxy.accepted == 1


def test_delay(lab: Lab, proxy: TcpProxy) -> None:
    with proxy, cache(lab, proxy.port) as client:
        client.ping()
        proxy.fault("delay", 0.2, way="up")
        began = time.monotonic()
        client.ping()
        assert 0.2 <= time.monotonic() - began < 0.45


def test_reset_is_a_server_that_is_down(lab: Lab, proxy: TcpProxy) -> None:
    with proxy, cache(lab, proxy.port) as client:
        client.ping()
        proxy.fault("reset")
        with pytest.raises(redis.ConnectionError):
            client.ping()
        proxy.clear()
        assert client.ping()


@pytest.mark.parametrize("kind", ["stall", "drop"])
def test_stall_goes_on_and_drop_does_not(lab: Lab, proxy: TcpProxy, kind: str) -> None:
    with proxy, cache(lab, proxy.port) as client:
        client.delete("proxy:kept")
        proxy_client = client.connection_pool.get_connection()
        proxy.fault(kind, way="up")
        proxy_client.send_command("SET", "proxy:kept", kind)
        with pytest.raises(redis.TimeoutError):
            proxy_client.read_response()
        proxy.clear()
        time.sleep(0.2)
        arrived = cache(lab, lab.hostvars("cache1")["firebreak_redis_port"]).getdel("proxy:kept")
        # The client gave up and closed; what stalled was on its way all the same.
        assert arrived == (b"stall" if kind == "stall" else None)


def test_cut_loses_the_answer_of_a_write_once(lab: Lab, proxy: TcpProxy) -> None:
    with proxy, cache(lab, proxy.port) as client:
        client.delete("proxy:counter")
        proxy.fault("cut", 0, way="down", times=1)
        with pytest.raises(redis.ConnectionError):
            client.incr("proxy:counter")
        assert client.incr("proxy:counter") == 2  # it had its effect, and the fault is used up
        client.delete("proxy:counter")


def test_cut_after_so_many_bytes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, TcpProxy(server.getsockname()) as proxy:
        proxy.fault("cut", 5, way="up")
        client = socket.create_connection(("127.0.0.1", proxy.port))
        peer, _unused = server.accept()
        client.sendall(b"1234567890")
        assert peer.recv(100) == b"12345" and peer.recv(100) == b""


def test_server_sees_the_source_that_was_asked_for(lab: Lab) -> None:
    env = lab.env
    with TcpProxy(("127.0.0.1", int(env["PGPORT"])), source="127.66.0.66") as proxy:
        where = make_conninfo(
            host="127.0.0.1", port=proxy.port, user=env["PGUSER"], password=env["PGPASSWORD"], dbname="divan"
        )
        with psycopg.connect(where) as connection:
            assert connection.execute("SELECT host(inet_client_addr())").fetchone() == ("127.66.0.66",)


def test_an_unknown_fault_is_refused(proxy: TcpProxy) -> None:
    with proxy, pytest.raises(ValueError, match="kind is one of"):
        proxy.fault("tickle")


def test_control_over_http(lab: Lab) -> None:
    target = f"127.0.0.1:{lab.hostvars('cache1')['firebreak_redis_port']}"
    process = subprocess.Popen(
        [sys.executable, "-m", "lab.tcp_proxy", "--target", target], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        ports = json.loads(process.stdout.readline())
        control = f"http://127.0.0.1:{ports['control_port']}/"
        with cache(lab, ports["port"]) as client:
            assert client.ping()
            assert request("PUT", control, {"kind": "reset"})[1]["fault"]["kind"] == "reset"
            with pytest.raises(redis.ConnectionError):
                client.ping()
            assert request("DELETE", control)[1]["fault"] is None
            assert client.ping()
            assert request("PUT", control, {"kind": "tickle"})[0] == 400
    finally:
        process.terminate()
        process.communicate(timeout=5)


def test_inventory_behind_proxies(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "inventory.yml"
    with proxied(lab, path) as proxies:
        assert set(proxies) == {"cf", "cache1", "pg1", "pg2", "vault", "app"}
        program = Path(sys.executable).with_name("ansible")
        words = [str(program), "-i", str(path), "app", "-m", "ansible.builtin.command", "-a", "id", "-T", "3"]
        assert subprocess.run(words, capture_output=True, check=False).returncode == 0
        assert proxies["app"].accepted == 1
        hosts = json.loads(path.read_text())["all"]["children"]
        url = hosts["firebreak_secrets"]["hosts"]["vault"]["firebreak_vault_url"] + "/v1/sys/health"
        assert request("GET", url)[0] == 200
        proxies["vault"].fault("reset")
        with pytest.raises((ConnectionResetError, ConnectionRefusedError)):
            request("GET", url)
