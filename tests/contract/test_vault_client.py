# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The Vault client against a server that redirects, limits, fails and goes away."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.firebreak.incident.plugins.module_utils import _http, _vault
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context
from ansible_collections.firebreak.incident.plugins.module_utils._errors import FirebreakError, Refused
from tests.contract.vault_servers import Server, double, free_port

CANARY = "canary-value-of-a-secret"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with double() as running:
        yield running


@pytest.fixture
def vault(server: Server) -> Iterator[Server]:
    server.ask("DELETE", "/lab/faults")
    server.ask("DELETE", "/lab/log")
    yield server
    server.ask("DELETE", "/lab/faults")


def connected(
    url: str, token: str, pauses: list[float] | None = None, deadline: float = 0.0, **options: str | None
) -> Any:
    params = {"vault_url": url, "vault_token": token, "vault_namespace": None, "vault_ca_cert": None, **options}
    return _vault.connect(params, Context(sleep=(pauses if pauses is not None else []).append, deadline=deadline))


def writes(server: Server) -> int:
    return sum(entry["method"] in ("POST", "PUT", "PATCH") for entry in server.log())


def test_a_redirect_takes_neither_token_nor_value_along(vault: Server) -> None:
    with double() as elsewhere:
        vault.fault(
            do="status", status=307, when="before", times=0, path="data", location=f"{elsewhere.url}/v1/secret/data/a"
        )
        client = connected(vault.url, vault.token)
        with pytest.raises(
            FirebreakError, match=r"redirects \(307\): vault_url must lead to the active node"
        ) as caught:
            client.write_secret("secret", "a", {"X": CANARY}, 0)
        assert caught.value.effect == "unknown"  # nobody could look whether it was written
        with pytest.raises(FirebreakError, match="redirects"):
            client.read_secret("secret", "a")
        assert not elsewhere.log()


def test_a_redirect_after_the_write_is_looked_up(vault: Server) -> None:
    client = connected(vault.url, vault.token)
    vault.fault(do="status", status=307, when="after", path="data/moved", method="POST", location=vault.url)
    assert client.write_secret("secret", "moved", {"X": CANARY}, 0) == 1
    vault.fault(do="status", status=307, when="after", path="destroy/moved", location=vault.url)
    client.destroy_versions("secret", "moved", [1])
    assert _vault.undestroyed(client.read_metadata("secret", "moved")) == []


def test_a_path_in_the_address(vault: Server) -> None:
    with pytest.raises(FirebreakError, match=r"redirects \(307\): .* without a path of its own") as caught:
        connected(f"{vault.url}/ui", vault.token).read_secret("secret", "a")
    assert caught.value.effect == "none"


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://", "https:vault", "http://127.0.0.1:x", "http://h:99999", "", "h"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(Refused, match=r"^vault_url must be a URL"):
        connected(url, "t")
    with pytest.raises(FirebreakError, match="must be a URL") as caught:
        _http.request("GET", url)
    assert caught.value.effect == "none"


@pytest.mark.parametrize("value", ["s.t\u00f6ken", "s.\u20ac", "hvs.t\n", "two words", "\x00"])
def test_headers_that_cannot_be_sent(value: str) -> None:
    for option in ("vault_token", "vault_namespace"):
        with pytest.raises(Refused, match=f"^{option} holds characters") as caught:
            connected("http://127.0.0.1:9", "t", **{option: value})
        assert value not in caught.value.msg


@pytest.mark.parametrize("content", [None, "no certificate"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_certificates_that_cannot_be_read(tmp_path: Path, content: str | None, scheme: str) -> None:
    file = tmp_path / "ca.pem"
    if content:
        file.write_text(content)
    with pytest.raises(Refused, match=r"^vault_ca_cert cannot be used"):
        connected(f"{scheme}://127.0.0.1:9", "t", vault_ca_cert=str(file))


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """A server that is no Vault."""

    def do_GET(self) -> None:
        status, content = self.server.answer  # type: ignore[attr-defined]
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.mark.parametrize("status", [200, 404])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"{}", b"[]", b'{"error": "x"}', b'{"data": "x"}'])
def test_a_server_that_is_no_vault(status: int, content: bytes) -> None:
    """Its answer says nothing of a secret, above all not that there is none."""
    with http.server.HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        server.answer = (status, content)  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        client = connected(f"http://127.0.0.1:{server.server_port}", "t")
        for read in (client.read_secret, client.read_metadata):
            with pytest.raises(FirebreakError, match=rf"answered {status} .*vault_url") as caught:
                read("secret", "a")
            assert caught.value.effect == "none"
        client.close()
        server.shutdown()


