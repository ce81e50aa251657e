# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""vault_kv_rotation: its pure plan, and one run against the lab's Vault."""

from __future__ import annotations

import hashlib
import http.client
import json
import urllib.parse
from typing import Any

from tests.foreign import Secrets
from tests.rows import Case, Reach, Row

MARK = "INC-2026-1120-001/1"
URL = "https://app.example.com/api/me"
OLD = "old versions of secret/app/backend"


def options(**changed: Any) -> dict[str, Any]:
    own = {
        "state": "retired",
        "engine_mount_point": "secret",
        "path": "app/backend",
        "fields": ["JWT_SECRET"],
        "format": "urlsafe",
        "bytes": 32,
        "new_values": None,
        "proof": [{"field": "JWT_SECRET", "kind": "jwt", "url": URL}],
    }
    return {**own, "mark": MARK, "incident_id": MARK[:-2], **changed}


def facts(state: str, **changed: Any) -> dict[str, Any]:
    return {
        "state": state,
        "fields": ["JWT_SECRET"],
        "version": 7 if state in ("unrotated", "staged") else 8,
        "replaces": 7,
        "pending": {"unrotated": "absent", "retired": "destroyed"}.get(state, "stored"),
        "old_versions": "destroyed" if state == "retired" else "readable",
        "mark": MARK if state == "retired" else None,
        "conflict": None,
        **changed,
    }


STAGE = ("create", "pending JWT_SECRET of secret/app/backend")
PROMOTE = ("update", "JWT_SECRET of secret/app/backend")
PROVE = ("run", "proof that the old JWT_SECRET are refused")
FORGET = ("delete", "pending JWT_SECRET of secret/app/backend")
DESTROY = ("delete", OLD)

PLANS = [
    Case("stage", options(state="staged"), facts("unrotated"), [STAGE], facts("staged")),
    Case("stage and make current", options(state="current"), facts("unrotated"), [STAGE, PROMOTE], facts("current")),
    Case("all at once", options(), facts("unrotated"), [STAGE, PROMOTE, PROVE, FORGET, DESTROY], facts("retired")),
    Case("make current", options(state="current"), facts("staged"), [PROMOTE], facts("current")),
    Case("retire", options(), facts("current"), [PROVE, FORGET, DESTROY], facts("retired")),
    Case(
        "a sibling was written after us",
        options(),
        facts("current", version=11),
        [PROVE, FORGET, DESTROY],
        facts("retired", version=11),
    ),
    Case("killed after the proof", options(), facts("current", mark=MARK), [FORGET, DESTROY], facts("retired")),
    Case(
        "killed before the last change",
        options(),
        facts("current", mark=MARK, pending="destroyed"),
        [DESTROY],
        facts("retired"),
    ),
    Case(
        "what others destroyed needs no destroying",
        options(),
        facts("current", old_versions="destroyed"),
        [PROVE, FORGET],
        facts("retired"),
    ),
    Case("nothing to do", options(), facts("retired"), [], facts("retired")),
    Case("no way back", options(state="staged"), facts("current"), [], facts("current")),
    Case("done, and the secret is gone since", options(), facts("retired", version=0, fields=[]), [], None),
    Case(
        "conflict",
        options(),
        facts("current", conflict="version 9 was written by x"),
        raises="version 9 was written by x",
    ),
    Case(
        "no such field",
        options(fields=["OTHER"], proof=[]),
        facts("unrotated", fields=[]),
        raises="proof names no check for OTHER",
    ),
    Case(
        "no such field, staged",
        options(state="staged", fields=["JWT_SECRET", "O"]),
        facts("unrotated"),
        raises="no readable O",
    ),
    Case("no such secret", options(), facts("unrotated", version=0, fields=[]), raises="no readable JWT_SECRET"),
    Case("too short", options(bytes=16), facts("unrotated"), raises="bytes must be at least 32"),
    Case("no fields", options(fields=[]), facts("unrotated"), raises="fields is empty"),
    Case("a value for another field", options(new_values={"X": "y"}), facts("unrotated"), raises="new_values"),
    Case("an empty value", options(new_values={"JWT_SECRET": ""}), facts("unrotated"), raises="new_values"),
    Case(
        "a proof of another field",
        options(state="current", proof=[{"field": "X", "kind": "jwt", "url": URL}]),
        facts("unrotated"),
        raises="proof names a field that is not in fields",
    ),
]


