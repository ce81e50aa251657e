# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The same requests to the lab's Vault double and to the real Vault: both must answer as the table says, and alike."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.contract import vault_servers
from tests.contract.vault_servers import Reply, Server

MERGE = {"Content-Type": "application/merge-patch+json"}
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d*[1-9])?(Z|[+-]\d\d:\d\d)")
# Values that differ from server to server, or from second to second; their type is compared.
OWN = {
    "accessor",
    "build_date",
    "client_id",
    "client_token",
    "clock_skew_ms",
    "cluster_id",
    "cluster_name",
    "creation_time",
    "echo_duration_ms",
    "hash",
    "hmac",
    "id",
    "last_renewal_time",
    "request_id",
    "server_time_utc",
    "ttl",
    "uuid",
}


@dataclasses.dataclass
class Step:
    """One request and what must come back. ``<k>`` in it is this row's own key, other ``<names>`` are what was kept."""

    method: str
    path: str
    body: Any = None
    status: int = 200
    has: dict[str, Any] = dataclasses.field(default_factory=dict)  # dotted path -> value, or str that is in it
    keep: dict[str, str] = dataclasses.field(default_factory=dict)  # name -> dotted path
    token: str | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    loose: bool = False  # its texts need not be equal
    ignore: str = "$^"  # a regular expression: what need not be equal at all


def errors(*texts: str) -> dict[str, Any]:
    return {f"errors.{number}": text for number, text in enumerate(texts)}


def write(version: int = 1, value: Any = "one", **options: Any) -> Step:
    body = {"data": {"F": value, "G": "g"}, **({"options": options} if options else {})}
    return Step("POST", "secret/data/<k>", body, has={"data.version": version})


def patch(path: str, body: Any, status: int = 200, **more: Any) -> Step:
    return Step("PATCH", path, body, status, headers=MERGE, **more)


def policy(text: str, status: int = 204, **more: Any) -> Step:
    return Step("PUT", "sys/policies/acl/<k>", {"policy": text}, status, **more)


def token(*policies: str, **more: Any) -> Step:
    body = {"policies": list(policies or ["<k>"]), "ttl": "1h", **more}
    kept = {"token": "auth.client_token", "accessor": "auth.accessor"}
    return Step("POST", "auth/token/create", body, keep=kept)


def by(step: Step, name: str = "<token>") -> Step:
    return dataclasses.replace(step, token=name)


DATA, META = "secret/data/<k>", "secret/metadata/<k>"
DENIED = errors("1 error occurred:\n\t* permission denied\n\n")
CAS = errors("check-and-set parameter did not match the current version")
RW = 'path "secret/data/*" { capabilities = ["create", "read", "update"] }'

