# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Vault's tokens: their tree, their accessors and the calls below ``auth/token/``."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lab.doubles.vault_acl import ACL
from lab.doubles.vault_wire import DENIED, SECOND, Answer, Call, Clock, Refused, duration, go_duration, rfc3339

LONGEST = 768 * 3600
SPENT = -1  # how the server shows a token in its last use
LETTERS = string.ascii_letters + string.digits


@dataclass
class Token:
    id: str
    accessor: str
    policies: list[str]
    path: str
    created: int  # nanoseconds
    parent: str | None = None
    display_name: str = "token"
    meta: dict[str, str] | None = None
    num_uses: int = 0
    ttl: int = 0
    explicit_max_ttl: int = 0
    period: int = 0
    renewable: bool = False
    type: str = "service"
    renewed: int | None = None

    @property
    def root(self) -> bool:
        return "root" in self.policies

    @property
    def expires(self) -> int | None:
        """In nanoseconds; None for a token that lives on."""
        return (self.renewed or self.created) + self.ttl * SECOND if self.ttl else None


class Tokens:
    """The token store, mounted at ``auth/token/``."""

    type = "token"

    def __init__(self, clock: Clock, root: str, acl: Callable[[Token], ACL]) -> None:
        self.clock = clock
        self.acl = acl
        self.policy_exists: Callable[[str], bool] = lambda name: True
        self.by_id: dict[str, Token] = {}
        # A dev server makes it from the token of its init, which it then revokes.
        self._keep(Token(root, _random(24), ["root"], "auth/token/create", clock.now()))

    # --- the store

    def find(self, token_id: str) -> Token | None:
        """A living token. One whose time is over is gone with its children, as is one whose parent is."""
        token = self.by_id.get(token_id)
        if token and token.expires is not None and token.expires <= self.clock.now():
            self.revoke(token)
            return None
        return token

    def by_accessor(self, accessor: str) -> Token | None:
        found = next((token for token in self.by_id.values() if accessor and token.accessor == accessor), None)
        return self.find(found.id) if found else None

    def use(self, token: Token) -> bool:
        """Count one use; True if it was the last one, so that the token ends with this request."""
        if not token.num_uses:
            return False
        token.num_uses = token.num_uses - 1 or SPENT
        return token.num_uses == SPENT

    def revoke(self, token: Token) -> None:
        """The token and all its descendants."""
        for child in [other for other in self.by_id.values() if other.parent == token.id]:
            self.revoke(child)
        self.by_id.pop(token.id, None)

    def _keep(self, token: Token) -> Token:
        self.by_id[token.id] = token
        return token

    # --- calls

    def exists(self, path: str) -> bool | None:
        return None

    def answer(self, call: Call) -> Answer | None:
        name, _unused, rest = call.path.partition("/")
        handlers: dict[tuple[str, str], Callable[[Call], Answer | None]] = {
            ("accessors", "list"): self.accessors,
            ("lookup-accessor", "update"): self.lookup_accessor,
            ("revoke-accessor", "update"): self.revoke_accessor,
            ("lookup", "update"): self.lookup,
            ("lookup", "read"): self.lookup,
            ("lookup-self", "read"): self.lookup_self,
            ("lookup-self", "update"): self.lookup_self,
            ("revoke", "update"): self.revoke_tree,
            ("revoke-self", "update"): self.revoke_self,
            ("revoke-orphan", "update"): self.revoke_orphan,
            ("renew", "update"): self.renew,
            ("renew-self", "update"): self.renew_self,
            ("create", "update"): self.create,
            ("create-orphan", "update"): self.create,
        }
        handler = None if rest else handlers.get((name, call.operation))
        if handler:
            return handler(call)
        if not rest and any(known == name for known, _unused in handlers):
            raise Refused(405, "unsupported operation", wrapped=True)
        raise Refused(404, "unsupported path", wrapped=True)

    def accessors(self, call: Call) -> Answer:
        alive = [token for token in list(self.by_id.values()) if self.find(token.id)]
        return Answer({"keys": [token.accessor for token in alive if token.accessor]})

    def lookup(self, call: Call) -> Answer:
        return self._describe(self.find(str(call.data.get("token") or call.token.id)))

    def lookup_self(self, call: Call) -> Answer:
        return self._describe(call.token)

    def lookup_accessor(self, call: Call) -> Answer:
        token = self.by_accessor(_required(call, "accessor"))
        if not token:
            raise Refused(400, "invalid accessor", wrapped=True)
        answer = self._describe(token)
        return Answer((answer.data or {}) | {"id": ""})

    def _describe(self, token: Token | None) -> Answer:
        if not token:
            raise Refused(403, "bad token")
        data: dict[str, Any] = {
            "accessor": token.accessor,
            "creation_time": token.created // SECOND,
            "creation_ttl": token.ttl,
            "display_name": token.display_name,
            "entity_id": "",
            "expire_time": None,
            "explicit_max_ttl": token.explicit_max_ttl,
            "id": token.id,
            "meta": token.meta,
            "num_uses": token.num_uses,
            "orphan": token.parent is None,
            "path": token.path,
            "policies": token.policies,
            "ttl": 0,
            "type": token.type,
        }
        if token.period:
            data["period"] = token.period
        if token.expires is not None:
            data["expire_time"] = rfc3339(token.expires, local=True)
            data["ttl"] = (token.expires - self.clock.now()) // SECOND
        if token.path != "auth/token/root":  # what init made has no lease
            data |= {"renewable": token.renewable, "issue_time": rfc3339(token.created, local=True)}
        if token.renewed:
            data |= {"last_renewal": rfc3339(token.renewed, local=True), "last_renewal_time": token.renewed // SECOND}
        return Answer(data)

    def revoke_tree(self, call: Call) -> None:
        self._revoke(self.find(_required(call, "token", "missing token ID")))

    def revoke_self(self, call: Call) -> None:
        self._revoke(call.token)

    def revoke_accessor(self, call: Call) -> Answer | None:
        token = self.by_accessor(_required(call, "accessor"))
        if not token:
            return Answer(warnings=["No token found with this accessor"])
        self._revoke(token)
        return None

    def revoke_orphan(self, call: Call) -> None:
        token = self.find(_required(call, "token", "missing token ID"))
        if not token:
            raise Refused(400, "token to revoke not found")
        self._not_batch(token)
        for child in self.by_id.values():
            if child.parent == token.id:
                child.parent = None
        self.revoke(token)

    def _revoke(self, token: Token | None) -> None:
        if token:
            self._not_batch(token)
            self.revoke(token)

    @staticmethod
    def _not_batch(token: Token) -> None:
        if token.type == "batch":
            raise Refused(400, "batch tokens cannot be revoked")

    def renew_self(self, call: Call) -> Answer:
        return self._renew(call.token, call)

    def renew(self, call: Call) -> Answer:
        return self._renew(self.find(_required(call, "token", "missing token ID")), call)

    def _renew(self, token: Token | None, call: Call) -> Answer:
        if not token:
            raise Refused(400, "token not found")
        if token.type == "batch":
            raise Refused(400, "batch tokens cannot be renewed")
        if not token.renewable:
            raise Refused(400, "lease is not renewable")
        now = self.clock.now()
        asked = _seconds(call, "increment")
        if token.explicit_max_ttl:
            left = token.explicit_max_ttl - (now - token.created) // SECOND
            asked = min(asked or token.ttl, left)
        token.ttl, token.renewed = token.period or min(asked or token.ttl, LONGEST), now
        return Answer(auth=self._auth(token))

    # --- create

    def create(self, call: Call) -> Answer:
        parent = call.token
        if parent.type == "batch":
            raise Refused(400, "batch tokens cannot create more tokens")
        if parent.num_uses:
            raise Refused(400, "restricted use token cannot generate child tokens")
        sudo = self.acl(parent).sudo(call.full_path)
        token, warnings = self._new(call, sudo)
        if not token.ttl and parent.ttl:
            raise Refused(400, "expiring root tokens cannot create non-expiring root tokens")
        self._keep(token)
        warnings += [f'Policy "{name}" does not exist' for name in token.policies if not self.policy_exists(name)]
        return Answer(auth=self._auth(token), warnings=warnings or None)

    def _new(self, call: Call, sudo: bool) -> tuple[Token, list[str]]:
        kind = call.data.get("type") or "service"
        if kind not in ("service", "batch"):
            raise Refused(400, "invalid 'token_type' value")
        if call.data.get("id") and not sudo:
            raise Refused(400, "root or sudo privileges required to specify token id")
        token = Token(
            id=str(call.data.get("id") or ("hvs." if kind == "service" else "hvb.") + _random(90)),
            accessor=_random(24) if kind == "service" else "",
            policies=self._policies(call, sudo),
            path=call.full_path,
            created=self.clock.now(),
            parent=None if self._orphan(call, sudo) else call.token.id,
            display_name=_display_name(call.data.get("display_name")),
            meta=call.data.get("meta"),
            num_uses=int(call.data.get("num_uses") or 0),
            explicit_max_ttl=_seconds(call, "explicit_max_ttl"),
            period=_seconds(call, "period"),
            type=kind,
        )
        for name in ("num_uses", "explicit_max_ttl", "period") if kind == "batch" else ():
            if getattr(token, name):
                raise Refused(400, f'batch tokens cannot have "{name}" set')
        if token.period and not sudo:
            raise Refused(400, "root or sudo privileges required to create periodic token")
        if token.root and not call.token.root:
            raise Refused(400, "root tokens may not be created without parent token being root")
        if token.root and kind == "batch":
            raise Refused(400, "batch tokens cannot be root tokens")
        token.ttl, warnings = self._ttl(token, _seconds(call, "ttl"))
        token.renewable = bool(token.ttl) and kind == "service" and call.data.get("renewable", True) is not False
        return token, warnings

    @staticmethod
    def _ttl(token: Token, asked: int) -> tuple[int, list[str]]:
        """The seconds that the token lives, and what the server says when that is less than asked."""
        ttl = token.period or asked or (0 if token.root else LONGEST)
        longest = min(token.explicit_max_ttl or LONGEST, LONGEST)
        if token.root and not ttl:
            return token.explicit_max_ttl, []
        if ttl <= longest:
            return ttl, []
        asked_text, given_text = _short(ttl), _short(longest)
        return longest, [
            f'TTL of "{asked_text}" exceeded the effective max_ttl of "{given_text}"; TTL value is capped accordingly'
        ]

    @staticmethod
    def _orphan(call: Call, sudo: bool) -> bool:
        if call.data.get("no_parent") and not sudo:
            raise Refused(400, "root or sudo privileges required to create orphan token")
        return bool(call.data.get("no_parent")) or call.path == "create-orphan"

    @staticmethod
    def _policies(call: Call, sudo: bool) -> list[str]:
        given = call.data.get("policies") or []
        asked = given.split(",") if isinstance(given, str) else given
        policies = {str(name).strip().lower() for name in asked if str(name).strip()}
        parent = set(call.token.policies)
        add_default = sudo if policies else False
        if not policies:
            policies = set(parent)
        elif not sudo:
            if not policies <= parent:
                raise Refused(400, "child policies must be subset of parent")
            add_default = "default" in parent
        if call.data.get("no_default_policy"):
            return sorted(policies - {"default"})
        if "root" in policies:
            return ["root"]
        return sorted(policies | {"default"} if add_default else policies)

    @staticmethod
    def _auth(token: Token) -> dict[str, Any]:
        return {
            "accessor": token.accessor,
            "client_token": token.id,
            "entity_id": "",
            "lease_duration": token.ttl,
            "metadata": token.meta,
            "mfa_requirement": None,
            "num_uses": token.num_uses,
            "orphan": token.parent is None,
            "policies": token.policies,
            "renewable": token.renewable,
            "token_policies": token.policies,
            "token_type": token.type,
        }


def unknown_token() -> Refused:
    refused = Refused(403, DENIED)
    refused.errors = [f"2 errors occurred:\n\t* {DENIED}\n\t* invalid token\n\n"]
    return refused


def _required(call: Call, name: str, text: str = "") -> str:
    value = call.data.get(name)
    if not value:
        raise Refused(400, text or f"missing {name}", wrapped=not text)
    return str(value)


def _seconds(call: Call, name: str) -> int:
    try:
        seconds = duration(call.data.get(name))
    except ValueError:
        raise Refused(400, f"{name}: not a duration") from None
    if seconds < 0:
        raise Refused(400, f"{name} must be positive")
    return seconds


def _short(seconds: int) -> str:
    """A duration without its zero parts at the end."""
    return re.sub(r"(?<=[hm])0[ms]", "", re.sub(r"(?<=m)0s", "", go_duration(seconds)))


def _display_name(given: Any) -> str:
    return re.sub(r"[^a-zA-Z0-9-]", "-", f"token-{given}").rstrip("-") if given else "token"


def _random(length: int) -> str:
    return "".join(secrets.choice(LETTERS) for _unused in range(length))
