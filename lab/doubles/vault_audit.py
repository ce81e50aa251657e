# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Vault's audit devices: one JSON line for each request and one for its answer, every string of the payload HMACed."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from dataclasses import dataclass
from typing import Any

from lab.doubles.vault_wire import Call, Refused, client_id

IN_CLEAR = ("correlation-id", "x-correlation-id", "user-agent")  # headers that the log holds by default


@dataclass
class Device:
    """A device that is disabled and enabled again has a new key."""

    type: str
    options: dict[str, str]
    description: str
    key: bytes

    def hash(self, value: str) -> str:
        return "hmac-sha256:" + hmac.new(self.key, value.encode(), hashlib.sha256).hexdigest()

    def hashed(self, value: Any) -> Any:
        """Numbers stay in plain."""
        if isinstance(value, dict):
            return {name: self.hashed(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self.hashed(inner) for inner in value]
        return self.hash(value) if isinstance(value, str) else value

    def request(self, time: str, call: Call) -> dict[str, Any]:
        return {"time": time, "type": "request", "auth": self._auth(call), "request": self._request(call)}

    def response(self, time: str, call: Call, body: dict[str, Any] | None, error: Refused | None) -> dict[str, Any]:
        entry = self.request(time, call) | {"type": "response"}
        entry["response"] = {"data": self.hashed((body or {}).get("data"))}
        return entry | {"error": " ".join(error.errors)} if error else entry

    def _auth(self, call: Call) -> dict[str, Any]:
        return {
            "accessor": self.hash(call.token.accessor),
            "client_token": self.hash(call.token.id),
            "display_name": call.token.display_name,
            "policies": call.token.policies,
            "token_policies": call.token.policies,
            "token_type": call.token.type,
        }

    def _request(self, call: Call) -> dict[str, Any]:
        return {
            "id": call.id,
            "client_id": client_id(call.token.policies),
            "operation": call.operation,
            "client_token": self.hash(call.token.id),
            "client_token_accessor": self.hash(call.token.accessor),
            "namespace": {"id": "root"},
            "path": call.full_path,
            "data": self.hashed(call.data),
            "remote_address": call.remote,
            "headers": {name: call.headers[name] for name in IN_CLEAR if name in call.headers},
        }

    def write(self, entry: dict[str, Any]) -> None:
        path = self.options["file_path"]
        line = json.dumps(entry).encode() + b"\n"
        if path == "stdout":
            os.write(1, line)
        elif path != "discard":
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, int(self.options.get("mode", "0600"), 8))
            try:
                os.write(handle, line)
            finally:
                os.close(handle)