ROWS: dict[str, list[Step]] = {
    # --- without or with a bad token
    "health": [Step("GET", "sys/health", token="", has={"initialized": True, "sealed": False, "standby": False})],
    "health with a code of its own": [Step("GET", "sys/health?activecode=299", status=299, token="")],
    "seal status": [Step("GET", "sys/seal-status", token="", has={"sealed": False, "type": "shamir"})],
    "init": [Step("GET", "sys/init", token="", has={"initialized": True})],
    "leader": [Step("GET", "sys/leader", token="")],
    "no token": [Step("GET", DATA, status=403, token="", has=errors("permission denied"))],
    "unknown token": [Step("GET", DATA, status=403, token="hvs.no", has=errors("invalid token"))],
    "unknown route": [Step("GET", "nowhere/<k>", status=404, has=errors("no handler for route"))],
    "bearer": [Step("GET", "auth/token/lookup-self", token="", headers={"Authorization": "Bearer <root>"})],
    "a path that is not clean": [Step("GET", "secret/data//<k>", status=307), Step("GET", "/sys/health", status=307)],
    "a path outside of the API": [Step("GET", "../ui", status=307), Step("GET", "../vault/v1/sys/health", status=307)],
    "verbs that are not known": [
        Step("OPTIONS", DATA, status=405, loose=True, ignore="/errors"),
        Step("SCAN", META, status=405),
        Step("POST", "sys/seal-status", {}, 405),
    ],
    "a write to a folder": [
        Step("POST", "secret/data/<k>/", {"data": {}}, 400, errors("cannot write to a path ending"))
    ],
    "a read of a folder": [Step("GET", "secret/data/<k>/", status=404)],
    "a version that is a word": [
        Step("GET", f"{DATA}?version=x", status=400, has=errors("Field validation failed"), loose=True)
    ],
    "malformed body": [Step("POST", DATA, b'{"data":', 500, loose=True)],
    # --- KV: read and write
    "read nothing": [Step("GET", DATA, status=404)],
    "write and read": [write(), Step("GET", DATA, has={"data.data.F": "one", "data.metadata.version": 1})],
    "PUT is POST": [Step("PUT", DATA, {"data": {"F": "x"}}, has={"data.version": 1})],
    "numbers, floats, nesting": [
        Step("POST", DATA, {"data": {"n": 7, "f": 3.0, "big": 12345678901234567890, "m": {"x": [1, None]}, "b": True}}),
        Step("GET", DATA, has={"data.data.n": 7}),
    ],
    "an older version": [write(), write(2, "two"), Step("GET", f"{DATA}?version=1", has={"data.data.F": "one"})],
    "version 0 is the current one": [write(), Step("GET", f"{DATA}?version=0", has={"data.metadata.version": 1})],
    "a version that is not there": [write(), Step("GET", f"{DATA}?version=9", status=404)],
    "no data": [Step("POST", DATA, {"F": "x"}, 400, errors("no data provided"))],
    "data is no map": [Step("POST", DATA, {"data": "text"}, 400, errors('input for field "data"'))],
    "empty data": [Step("POST", DATA, {"data": {}}), Step("GET", DATA, has={"data.data": {}})],
    "null data": [Step("POST", DATA, {"data": None}), Step("GET", DATA), patch(DATA, {"data": {"x": 1}}, 500)],
    "no such place in the mount": [Step("GET", "secret/<k>", status=404)],
    "a write to no place in the mount": [Step("POST", "secret/<k>", {"F": "x"}, 404)],
    # --- KV: check-and-set
    "cas 0 for a new key": [write(cas=0)],
    "cas 0 for a key that is there": [write(), Step("POST", DATA, {"options": {"cas": 0}, "data": {}}, 400, CAS)],
    "cas of the current version": [write(), write(2, cas=1)],
    "cas of another version": [write(), Step("POST", DATA, {"options": {"cas": 5}, "data": {}}, 400, CAS)],
    "cas as text": [write(cas="0"), write(2, cas="1")],
    "cas null is 0": [write(cas=None), Step("POST", DATA, {"options": {"cas": None}, "data": {}}, 400, CAS)],
    "cas is a word": [
        Step("POST", DATA, {"options": {"cas": "x"}, "data": {}}, 400, errors("error parsing check-and-set parameter"))
    ],
    "cas is a float": [
        Step("POST", DATA, {"options": {"cas": 3.0}, "data": {}}, 400, errors("error parsing check-and-set parameter"))
    ],
    "cas counts deleted versions": [
        write(),
        Step("DELETE", DATA, status=204),
        Step("POST", DATA, {"options": {"cas": 0}, "data": {}}, 400, CAS),
        write(2, cas=1),
    ],
    "cas counts destroyed versions": [
        write(),
        Step("PUT", "secret/destroy/<k>", {"versions": [1]}, 204),
        write(2, cas=1),
    ],
    "cas 0 for a key with metadata only": [Step("POST", META, {"max_versions": 3}, 204), write(cas=0)],
    "cas required by the key": [
        Step("POST", META, {"cas_required": True}, 204),
        Step("POST", DATA, {"data": {}}, 400, errors("check-and-set parameter required for this call")),
        write(cas=0),
    ],
    # --- KV: patch
    "patch": [
        write(),
        patch(DATA, {"options": {"cas": 1}, "data": {"F": "two", "G": None}}, has={"data.version": 2}),
        Step("GET", DATA, has={"data.data": {"F": "two"}}),
    ],
    "patch with another cas": [write(), patch(DATA, {"options": {"cas": 4}, "data": {}}, 400, has=CAS)],
    "patch of nothing": [patch(DATA, {"data": {"F": "x"}}, 404)],
    "patch of a deleted version": [write(), Step("DELETE", DATA, status=204), patch(DATA, {"data": {"F": "x"}}, 404)],
    "patch without data": [write(), patch(DATA, {"x": 1}, 400, has=errors("no data provided"))],
    "patch as plain JSON": [
        write(),
        Step("PATCH", DATA, {"data": {}}, 415, errors("merge-patch"), headers={"Content-Type": "application/json"}),
    ],
    "patch without a content type": [Step("PATCH", DATA, {"data": {}}, 400)],
    # --- KV: subkeys
    "subkeys": [
        Step("POST", DATA, {"data": {"A": "x", "M": {"N": {"O": 1}}, "E": {}}}),
        Step("GET", "secret/subkeys/<k>", has={"data.subkeys": {"A": None, "M": {"N": {"O": None}}, "E": None}}),
        Step("GET", "secret/subkeys/<k>?depth=1", has={"data.subkeys": {"A": None, "M": None, "E": None}}),
        Step("GET", "secret/subkeys/<k>?depth=2&version=1", has={"data.subkeys.M": {"N": None}}),
    ],
    "subkeys of nothing": [Step("GET", "secret/subkeys/<k>", status=404)],
    "subkeys of a deleted version": [
        write(),
        Step("DELETE", DATA, status=204),
        Step("GET", "secret/subkeys/<k>", status=404, has={"data.subkeys": None}),
    ],
    # --- KV: delete, undelete, destroy
    "delete and undelete": [
        write(),
        Step("DELETE", DATA, status=204),
        Step("GET", DATA, status=404, has={"data.data": None, "data.metadata.version": 1}),
        Step("GET", META),
        Step("POST", "secret/undelete/<k>", {"versions": [1]}, 204),
        Step("GET", DATA, has={"data.data.F": "one"}),
        Step("GET", META, has={"data.last_updated_by.operation": "undelete"}),
    ],
    "delete nothing": [Step("DELETE", DATA, status=204)],
    "delete versions": [
        write(),
        write(2),
        Step("POST", "secret/delete/<k>", {"versions": [1, 7]}, 204),
        Step("GET", f"{DATA}?version=1", status=404),
        Step("GET", DATA),
        Step("GET", META),
    ],
    "delete without versions": [Step("POST", "secret/delete/<k>", {}, 400, errors("No version number provided"))],
    "destroy": [
        write(),
        write(2),
        Step("PUT", "secret/destroy/<k>", {"versions": [1]}, 204),
        Step("GET", f"{DATA}?version=1", status=404, has={"data.metadata.destroyed": True}),
        Step("POST", "secret/undelete/<k>", {"versions": [1]}, 204),
        Step("GET", META, has={"data.current_version": 2, "data.versions.1.destroyed": True}),
    ],
    "destroy what is not there": [Step("PUT", "secret/destroy/<k>", {"versions": [1]}, 204)],
    "destroy without versions": [
        Step("PUT", "secret/destroy/<k>", {"versions": []}, 400, errors("no version number provided"))
    ],
    "versions as text": [
        write(),
        write(2),
        Step("PUT", "secret/destroy/<k>", {"versions": "1,2"}, 204),
        Step("GET", META),
    ],
    # --- KV: metadata
    "metadata of nothing": [Step("GET", META, status=404)],
    "metadata": [
        write(),
        write(2),
        Step(
            "GET", META, has={"data.current_version": 2, "data.oldest_version": 0, "data.versions.1.deleted_by": None}
        ),
    ],
    "metadata first": [
        Step("POST", META, {"custom_metadata": {"owner": "x"}}, 204),
        Step("GET", META, has={"data.current_version": 0, "data.versions": {}}),
        Step("GET", DATA, status=404),
        patch(DATA, {"data": {"F": "x"}}, 404),
    ],
    "metadata keeps what is left out": [
        Step("POST", META, {"max_versions": 4, "delete_version_after": "720h", "custom_metadata": {"a": "b"}}, 204),
        Step("POST", META, {"cas_required": True}, 204),
        Step("GET", META, has={"data.delete_version_after": "720h0m0s", "data.max_versions": 4}),
        Step("POST", META, {"custom_metadata": {"c": "d"}}, 204),
        Step("GET", META, has={"data.custom_metadata": {"c": "d"}, "data.cas_required": True}),
    ],
    "an empty metadata write makes no key": [Step("POST", META, {}, 204), Step("GET", META, status=404)],
    "metadata patch": [
        Step("POST", META, {"max_versions": 4, "custom_metadata": {"a": "b", "old": "x"}}, 204),
        patch(META, {"custom_metadata": {"old": None, "new": "y"}}, 204),
        Step("GET", META, has={"data.custom_metadata": {"a": "b", "new": "y"}, "data.max_versions": 4}),
    ],
    "metadata patch of nothing": [patch(META, {"custom_metadata": {"a": "b"}}, 404)],
    "custom metadata in data": [
        Step("POST", META, {"custom_metadata": {"a": 5, "t": True}}, 204),
        write(),
        Step("GET", DATA, has={"data.metadata.custom_metadata": {"a": "5", "t": "1"}}),
        Step("POST", META, {"custom_metadata": {}}, 204),
        Step("GET", META, has={"data.custom_metadata": None}),
    ],
    "custom metadata: too many": [
        Step("POST", META, {"custom_metadata": {f"k{n}": "v" for n in range(65)}}, 400, errors("at most 64 keys"))
    ],
    "custom metadata: long key": [
        Step("POST", META, {"custom_metadata": {"k" * 129: "v"}}, 400, errors("custom_metadata validation failed"))
    ],
    "custom metadata: long value": [
        Step("POST", META, {"custom_metadata": {"k": "ä" * 257}}, 400, errors("length of value for key"))
    ],
    "custom metadata: 512 bytes": [Step("POST", META, {"custom_metadata": {"k": "ä" * 256}}, 204)],
    "custom metadata: empty value": [
        Step("POST", META, {"custom_metadata": {"k": ""}}, 400, errors("custom_metadata validation failed"))
    ],
    "custom metadata: unprintable": [
        Step("POST", META, {"custom_metadata": {"k": "a\nb"}}, 400, errors("unprintable characters"))
    ],
    "custom metadata: nested": [
        Step("POST", META, {"custom_metadata": {"k": {"a": "b"}}}, 400, errors("validation failed"), loose=True)
    ],
    "max_versions prunes": [
        Step("POST", META, {"max_versions": 2}, 204),
        *(write(number) for number in range(1, 5)),
        Step("GET", META, has={"data.oldest_version": 3, "data.current_version": 4}),
        Step("GET", f"{DATA}?version=1", status=404),
    ],
    "ten versions are kept": [
        *(write(number) for number in range(1, 13)),
        Step("GET", META, has={"data.oldest_version": 3, "data.max_versions": 0}),
    ],
    "delete_version_after": [
        Step("POST", META, {"delete_version_after": "1h30m"}, 204),
        write(),
        Step("GET", DATA, has={"data.data.F": "one"}),
        Step("GET", META, has={"data.delete_version_after": "1h30m0s"}),
        Step("DELETE", DATA, status=204),
        Step("GET", META),
    ],
    "delete metadata": [
        write(),
        Step("DELETE", META, status=204),
        Step("GET", META, status=404),
        Step("DELETE", META, status=204),
        write(cas=0),
    ],
    "list": [
        write(),
        Step("POST", "secret/data/<k>/b", {"data": {}}),
        Step("POST", "secret/data/<k>/d/e", {"data": {}}),
        Step("LIST", META, has={"data.keys": ["b", "d/"]}),
        Step("GET", f"{META}/?list=true", has={"data.keys": ["b", "d/"]}),
        Step("GET", f"{META}?list=1", has={"data.keys": ["b", "d/"]}),
    ],
    "list nothing": [Step("LIST", META, status=404)],
    "list with a strange word": [Step("GET", f"{META}?list=yes", status=400)],
    "list of data": [write(), Step("LIST", DATA, status=404, loose=True)],
    "mount with settings of its own": [
        Step("POST", "sys/mounts/<k>", {"type": "kv", "options": {"version": "2"}}, 204),
        Step("POST", "<k>/config", {"max_versions": 3, "cas_required": True, "delete_version_after": "2h"}, 204),
        Step("GET", "<k>/config", has={"data.delete_version_after": "2h0m0s"}),
        Step("POST", "<k>/config", {"max_versions": 1}, 204),
        Step("GET", "<k>/config", has={"data.cas_required": True, "data.max_versions": 1}),
        Step("POST", "<k>/data/x", {"data": {}}, 400, errors("check-and-set parameter required")),
        Step("POST", "<k>/metadata/x", {"cas_required": False}, 200),
        Step(
            "POST", "sys/mounts/<k>", {"type": "kv", "options": {"version": "2"}}, 400, errors("path is already in use")
        ),
        Step("DELETE", "sys/mounts/<k>", status=204),
        Step("GET", "<k>/config", status=404),
    ],
    "config as it is from the start": [Step("GET", "secret/config", has={"data.delete_version_after": "0s"})],
    "who wrote, deleted and patched": [
        policy('path "secret/*" { capabilities = ["create", "update", "patch", "delete", "read"] }'),
        token(display_name="rotator x"),
        by(write()),
        by(patch(DATA, {"data": {"F": "y"}})),
        by(Step("DELETE", DATA, status=204)),
        Step(
            "GET",
            META,
            has={
                "data.versions.1.created_by.actor": "token-rotator-x",
                "data.versions.1.created_by.operation": "create",
                "data.versions.2.created_by.operation": "patch",
                "data.versions.2.deleted_by.operation": "delete",
            },
        ),
    ],
    # --- policies
    "policy": [
        policy(RW),
        Step("GET", "sys/policies/acl/<k>", has={"data.policy": RW}),
        Step("GET", "sys/policy/<k>", has={"data.rules": RW}),
        Step("DELETE", "sys/policies/acl/<k>", status=204),
        Step("GET", "sys/policies/acl/<k>", status=404),
    ],
    "policy without text": [policy("", 400, has=errors("'policy' parameter not supplied or empty"))],
    "policy with a bad capability": [
        policy('path "x" { capabilities = ["fly"] }', 400, has=errors('invalid capability "fly"'))
    ],
    "policy that is none": [policy('path "x" {', 400, has=errors("failed to parse policy"), loose=True)],
    "policy as JSON": [
        policy('{"path": {"secret/data/<k>": {"capabilities": ["read"]}}}'),
        token(),
        by(Step("GET", DATA, status=404)),
    ],
    "root's policy": [Step("PUT", "sys/policies/acl/root", {"policy": RW}, 400, errors('cannot update "root" policy'))],
    "default's end": [
        Step("DELETE", "sys/policies/acl/default", status=400, has=errors("cannot delete default policy"))
    ],
    "create without update": [
        policy('path "secret/data/*" { capabilities = ["create"] }'),
        token(),
        by(write()),
        by(Step("POST", DATA, {"data": {}}, 403, DENIED)),
        by(Step("GET", DATA, status=403, has=DENIED)),
    ],
    "update without create": [
        policy('path "secret/data/*" { capabilities = ["update"] }'),
        token(),
        by(Step("POST", DATA, {"data": {}}, 403, DENIED)),
        write(),
        by(write(2)),
    ],
    "patch has a capability of its own": [
        policy(RW),
        token(),
        by(write()),
        by(patch(DATA, {"data": {"F": "x"}}, 403, has=DENIED)),
    ],
    "the policy's change reaches tokens that are out": [
        policy(RW),
        token(),
        by(write()),
        policy('path "secret/data/*" { capabilities = ["deny"] }'),
        by(Step("GET", DATA, status=403, has=DENIED)),
        Step("DELETE", "sys/policies/acl/<k>", status=204),
        by(Step("GET", DATA, status=403, has=DENIED)),
        by(Step("GET", "auth/token/lookup-self")),
    ],
    "deny on everything does not beat a longer path": [
        policy('path "*" { capabilities = ["deny"] }\npath "secret/data/*" { capabilities = ["read"] }'),
        token(),
        write(),
        by(Step("GET", DATA)),
        by(Step("GET", META, status=403, has=DENIED)),
    ],
    "deny with a plus loses to a longer start": [
        policy('path "secret/+/<k>" { capabilities = ["deny"] }\npath "secret/data/*" { capabilities = ["read"] }'),
        token(),
        write(),
        by(Step("GET", DATA)),
    ],
    "deny on the same path wins": [
        policy(RW),
        Step("PUT", "sys/policies/acl/<k>-2", {"policy": 'path "secret/data/*" { capabilities = ["deny"] }'}, 204),
        token("<k>", "<k>-2"),
        by(Step("GET", DATA, status=403, has=DENIED)),
    ],
    "the exact path wins": [
        policy('path "secret/data/<k>" { capabilities = ["read"] } path "secret/data/*" { capabilities = ["deny"] }'),
        token(),
        write(),
        by(Step("GET", DATA)),
        by(Step("GET", f"{DATA}x", status=403)),
    ],
    "a list needs the path": [
        policy('path "secret/metadata/<k>/*" { capabilities = ["list"] }'),
        token(),
        Step("POST", "secret/data/<k>/b", {"data": {}}),
        by(Step("LIST", META)),
        by(Step("LIST", "secret/metadata/", status=403, has=DENIED)),
    ],
    "sudo": [
        policy('path "sys/audit" { capabilities = ["read"] } path "auth/token/accessors" { capabilities = ["list"] }'),
        token(),
        by(Step("GET", "sys/audit", status=403, has=DENIED)),
        by(Step("LIST", "auth/token/accessors", status=403, has=DENIED)),
        policy(
            'path "sys/audit" {capabilities = ["read", "sudo"]} path "auth/token/accessors" {capabilities = ["list", "sudo"]}'
        ),
        by(Step("GET", "sys/audit")),
        by(Step("LIST", "auth/token/accessors", ignore="/keys/")),
    ],
    "capabilities": [
        policy(
            '# comment\npath "secret/data/*" { capabilities = ["read", "create", "sudo"] } /* more */\npath "a/+/c" { policy = "read" }'
        ),
        token(),
        by(Step("POST", "sys/capabilities-self", {"paths": [DATA, "a/b/c", "a/b/c/", "b", "sys/audit"]})),
        by(Step("POST", "sys/capabilities-self", {"paths": [DATA]}, has={"capabilities": ["create", "read", "sudo"]})),
        Step("POST", "sys/capabilities-self", {"paths": [DATA]}, has={"capabilities": ["root"]}),
        Step(
            "POST", "sys/capabilities-accessor", {"accessor": "<accessor>", "paths": [DATA, "b"]}, has={"b": ["deny"]}
        ),
        Step("POST", "sys/capabilities-accessor", {"accessor": "no", "paths": ["b"]}, 400, errors("invalid accessor")),
        Step(
            "POST",
            "sys/capabilities",
            {"token": "<token>", "paths": [DATA]},
            has={f"data.{DATA}": ["create", "read", "sudo"]},
        ),
        Step("POST", "sys/capabilities", {"token": "hvs.no", "paths": [DATA]}, 400, errors("invalid token")),
        by(Step("POST", "sys/capabilities-self", {}, 400, errors("paths must be supplied"))),
    ],
    "capabilities of a list": [
        policy(
            'path "secret/metadata/<k>/*" { capabilities = ["list"] } path "secret/metadata/x" { capabilities = ["list"] }'
        ),
        token(),
        by(Step("POST", "sys/capabilities-self", {"paths": [META, f"{META}/", f"{META}/b", "secret/metadata/x/"]})),
    ],
    # --- tokens
    "the root token": [Step("GET", "auth/token/lookup-self", has={"data.policies": ["root"], "data.ttl": 0})],
    "token": [
        policy(RW),
        token(display_name="lab", meta={"a": "b"}, num_uses=5),
        by(Step("GET", "auth/token/lookup-self", has={"data.meta": {"a": "b"}, "data.path": "auth/token/create"})),
        Step("POST", "auth/token/lookup", {"token": "<token>"}),
        Step("POST", "auth/token/lookup-accessor", {"accessor": "<accessor>"}, has={"data.id": ""}),
    ],
    "token for ever": [Step("POST", "auth/token/create", {"policies": ["default"], "explicit_max_ttl": "2h"})],
    "token with a period": [
        Step(
            "POST", "auth/token/create", {"policies": ["default"], "period": "1h"}, keep={"token": "auth.client_token"}
        ),
        by(Step("GET", "auth/token/lookup-self")),
        by(Step("POST", "auth/token/renew-self", {}, has={"auth.renewable": True})),
        by(Step("GET", "auth/token/lookup-self")),
    ],
    "token of a policy that is not there": [token("<k>")],
    "token without default": [Step("POST", "auth/token/create", {"policies": ["<k>"], "no_default_policy": True})],
    "root by default": [Step("POST", "auth/token/create", {}, has={"auth.policies": ["root"]})],
    "batch token": [
        Step(
            "POST",
            "auth/token/create",
            {"type": "batch", "policies": ["default"], "ttl": "1h"},
            keep={"token": "auth.client_token"},
        ),
        by(Step("GET", "auth/token/lookup-self", has={"data.type": "batch", "data.accessor": ""})),
        Step("POST", "auth/token/revoke", {"token": "<token>"}, 400, errors("batch tokens cannot be revoked")),
    ],
    "unknown accessor": [
        Step("POST", "auth/token/lookup-accessor", {"accessor": "no"}, 400, errors("invalid accessor")),
        Step("POST", "auth/token/revoke-accessor", {"accessor": "no"}),
        Step("POST", "auth/token/lookup-accessor", {}, 400, errors("missing accessor")),
    ],
    "unknown token looked up": [
        Step("POST", "auth/token/lookup", {"token": "hvs.no"}, 403, errors("bad token")),
        Step("POST", "auth/token/revoke", {"token": "hvs.no"}, 204),
        Step("POST", "auth/token/revoke-orphan", {"token": "hvs.no"}, 400, errors("token to revoke not found")),
    ],
    "revocation takes the children": [
        policy('path "auth/token/*" { capabilities = ["create", "update"] }'),
        token(),
        by(Step("POST", "auth/token/create", {}, keep={"child": "auth.client_token"})),
        by(Step("POST", "auth/token/create-orphan", {}, keep={"orphan": "auth.client_token"})),
        by(Step("GET", "auth/token/lookup-self"), "<child>"),
        by(Step("GET", "auth/token/lookup-self", has={"data.orphan": True}), "<orphan>"),
        Step("POST", "auth/token/revoke-accessor", {"accessor": "<accessor>"}, 204),
        by(Step("GET", "auth/token/lookup-self", status=403, has=errors("invalid token"))),
        by(Step("GET", "auth/token/lookup-self", status=403, has=errors("invalid token")), "<child>"),
        by(Step("GET", "auth/token/lookup-self"), "<orphan>"),
    ],
    "revoke-orphan spares the children": [
        policy('path "auth/token/*" { capabilities = ["create", "update"] }'),
        token(),
        by(Step("POST", "auth/token/create", {}, keep={"child": "auth.client_token"})),
        Step("POST", "auth/token/revoke-orphan", {"token": "<token>"}, 204),
        by(Step("GET", "auth/token/lookup-self", has={"data.orphan": True}), "<child>"),
    ],
    "revoke-self": [
        token("default"),
        by(Step("POST", "auth/token/revoke-self", status=204)),
        by(Step("GET", "auth/token/lookup-self", status=403, has=errors("invalid token"))),
    ],
    "a token that may be used twice": [
        Step(
            "POST", "auth/token/create", {"policies": ["default"], "num_uses": 2}, keep={"token": "auth.client_token"}
        ),
        by(Step("GET", "auth/token/lookup-self", has={"data.num_uses": 1})),
        by(Step("GET", "auth/token/lookup-self")),
        by(Step("GET", "auth/token/lookup-self", status=403, has=errors("invalid token"))),
    ],
    "more than the parent has": [
        policy('path "auth/token/create" { capabilities = ["create", "update"] }'),
        token(),
        by(
            Step(
                "POST",
                "auth/token/create",
                {"policies": ["other"]},
                400,
                errors("child policies must be subset of parent"),
            )
        ),
        by(
            Step(
                "POST",
                "auth/token/create",
                {"policies": ["root"]},
                400,
                errors("child policies must be subset of parent"),
            )
        ),
        by(Step("POST", "auth/token/create", {"no_parent": True}, 400, errors("root or sudo privileges required"))),
        by(Step("POST", "auth/token/create", {"id": "x"}, 400, errors("root or sudo privileges required"))),
    ],
    "a verb that a token path does not know": [Step("DELETE", "auth/token/lookup-self", status=405)],
    # --- mounts, audit, transit
    "mounts": [
        Step(
            "GET",
            "sys/mounts",
            has={"secret/.type": "kv", "secret/.options": {"version": "2"}},
            ignore="(sys|identity|cubbyhole)/|/running_plugin_version",
        )
    ],
    "auth methods": [Step("GET", "sys/auth", has={"token/.type": "token"}, ignore="/running_plugin_version")],
    "mount of an unknown kind": [Step("POST", "sys/mounts/<k>", {"type": "nothing"}, 400, loose=True)],
    "audit": [
        Step("PUT", "sys/audit/<k>", {"type": "file", "options": {"file_path": "discard"}}, 204),
        Step(
            "PUT",
            "sys/audit/<k>",
            {"type": "file", "options": {"file_path": "discard"}},
            400,
            errors("path already in use"),
        ),
        Step("GET", "sys/audit", has={"data.<k>/.type": "file"}, loose=True),
        Step("POST", "sys/audit-hash/<k>", {"input": "x"}, has={"data.hash": "hmac-sha256:"}),
        Step("DELETE", "sys/audit/<k>", status=204),
        Step("POST", "sys/audit-hash/<k>", {"input": "x"}, 400, errors("unknown audit backend")),
    ],
    "audit without a path": [Step("PUT", "sys/audit/<k>", {"type": "file"}, 400, errors('"file_path" is required'))],
    "transit hmac": [
        Step("POST", "sys/mounts/<k>", {"type": "transit"}, 204),
        Step("GET", "<k>/keys/p", status=404),
        Step("POST", "<k>/keys/p", has={"data.name": "p"}, loose=True),
        Step("GET", "<k>/keys/p", has={"data.latest_version": 1}, loose=True),
        Step("POST", "<k>/hmac/p", {"input": "eA=="}, has={"data.hmac": "vault:v1:"}),
        Step("POST", "<k>/hmac/q", {"input": "eA=="}, 400),
        Step("DELETE", "sys/mounts/<k>", status=204),
    ],
}