def test_a_server_that_hangs_is_asked_once(vault: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vault, "ANSWER_SECONDS", 0.2)
    vault.fault(do="delay", seconds=2, when="before", times=0, path="data/hanging")
    with pytest.raises(FirebreakError, match=r"gave no answer \(ReadTimeout\)") as caught:
        connected(vault.url, vault.token).read_secret("secret", "hanging")
    assert caught.value.effect == "none"
    assert len(vault.log()) == 1


def test_nothing_outlasts_the_deadline(vault: Server) -> None:
    vault.fault(do="delay", seconds=4, when="before", times=0, path="data/hanging")
    begun = time.monotonic()
    with pytest.raises(FirebreakError, match="gave no answer"):
        connected(vault.url, vault.token, deadline=time.time() + 0.5).read_secret("secret", "hanging")
    assert time.monotonic() - begun < 3
    vault.fault(do="status", status=429, when="before", times=0, path="data/limited")
    pauses: list[float] = []
    with pytest.raises(FirebreakError, match="429"):
        connected(vault.url, vault.token, pauses, deadline=time.time() + 0.5).read_secret("secret", "limited")
    assert not pauses


def test_a_limit_is_waited_for_and_the_write_made_once(vault: Server) -> None:
    vault.fault(do="status", status=429, when="before", times=2, path="data/limited")
    pauses: list[float] = []
    assert connected(vault.url, vault.token, pauses).write_secret("secret", "limited", {"X": CANARY}, 0) == 1
    assert pauses == [1.0, 1.0]


def test_a_write_is_not_repeated_and_a_lost_reply_is_looked_up(vault: Server) -> None:
    client = connected(vault.url, vault.token)
    vault.fault(do="drop", when="after", method="POST", path="data/lost")
    assert client.write_secret("secret", "lost", {"X": CANARY}, 0) == 1
    assert writes(vault) == 1
    vault.fault(do="drop", when="before", method="POST", path="data/lost")
    with pytest.raises(FirebreakError, match="gave no answer") as caught:
        client.write_secret("secret", "lost", {"X": CANARY}, 1)
    assert caught.value.effect == "unknown"
    assert writes(vault) == 2


def test_neither_reply_nor_look_up(vault: Server) -> None:
    client = connected(vault.url, vault.token)
    vault.fault(do="drop", when="after", times=0, path="data/dark")
    with pytest.raises(FirebreakError) as caught:
        client.write_secret("secret", "dark", {"X": CANARY}, 0)
    assert caught.value.effect == "unknown" and CANARY not in caught.value.msg


def test_a_lost_destruction_is_looked_up(vault: Server) -> None:
    client = connected(vault.url, vault.token)
    client.write_secret("secret", "old", {"X": CANARY}, 0)
    vault.fault(do="drop", when="after", path="destroy/old")
    client.destroy_versions("secret", "old", [1])
    assert _vault.undestroyed(client.read_metadata("secret", "old")) == []


def test_sealed_and_failing(vault: Server) -> None:
    client = connected(vault.url, vault.token)
    vault.fault(do="status", status=503, when="before", times=0, path="data/sealed")
    with pytest.raises(FirebreakError, match="503: it is sealed") as caught:
        client.write_secret("secret", "sealed", {"X": CANARY}, 0)
    assert caught.value.effect == "none"
    with pytest.raises(FirebreakError, match="503"):
        client.read_secret("secret", "sealed")
    assert len(vault.log()) == 1 + _vault.ATTEMPTS


def test_reads_outlive_a_passing_failure(vault: Server) -> None:
    vault.fault(do="drop", when="before", times=2, path="metadata/none")
    assert connected(vault.url, vault.token).read_metadata("secret", "none") is None


def test_nobody_there() -> None:
    with pytest.raises(FirebreakError, match=r"gave no answer \(ConnectionError") as caught:
        connected(f"http://127.0.0.1:{free_port()}", "t").write_secret("secret", "a", {"X": CANARY}, 0)
    assert caught.value.effect == "none"


def test_held_values_and_errors_do_not_show_values(vault: Server) -> None:
    client = connected(vault.url, vault.token)
    client.held["x"] = CANARY
    with pytest.raises(TypeError):
        repr(client.held)
    client.write_secret("secret", "b", {"X": CANARY}, 0)
    with pytest.raises(FirebreakError, match=r"written by token in between \(version 1 where 5") as caught:
        client.write_secret("secret", "b", {"X": CANARY + "2"}, 5)
    assert CANARY not in repr(caught.value)
