# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Vault's core: who asks, may they, which mount answers, and what the audit devices write.

An engine is an object with ``type``, ``exists(path)`` and ``answer(call)``; ``ENGINES`` is where another one joins.
"""

from __future__ import annotations

import re
import secrets
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from lab.doubles.vault_acl import ACL, DEFAULT_POLICY, BadPolicy, Rules, parse
from lab.doubles.vault_audit import Device
from lab.doubles.vault_kv import KeyValue
from lab.doubles.vault_sys import System
from lab.doubles.vault_token import Token, Tokens, unknown_token
from lab.doubles.vault_transit import Transit
from lab.doubles.vault_wire import DENIED, Answer, Call, Clock, Refused, rfc3339

# Paths that ask for `sudo` beside their capability.
SUDO = re.compile(
    r"auth/token/(revoke-orphan|accessors/)$"
    r"|sys/(auth/.|audit$|audit/|raw|rotate$|seal$|step-down$|config/auditing/|plugins/catalog/"
    r"|leases$|leases/(revoke-prefix|revoke-force|lookup)/)"
)
OPEN = re.compile(r"sys/(health|seal-status|leader|init)$")
# These repeat the keys of `data` at the top of their answer.
REPEATED = re.compile(
    r"sys/(audit|auth|mounts|policy|policy/.*|capabilities|capabilities-self|capabilities-accessor|audit-hash/.*)$"
)


class Engine(Protocol):
    type: str

    def exists(self, path: str) -> bool | None: ...

    def answer(self, call: Call) -> Answer | None: ...


@dataclass
class Mount:
    engine: Engine
    type: str
    accessor: str
    options: dict[str, str] | None = None
    description: str = ""
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))


class Core:
    """The whole server but its sockets. One lock: requests are answered one at a time."""

    def __init__(self, root_token: str) -> None:
        self.lock = threading.Lock()
        self.clock = Clock()
        self.policies: dict[str, tuple[str, Rules]] = {"default": (DEFAULT_POLICY, parse(DEFAULT_POLICY))}
        self.audit: dict[str, Device] = {}
        self.cluster = str(uuid.uuid4())
        self.tokens = Tokens(self.clock, root_token, self.acl)
        self.tokens.policy_exists = lambda name: name == "root" or name in self.policies
        self.engines: dict[str, Callable[[], Engine]] = {
            "kv": lambda: KeyValue(self.clock),
            "transit": lambda: Transit(self.clock),
        }
        self.mounts: dict[str, Mount] = {
            "sys/": self._mount(System(self), "system"),
            "auth/token/": self._mount(self.tokens, "token", description="token based credentials"),
            "secret/": self._mount(KeyValue(self.clock), "kv", {"version": "2"}, "key/value secret storage"),
        }

    @staticmethod
    def _mount(engine: Engine, kind: str, options: dict[str, str] | None = None, description: str = "") -> Mount:
        return Mount(engine, kind, f"{kind}_{secrets.token_hex(4)}", options, description)

    def enable(self, path: str, kind: str, options: dict[str, str] | None, description: str) -> None:
        if kind not in self.engines:
            raise Refused(400, f"plugin not found in the catalog: {kind}")
        if kind == "kv" and (options or {}).get("version") != "2":
            raise Refused(400, "the double has version 2 of the key-value engine only")
        if any(path.startswith(mounted) or mounted.startswith(path) for mounted in self.mounts):
            raise Refused(400, f"path is already in use at {path}")
        self.mounts[path] = self._mount(self.engines[kind](), kind, options, description)

    def set_policy(self, name: str, text: str) -> None:
        try:
            self.policies[name] = (text, parse(text))
        except BadPolicy as problem:
            raise Refused(400, f"failed to parse policy: {problem}") from None

    def acl(self, token: Token) -> ACL:
        return ACL((self.policies[name][1] for name in token.policies if name in self.policies), root=token.root)

    # --- one request

    def handle(
        self, operation: str, path: str, data: dict[str, Any], token_id: str, headers: dict[str, list[str]], remote: str
    ) -> tuple[int, dict[str, Any] | None]:
        """Status and body. Only what answers under the lock has happened."""
        request_id = str(uuid.uuid4())
        if OPEN.match(path):
            if operation not in ("read", "header"):
                return 405, {"errors": []}
            return System.open(self, path, data)
        with self.lock:
            token = None
            try:
                token = self._authenticate(token_id)
                last = self.tokens.use(token)
                call = self._authorize(Call(request_id, operation, path, path, data, token, headers, remote))
                self._audit("request", call)
                status, body = self._dispatch(call)
                self._audit("response", call, body)
                if last:
                    self.tokens.revoke(token)
            except Refused as refused:
                status, body = refused.status, {"errors": refused.errors}
                call = Call(request_id, operation, path, path, data, token or NOBODY, headers, remote)
                self._audit("response", call, error=refused)
        return status, body

    def _authenticate(self, token_id: str) -> Token:
        if not token_id:
            raise Refused(403, DENIED)
        token = self.tokens.find(token_id)
        if not token:
            raise unknown_token()
        return token

    def _route(self, path: str) -> tuple[str, Mount] | None:
        found = [mounted for mounted in self.mounts if path.startswith(mounted)]
        return (best := max(found, key=len), self.mounts[best]) if found else None

    def _authorize(self, call: Call) -> Call:
        acl = self.acl(call.token)
        routed = self._route(call.path)
        asked = call.operation
        if routed and asked == "update" and routed[1].engine.exists(call.path.removeprefix(routed[0])) is False:
            call.operation = asked = "create"
        if not acl.allows(asked, call.path) or (SUDO.match(call.path) and not acl.sudo(call.path, asked)):
            raise Refused(403, DENIED, wrapped=True)
        if asked in ("update", "create", "patch") and call.path.endswith("/"):
            raise Refused(400, "cannot write to a path ending in '/'")
        if "x-vault-wrap-ttl" in call.headers:
            raise Refused(400, "the double does not wrap answers yet")
        return call

    def _dispatch(self, call: Call) -> tuple[int, dict[str, Any] | None]:
        routed = self._route(call.path)
        if not routed:
            raise Refused(404, f'no handler for route "{call.path}". route entry not found.')
        prefix, mount = routed
        call.path = call.path.removeprefix(prefix)
        answer = mount.engine.answer(call)
        if answer is None:
            if call.operation in ("read", "list"):
                raise Refused(404)
            return 204, None
        if answer.empty:
            return answer.status, None
        if call.operation == "list" and not (answer.data or {}).get("keys") and answer.status == 200:
            raise Refused(404)
        body = {
            "request_id": call.id,
            "lease_id": "",
            "renewable": False,
            "lease_duration": 0,
            "data": answer.data,
            "wrap_info": None,
            "warnings": answer.warnings,
            "auth": answer.auth,
            "mount_type": mount.type if answer.status == 200 else "",
        }
        return answer.status, {**(answer.data or {}), **body} if REPEATED.match(call.full_path) else body

    def _audit(self, kind: str, call: Call, body: dict[str, Any] | None = None, error: Refused | None = None) -> None:
        for device in self.audit.values():
            time = rfc3339(self.clock.now())
            device.write(device.request(time, call) if kind == "request" else device.response(time, call, body, error))


NOBODY = Token("", "", [], "", 0, display_name="")