@pytest.fixture(scope="module")
def double() -> Iterator[Server]:
    with vault_servers.double() as server:
        yield server


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with vault_servers.real_vault(tmp_path_factory.mktemp("vault")) as server:
        yield server


def fill(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {fill(key, names): fill(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [fill(inner, names) for inner in value]
    if isinstance(value, str):
        for name, filling in names.items():
            value = value.replace(f"<{name}>", filling)
    return value


def dig(body: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        body = body[int(part)] if isinstance(body, list) else body[part]
    return body


def run(server: Server, row: str, prefix: str = "k") -> list[tuple[Step, Reply]]:
    """The row's requests, each checked against what the table says of it."""
    names = {"k": prefix + str(sorted(ROWS).index(row)), "root": server.token}
    seen = []
    for number, step in enumerate(ROWS[row]):
        reply = server.ask(
            step.method,
            "/v1/" + fill(step.path, names),
            fill(step.body, names),
            token=fill(step.token, names),
            headers=fill(step.headers, names),
        )
        assert reply.status == step.status, f"step {number}: {reply}"
        for dotted, wanted in fill(step.has, names).items():
            found = dig(reply.body, dotted)
            assert wanted in found if isinstance(wanted, str) else wanted == found, f"step {number}: {dotted}: {reply}"
        names |= {name: dig(reply.body, dotted) for name, dotted in step.keep.items()}
        seen.append((step, reply))
    return seen


def flat(value: Any, step: Step, path: str = "") -> dict[str, Any]:
    """An answer by dotted path, without what may differ: own values become their type, times a word."""
    if isinstance(value, (dict, list)) and value:
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, inner in parts for key, leaf in flat(inner, step, f"{path}/{name}").items()}
    own = path.rpartition("/")[2] in OWN or (step.loose and isinstance(value, str))
    if isinstance(value, str) and TIME.fullmatch(value):
        value = "a time"
    return {path: type(value) if own and value != "" else value}


def differences(step: Step, double: Reply, real: Reply) -> dict[str, tuple[Any, Any]]:
    """By dotted path: what the double answered, what the real server answered."""
    ours, theirs = flat(double.body, step), flat(real.body, step)
    found = {path: (ours.get(path, "-"), theirs.get(path, "-")) for path in {*ours, *theirs}}
    return {path: pair for path, pair in found.items() if pair[0] != pair[1] and not re.search(step.ignore, path)}


@pytest.mark.parametrize("row", ROWS)
def test_double_answers_as_the_table_says(double: Server, row: str) -> None:
    run(double, row)


@pytest.mark.parametrize("row", ROWS)
def test_real_vault_answers_as_the_double(double: Server, real: Server, row: str) -> None:
    theirs = run(real, row, "again")
    ours = run(double, row, "again")
    for number, ((step, mine), (_unused, yours)) in enumerate(zip(ours, theirs, strict=True)):
        assert not differences(step, mine, yours), f"step {number}: {step.method} {step.path}"
