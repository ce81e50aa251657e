# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""hvac itself against the Vault double and the real Vault: the SDK must not notice which one it speaks to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
from hvac import Client, adapters, exceptions

from tests.contract import vault_servers
from tests.contract.vault_servers import Server


@pytest.fixture(scope="module", params=["double", "real"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if request.param == "double":
        with vault_servers.double() as started:
            yield started
    else:
        with vault_servers.real_vault(tmp_path_factory.mktemp("vault")) as started:
            yield started


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    session = requests.Session()
    session.trust_env = False
    yield Client(server.url, token=server.token, session=session)
    session.close()


@pytest.fixture
def raw(server: Server) -> Iterator[adapters.RawAdapter]:
    """As the collection's own client speaks: no redirects, no exceptions."""
    session = requests.Session()
    session.trust_env = False
    yield adapters.RawAdapter(base_uri=server.url, token=server.token, allow_redirects=False, session=session)
    session.close()


def read(client: Client, path: str, version: int | None = None) -> Any:
    return client.secrets.kv.v2.read_secret_version(path, version=version, raise_on_deleted_version=True)["data"]


def test_key_value(client: Client) -> None:
    kv, path = client.secrets.kv.v2, "hvac/kv"
    assert kv.create_or_update_secret(path, {"F": "one", "G": "g"}, cas=0)["data"]["version"] == 1
    with pytest.raises(exceptions.InvalidRequest, match="did not match the current version"):
        kv.create_or_update_secret(path, {"F": "no"}, cas=0)
    assert kv.patch(path, {"F": "two"})["data"]["version"] == 2
    assert read(client, path)["data"] == {"F": "two", "G": "g"}
    assert read(client, path, version=1)["data"]["F"] == "one"
    assert kv.list_secrets("hvac")["data"]["keys"] == ["kv"]
    assert kv.delete_latest_version_of_secret(path).status_code == 204
    with pytest.raises(exceptions.InvalidPath):
        read(client, path)
    kept = kv.read_secret_version(path, raise_on_deleted_version=False)["data"]
    assert kept["data"] is None and kept["metadata"]["version"] == 2
    assert kv.undelete_secret_versions(path, [2]).status_code == 204
    assert kv.delete_secret_versions(path, [1]).status_code == 204
    assert kv.destroy_secret_versions(path, [1]).status_code == 204
    metadata = kv.read_secret_metadata(path)["data"]
    assert metadata["versions"]["1"]["destroyed"] and not metadata["versions"]["2"]["destroyed"]
    assert kv.update_metadata(path, custom_metadata={"owner": "x"}).status_code == 204
    assert kv.read_secret_metadata(path)["data"]["custom_metadata"] == {"owner": "x"}
    assert kv.delete_metadata_and_all_versions(path).status_code == 204
    with pytest.raises(exceptions.InvalidPath):
        kv.read_secret_metadata(path)


def test_key_value_by_the_plain_adapter(raw: adapters.RawAdapter) -> None:
    where, merge = "/v1/secret/data/hvac/raw", {"Content-Type": "application/merge-patch+json"}
    written = raw.request("post", where, json={"options": {"cas": 0}, "data": {"F": "one", "G": "g"}})
    assert written.json()["data"]["version"] == 1
    patched = raw.request("patch", where, headers=merge, json={"options": {"cas": 1}, "data": {"F": "two"}})
    assert patched.json()["data"]["version"] == 2
    assert raw.request("get", where).json()["data"]["data"] == {"F": "two", "G": "g"}
    again = raw.request("post", where, json={"options": {"cas": 1}, "data": {}}, raise_exception=False)
    assert again.status_code == 400 and "did not match" in again.json()["errors"][0]
    keys = raw.request("get", "/v1/secret/subkeys/hvac/raw").json()["data"]["subkeys"]
    assert keys == {"F": None, "G": None}
    assert raw.request("get", "/v1/secret/data/hvac/none", raise_exception=False).json() == {"errors": []}
    tagged = raw.request("patch", "/v1/secret/metadata/hvac/raw", headers=merge, json={"custom_metadata": {"a": "b"}})
    assert tagged.status_code == 204 and not tagged.content


def test_system(client: Client) -> None:
    health = client.sys.read_health_status(method="GET")
    assert health["initialized"] and not health["sealed"] and health["version"] and not health["enterprise"]
    assert client.sys.read_health_status().status_code == 200
    assert not client.sys.is_sealed() and client.sys.is_initialized()
    assert client.is_authenticated()
    mounts = client.sys.list_mounted_secrets_engines()["data"]
    assert mounts["secret/"]["options"] == {"version": "2"}
    assert client.sys.enable_secrets_engine("kv", "hvac-kv", options={"version": "2"}).status_code == 204
    assert client.sys.disable_secrets_engine("hvac-kv").status_code == 204
    assert client.sys.enable_audit_device("file", path="hvac", options={"file_path": "discard"}).status_code == 204
    assert "hvac/" in client.sys.list_enabled_audit_devices()["data"]
    assert client.sys.calculate_hash("hvac", "value")["data"]["hash"].startswith("hmac-sha256:")
    assert client.sys.disable_audit_device("hvac").status_code == 204


def test_policies_and_tokens(client: Client, server: Server) -> None:
    text = 'path "secret/data/hvac/*" { capabilities = ["read"] }'
    assert client.sys.create_or_update_acl_policy("hvac", text).status_code == 204
    assert client.sys.read_acl_policy("hvac")["data"]["policy"] == text
    assert client.sys.read_policy("hvac")["data"]["rules"] == text
    assert {"hvac", "default", "root"} <= set(client.sys.list_acl_policies()["data"]["keys"])
    assert {"hvac", "default", "root"} <= set(client.sys.list_policies()["data"]["policies"])
    made = client.auth.token.create_orphan(policies=["hvac"], ttl="1h", display_name="run", meta={"run": "1"})["auth"]
    limited = Client(server.url, token=made["client_token"])
    about = limited.auth.token.lookup_self()["data"]
    assert about["orphan"] and about["policies"] == ["default", "hvac"] and about["display_name"] == "token-run"
    assert client.sys.get_capabilities(["secret/data/hvac/x"], token=made["client_token"])["capabilities"] == ["read"]
    assert limited.sys.get_capabilities(["sys/audit"])["capabilities"] == ["deny"]
    with pytest.raises(exceptions.Forbidden):
        limited.secrets.kv.v2.create_or_update_secret("hvac/x", {"F": "x"})
    assert client.auth.token.lookup_accessor(made["accessor"])["data"]["meta"] == {"run": "1"}
    assert made["accessor"] in client.auth.token.list_accessors()["data"]["keys"]
    assert client.auth.token.revoke_accessor(made["accessor"]).status_code == 204
    assert not limited.is_authenticated()
    with pytest.raises(exceptions.InvalidRequest, match="invalid accessor"):
        client.auth.token.lookup_accessor(made["accessor"])
    assert client.sys.delete_acl_policy("hvac").status_code == 204


def test_transit_hmac(client: Client) -> None:
    client.sys.enable_secrets_engine("transit", "hvac-transit")
    client.secrets.transit.create_key("proof", mount_point="hvac-transit")
    one = client.secrets.transit.generate_hmac("proof", "dmFsdWU=", mount_point="hvac-transit")["data"]["hmac"]
    two = client.secrets.transit.generate_hmac("proof", "b3RoZXI=", mount_point="hvac-transit")["data"]["hmac"]
    assert one.startswith("vault:v1:") and one != two
    again = client.secrets.transit.generate_hmac("proof", "dmFsdWU=", mount_point="hvac-transit")["data"]["hmac"]
    assert again == one
    client.sys.disable_secrets_engine("hvac-transit")
