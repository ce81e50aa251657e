# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The Vault client against a server that redirects, limits, fails and goes away."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ansible_collections.firebreak.incident.plugins.module_utils import _vault
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context
from ansible_collections.firebreak.incident.plugins.module_utils._errors import FirebreakError
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


def connected(url: str, token: str, pauses: list[float] | None = None) -> Any:
    params = {"vault_url": url, "vault_token": token, "vault_namespace": None, "vault_ca_cert": None}
    return _vault.connect(params, Context(sleep=(pauses if pauses is not None else []).append))


def writes(server: Server) -> int:
    return sum(entry["method"] in ("POST", "PUT", "PATCH") for entry in server.log())


def test_a_redirect_takes_neither_token_nor_value_along(vault: Server) -> None:
    with double() as elsewhere:
        vault.fault(
            do="status", status=307, when="before", times=0, path="data", location=f"{elsewhere.url}/v1/secret/data/a"
        )
        client = connected(vault.url, vault.token)
        with pytest.raises(FirebreakError, match=r"redirects \(307\); vault_url must name the active node") as caught:
            client.write_secret("secret", "a", {"X": CANARY}, 0)
        assert caught.value.effect == "none"
        with pytest.raises(FirebreakError, match="redirects"):
            client.read_secret("secret", "a")
        assert not elsewhere.log()


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
