# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the Vault double has beyond Vault: faults, a journal, a clock; and how its process begins and ends."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract import vault_servers
from tests.contract.vault_servers import ROOT, Server

KEY = "/v1/secret/data/key"


@pytest.fixture
def server() -> Iterator[Server]:
    with vault_servers.double() as started:
        yield started


def version(server: Server) -> int:
    reply = server.ask("GET", "/v1/secret/metadata/key")
    return int(reply.body["data"]["current_version"]) if reply.status == 200 else 0


def put(server: Server) -> int:
    return server.ask("POST", KEY, {"data": {"F": "value"}}).status


def test_a_request_dropped_before_has_no_effect(server: Server) -> None:
    server.fault(do="drop", when="before", method="POST")
    with pytest.raises(http.client.RemoteDisconnected):
        put(server)
    assert version(server) == 0


def test_a_reply_that_is_lost_leaves_the_effect(server: Server) -> None:
    server.fault(do="drop", method="POST")
    with pytest.raises(http.client.RemoteDisconnected):
        put(server)
    assert version(server) == 1


@pytest.mark.parametrize("status", [500, 503, 429, 307])
@pytest.mark.parametrize(("when", "effect"), [("before", 0), ("after", 1)])
def test_a_status_instead_of_the_answer(server: Server, status: int, when: str, effect: int) -> None:
    server.fault(do="status", status=status, when=when, path="^/v1/secret/data/", location="http://127.0.0.1:9/")
    reply = server.ask("POST", KEY, {"data": {"F": "value"}})
    assert reply.status == status
    assert version(server) == effect
    assert (reply.body is None) == (status == 307)
    # After an effect nobody says "sealed": a client may take that word for "nothing happened".
    assert ("sealed" in str(reply.body)) == (status == 503 and when == "before")
    assert reply.headers.get("Location") == ("http://127.0.0.1:9/" if status == 307 else None)


def test_a_fault_meets_the_request_that_was_chosen(server: Server) -> None:
    server.fault(do="status", path="/data/", method="POST", nth=2, times=2)
    assert [put(server) for _unused in range(4)] == [200, 500, 500, 200]
    server.fault(do="status", method="POST", times=0)
    assert [put(server) for _unused in range(3)] == [500, 500, 500]
    assert server.ask("DELETE", "/lab/faults").status == 204
    assert put(server) == 200


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_delay_keeps_no_other_request_waiting(server: Server, when: str) -> None:
    server.fault(do="delay", seconds=1.0, when=when, method="POST")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    began = time.monotonic()
    connection.request("POST", KEY, json.dumps({"data": {}}), {"X-Vault-Token": server.token})
    while not server.log() or (when == "after" and not version(server)):
        time.sleep(0.01)
    assert version(server) == (0 if when == "before" else 1)
    assert time.monotonic() - began < 1
    assert connection.getresponse().status == 200
    assert time.monotonic() - began >= 1
    connection.close()


def test_the_journal_has_no_payload(server: Server) -> None:
    accessor = server.ask("GET", "/v1/auth/token/lookup-self").body["data"]["accessor"]
    server.ask("DELETE", "/lab/log")
    put(server)
    put(server)
    server.ask("GET", KEY, token="hvs.unknown", headers={"X-Correlation-Id": "INC-2026-1120-001"})
    first, second, third = server.log()
    assert (first["method"], first["path"], first["accessor"], first["status"]) == ("POST", KEY, accessor, 200)
    assert first["body"] and first["body"] == second["body"]
    assert (third["accessor"], third["status"], third["body"]) == (None, 403, None)
    assert third["correlation"] == "INC-2026-1120-001"
    shown = json.dumps([first, second, third])
    assert "value" not in shown and server.token not in shown


def test_the_audit_log_names_the_incident_and_no_value(server: Server, tmp_path: Path) -> None:
    log = tmp_path / "audit.log"
    enabled = {"type": "file", "options": {"file_path": str(log)}}
    assert server.ask("PUT", "/v1/sys/audit/file", enabled).status == 204
    server.ask("POST", KEY, {"data": {"F": "a-secret-value"}}, headers={"X-Correlation-Id": "INC-2026-1120-001"})
    hashed = server.ask("POST", "/v1/sys/audit-hash/file", {"input": "a-secret-value"}).body["data"]["hash"]
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    written = [line for line in lines if line["request"]["path"] == "secret/data/key"]
    assert [line["type"] for line in written] == ["request", "response"]
    assert all(line["request"]["headers"]["x-correlation-id"] == ["INC-2026-1120-001"] for line in written)
    assert written[0]["request"]["data"]["data"]["F"] == hashed
    assert "a-secret-value" not in log.read_text(encoding="utf-8")
    assert server.token not in log.read_text(encoding="utf-8")
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_version_deletes_itself_when_its_time_is_over(server: Server) -> None:
    server.ask("POST", "/v1/secret/metadata/key", {"delete_version_after": "1h"})
    put(server)
    token = server.ask("POST", "/v1/auth/token/create", {"ttl": "1h", "policies": ["default"]}).body["auth"]
    assert server.ask("GET", KEY).status == 200
    server.ask("POST", "/lab/clock", {"seconds": 3700})
    assert server.ask("GET", KEY).status == 404
    assert server.ask("GET", "/v1/auth/token/lookup-self", token=token["client_token"]).status == 403


def test_one_of_many_writers_wins(server: Server) -> None:
    body = {"options": {"cas": 0}, "data": {}}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.ask, "POST", KEY, body) for _unused in range(8)]
    assert sorted(each.result().status for each in asked) == [200] + [400] * 7


# --- the process


def gone(pid: int, seconds: float = 3.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_it_ends_on_sigterm(server: Server) -> None:
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(3) == 0


def test_it_ends_with_its_parent() -> None:
    port = vault_servers.free_port()
    parent_code = (
        "import subprocess,sys\n"
        "p=subprocess.Popen([sys.executable,'-m','lab.doubles.vault','--port',sys.argv[1]],"
        "stdout=subprocess.PIPE,text=True)\n"
        "print(p.stdout.readline().strip(),p.pid,flush=True)\n"
        "sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", parent_code, str(port)],
        cwd=ROOT,
        env={**os.environ, "VAULT_DEV_ROOT_TOKEN": "root"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout and parent.stdin
    word, pid = parent.stdout.readline().split()
    assert word == "ready"
    parent.kill()
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    assert gone(int(pid))


def test_the_root_token_is_no_argument_and_must_be_there() -> None:
    command: list[Any] = [sys.executable, "-m", "lab.doubles.vault", "--port", "1"]
    env = {name: value for name, value in os.environ.items() if name != "VAULT_DEV_ROOT_TOKEN"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "VAULT_DEV_ROOT_TOKEN" in done.stderr


def test_it_speaks_tls(tmp_path: Path) -> None:
    import ssl

    pem = tmp_path / "server.pem"
    pem.write_bytes(certificate())
    port = vault_servers.free_port()
    with subprocess.Popen(
        [sys.executable, "-m", "lab.doubles.vault", "--port", str(port), "--tls", str(pem)],
        cwd=ROOT,
        env={**os.environ, "VAULT_DEV_ROOT_TOKEN": "root"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout and process.stdout.readline() == "ready\n"
            trust = ssl.create_default_context(cafile=str(pem))
            connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=5, context=trust)
            connection.request("GET", "/v1/sys/health")
            assert connection.getresponse().status == 200
            connection.close()
        finally:
            process.terminate()


def certificate() -> bytes:
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "lab")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + signed.public_bytes(serialization.Encoding.PEM)
