# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""secret_delivery: its pure plan, and one run from the lab's Vault to the application's env file over SSH."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import urllib.request
from pathlib import Path
from typing import Any

from tests.controls.vault_kv_rotation import ask, connection
from tests.foreign import EnvFile
from tests.rows import Case, Reach, Row

FIELDS = ("JWT_SECRET", "WEBHOOK_SECRET")
FILE = "/etc/app/app.env"


def options(**changed: Any) -> dict[str, Any]:
    own = {
        "engine_mount_point": "secret",
        "path": "app/backend",
        "fields": {"JWT_SECRET": "JWT_SECRET", "WEBHOOK_SECRET": "HOOK"},
        "version": None,
        "destination": "env_file",
        "env_file": FILE,
        "reload": ["/usr/bin/systemctl", "reload", "app"],
        "proof_url": "https://app.example.com/internal/secret-proof",
        "proof_patience": 10.0,
    }
    return {**own, "mark": "INC-2026-1120-001/1", **changed}


def facts(jwt: str, hook: str, consumer: str) -> dict[str, Any]:
    return {"version": 8, "fields": {"JWT_SECRET": jwt, "HOOK": hook}, "consumer": consumer}


DONE = facts("current", "current", "current")
RELOAD = ("run", f"reload of the consumer of {FILE}")

PLANS = [
    Case(
        "both", options(), facts("stale", "stale", "stale"), [("update", f"HOOK, JWT_SECRET in {FILE}"), RELOAD], DONE
    ),
    Case("one is new", options(), facts("current", "absent", "stale"), [("update", f"HOOK in {FILE}"), RELOAD], DONE),
    Case("killed before the reload", options(), facts("current", "current", "stale"), [RELOAD], DONE),
    Case("the consumer is down", options(), facts("current", "current", "unreachable"), [RELOAD], DONE),
    Case("nothing to do", options(), DONE, [], DONE),
    Case(
        "not in Vault",
        options(),
        facts("stale", "unknown", "stale"),
        raises="secret/app/backend has no readable WEBHOOK_SECRET",
    ),
    Case("no fields", options(fields={}), DONE, raises="fields must map"),
    Case("one name twice", options(fields={"A": "X", "B": "X"}), DONE, raises="fields must map"),
    Case("no name", options(fields={"A": "X=1\nY"}), DONE, raises="a name in an env file"),
    Case("a relative path", options(env_file="app.env"), DONE, raises="env_file must be a full path"),
    Case("no reload", options(reload=[]), DONE, raises="reload is empty"),
]


class Lab(Row):
    control = "secret_delivery"
    host = "app"
    reversible = False

    def params(self, lab: Any) -> dict[str, Any]:
        delivered = lab.hostvars(self.host)["firebreak_secrets_delivered"][0]
        own = {
            "path": "app/backend",
            "fields": {name: name for name in FIELDS},
            "env_file": delivered["env_file"],
            "reload": delivered["reload"],
            "proof_url": delivered["proof_url"],
        }
        return {**own, **connection(lab, self.host)}

    def prepare(self, lab: Any) -> None:
        """New values in Vault that nobody was told of."""
        data = {**self._vault(lab), **{name: secrets.token_hex(32) for name in FIELDS}}
        ask(lab, "POST", "secret/data/app/backend", {"data": data})

    def observe(self, lab: Any) -> dict[str, Any]:
        file, wanted = self._file(lab), self._vault(lab)
        values = dict(line.split("=", 1) for line in file.read_text().splitlines() if "=" in line)
        others = "".join(
            line for line in file.read_text().splitlines(keepends=True) if line.split("=")[0] not in FIELDS
        )
        return {
            "in the file": {name: values[name] == wanted[name] for name in FIELDS},
            "in use": {name: self._uses(lab, name, wanted[name]) for name in FIELDS},
            "others": hashlib.sha256(others.encode()).hexdigest(),
            "mode": file.stat().st_mode,
            "beside it": sorted(entry.name for entry in file.parent.iterdir()),
        }

    def contained(self, lab: Any, before: dict[str, Any], seen: dict[str, Any]) -> None:
        assert before["in the file"] == before["in use"] == dict.fromkeys(FIELDS, False)
        assert seen["in the file"] == seen["in use"] == dict.fromkeys(FIELDS, True)
        assert all(seen[name] == before[name] for name in ("others", "mode", "beside it"))

    def reach(self, lab: Any) -> Reach:
        return Reach()

    def foreign(self, lab: Any) -> EnvFile:
        return EnvFile(lab)

    def secrets(self, lab: Any) -> list[str]:
        return [*(str(self._vault(lab)[name]) for name in FIELDS), lab.env["VAULT_TOKEN"]]

    def _file(self, lab: Any) -> Path:
        return Path(lab.hostvars(self.host)["firebreak_secrets_delivered"][0]["env_file"])

    @staticmethod
    def _vault(lab: Any) -> dict[str, Any]:
        data: dict[str, Any] = ask(lab, "GET", "secret/data/app/backend")["data"]["data"]
        return data

    @staticmethod
    def _uses(lab: Any, name: str, value: str) -> bool:
        nonce = secrets.token_hex(16)
        with urllib.request.urlopen(f"{lab.app_direct_url}/internal/secret-proof?name={name}&nonce={nonce}") as answer:
            said = json.load(answer)["hmac"]
        return bool(said == hmac.new(value.encode(), bytes.fromhex(nonce), hashlib.sha256).hexdigest())