def ask(lab: Any, method: str, path: str, body: Any = None) -> Any:
    """Vault, spoken to without any of our code."""
    where = urllib.parse.urlsplit(lab.env["VAULT_ADDR"])
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=10)
    try:
        headers = {"X-Vault-Token": lab.env["VAULT_TOKEN"]}
        connection.request(method, f"/v1/{path}", None if body is None else json.dumps(body), headers)
        text = connection.getresponse().read()
        return json.loads(text) if text else {}
    finally:
        connection.close()


def digests(lab: Any, path: str) -> dict[str, str]:
    data = ask(lab, "GET", f"secret/data/{path}")["data"]["data"]
    return {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in data.items()}


def connection(lab: Any, host: str) -> dict[str, Any]:
    known = lab.hostvars(host)
    return {"vault_url": known["firebreak_vault_url"], "vault_token": known["firebreak_vault_token"]}


class Lab(Row):
    control = "vault_kv_rotation"
    host = "vault"
    reversible = False

    def params(self, lab: Any) -> dict[str, Any]:
        own = {"path": "app/backend", "fields": ["JWT_SECRET", "WEBHOOK_SECRET"], "state": "current"}
        return {**own, **connection(lab, self.host)}

    def observe(self, lab: Any) -> dict[str, Any]:
        metadata = ask(lab, "GET", "secret/metadata/app/backend")["data"]
        return {
            "version": metadata["current_version"],
            "destroyed": {number: entry["destroyed"] for number, entry in metadata["versions"].items()},
            "values": digests(lab, "app/backend"),
            "others": {path: digests(lab, path) for path in ("app/frontend", "billing/gateway")},
        }

    def contained(self, lab: Any, before: dict[str, Any], seen: dict[str, Any]) -> None:
        rotated = {name for name, digest in seen["values"].items() if digest != before["values"][name]}
        assert rotated == {"JWT_SECRET", "WEBHOOK_SECRET"}
        assert seen["values"].keys() == before["values"].keys()
        assert seen["version"] == before["version"] + 1
        # The oldest version falls out of a full history, and none is destroyed.
        assert all(gone == before["destroyed"].get(version, False) for version, gone in seen["destroyed"].items())
        assert seen["others"] == before["others"]

    def reach(self, lab: Any) -> Reach:
        return Reach()

    def foreign(self, lab: Any) -> Secrets:
        return Secrets(lab)

    def secrets(self, lab: Any) -> list[str]:
        values = ask(lab, "GET", "secret/data/app/backend")["data"]["data"].values()
        return [*values, lab.env["VAULT_TOKEN"]]


class Retired(Lab):
    """The last state: the consumer has the new values, the old ones are proved refused and destroyed."""

    def params(self, lab: Any) -> dict[str, Any]:
        proof = [
            {"field": "JWT_SECRET", "kind": "jwt", "url": f"{lab.app_direct_url}/api/me", "claims": {"sub": "1"}},
            {"field": "WEBHOOK_SECRET", "kind": "webhook", "url": f"{lab.app_direct_url}/hooks/payment"},
        ]
        return {**super().params(lab), "state": "retired", "proof": proof}

    def begin(self, lab: Any, execute: Any) -> None:
        execute(self.host, self.control, super().params(lab))
        delivered = lab.hostvars("app")["firebreak_secrets_delivered"][0]
        names = ("path", "fields", "env_file", "reload", "proof_url")
        own = {name: delivered[name] for name in names}
        execute("app", "secret_delivery", {**own, **connection(lab, "app")})

    def contained(self, lab: Any, before: dict[str, Any], seen: dict[str, Any]) -> None:
        assert {**seen, "destroyed": 0} == {**before, "destroyed": 0}
        current = str(seen["version"])
        assert seen["destroyed"] == {number: number != current for number in before["destroyed"]}
        assert not before["destroyed"][current]
