# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""As much of Vault's transit engine as a proof without revealing needs: keys and their HMAC."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from typing import Any

from lab.doubles.vault_wire import SECOND, Answer, Call, Clock, Refused


class Transit:
    """One mount; a key has one version."""

    type = "transit"

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.keys: dict[str, tuple[bytes, int]] = {}

    def exists(self, path: str) -> bool | None:
        return None

    def answer(self, call: Call) -> Answer | None:
        area, _unused, name = call.path.partition("/")
        if area == "keys" and not name and call.operation == "list":
            return Answer({"keys": sorted(self.keys)})
        if area == "keys" and name and "/" not in name and call.operation in ("read", "update"):
            if call.operation == "update":
                self.keys.setdefault(name, (secrets.token_bytes(32), self.clock.now() // SECOND))
            return self._describe(name) if name in self.keys else None
        if area == "hmac" and name and call.operation == "update":
            return self._hmac(call, name.partition("/")[0])
        raise Refused(404, "unsupported path", wrapped=True)

    def _describe(self, name: str) -> Answer:
        described: dict[str, Any] = {
            "allow_plaintext_backup": False,
            "auto_rotate_period": 0,
            "deletion_allowed": False,
            "derived": False,
            "exportable": False,
            "imported_key": False,
            "keys": {"1": self.keys[name][1]},
            "latest_version": 1,
            "min_available_version": 0,
            "min_decryption_version": 1,
            "min_encryption_version": 0,
            "name": name,
            "supports_decryption": True,
            "supports_derivation": True,
            "supports_encryption": True,
            "supports_signing": False,
            "type": "aes256-gcm96",
        }
        return Answer(described)

    def _hmac(self, call: Call, name: str) -> Answer:
        if name not in self.keys:
            raise Refused(400, "encryption key not found")
        try:
            value = base64.b64decode(str(call.data.get("input", "")), validate=True)
        except binascii.Error:
            raise Refused(400, "unable to decode input as base64") from None
        made = hmac.new(self.keys[name][0], value, hashlib.sha256).digest()
        return Answer({"hmac": "vault:v1:" + base64.b64encode(made).decode()})
