# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Vault's policies: their text, and which of their paths decides for a request.

The most specific path wins and only then does ``deny``: a ``deny`` on ``*`` does not stop what a longer path of another
policy allows. What this double does not evaluate, it refuses when the policy is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

CAPABILITIES = frozenset(
    ("create", "read", "update", "delete", "list", "sudo", "deny", "patch", "subscribe", "recover")
)
OLD_WORDS = {
    "deny": ["deny"],
    "read": ["read", "list"],
    "write": ["create", "read", "update", "delete", "list"],
    "sudo": ["create", "read", "update", "delete", "list", "sudo"],
}

# What every token may do to itself, as far as the double has the paths.
DEFAULT_POLICY = """
path "auth/token/lookup-self" { capabilities = ["read"] }
path "auth/token/renew-self" { capabilities = ["update"] }
path "auth/token/revoke-self" { capabilities = ["update"] }
path "sys/capabilities-self" { capabilities = ["update"] }
path "sys/leases/renew" { capabilities = ["update"] }
path "sys/leases/lookup" { capabilities = ["update"] }
path "cubbyhole/*" { capabilities = ["create", "read", "update", "delete", "list"] }
path "sys/wrapping/wrap" { capabilities = ["update"] }
path "sys/wrapping/lookup" { capabilities = ["update"] }
path "sys/wrapping/unwrap" { capabilities = ["update"] }
"""

TOKEN = re.compile(
    r"""(?P<skip>\s+|\#[^\n]*|//[^\n]*|/\*.*?\*/)
      | (?P<string>"(?:[^"\\]|\\.)*")
      | (?P<word>[A-Za-z_][\w.-]*)
      | (?P<number>-?\d+(?:\.\d+)?)
      | (?P<mark>[{}\[\]=:,])""",
    re.VERBOSE | re.DOTALL,
)


class BadPolicy(Exception):
    """The text is no policy, or one that the double cannot evaluate."""


Rules = dict[str, frozenset[str]]


def parse(text: str) -> Rules:
    """The capabilities that a policy's text gives, by path as written."""
    rules: Rules = {}
    for path, body in _paths(text):
        path = path.removeprefix("/")
        if "+*" in path:
            raise BadPolicy(f"path \"{path}\": invalid use of wildcards ('+*' is forbidden)")
        rules[path] = merge(rules.get(path), _capabilities(path, body))
    return {path: given for path, given in rules.items() if "{{" not in path}  # nobody here has an identity


def _capabilities(path: str, body: dict[str, Any]) -> frozenset[str]:
    if left := set(body) - {"capabilities", "policy", "comment"}:
        raise BadPolicy(f'path "{path}": invalid key or not evaluated by the double: {", ".join(sorted(left))}')
    given = list(body.get("capabilities", []))
    if "policy" in body:
        if body["policy"] not in OLD_WORDS:
            raise BadPolicy(f'path "{path}": invalid policy "{body["policy"]}"')
        given += OLD_WORDS[body["policy"]]
    for word in given:
        if word not in CAPABILITIES:
            raise BadPolicy(f'path "{path}": invalid capability "{word}"')
    return frozenset(["deny"]) if "deny" in given else frozenset(given)


def merge(one: frozenset[str] | None, other: frozenset[str]) -> frozenset[str]:
    """Two policies that name the very same path: their sum, unless one of them denies."""
    if one is None:
        return other
    return frozenset(["deny"]) if "deny" in one | other else one | other


def _paths(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if text.lstrip().startswith("{"):
        try:
            yield from json.loads(text).get("path", {}).items()
        except (ValueError, AttributeError):
            raise BadPolicy("not JSON, although it begins like it") from None
        return
    reader = _Reader(text)
    while reader.left():
        kind, word = reader.next()
        if word != "path":
            raise BadPolicy(f'invalid key "{word}"')
        kind, path = reader.next()
        if kind != "string":
            raise BadPolicy("a path must be a string")
        yield path, reader.block()


class _Reader:
    """As much of HCL as policies are written in."""

    def __init__(self, text: str) -> None:
        self.tokens = list(self._split(text))
        self.at = 0

    @staticmethod
    def _split(text: str) -> Iterator[tuple[str, str]]:
        at = 0
        while at < len(text):
            found = TOKEN.match(text, at)
            if not found:
                raise BadPolicy(f"illegal character at {at}")
            at = found.end()
            kind = str(found.lastgroup)
            if kind == "string":
                yield kind, json.loads(found.group())
            elif kind != "skip":
                yield kind, found.group()

    def left(self) -> bool:
        return self.at < len(self.tokens)

    def next(self) -> tuple[str, str]:
        if not self.left():
            raise BadPolicy("unexpected end")
        self.at += 1
        return self.tokens[self.at - 1]

    def block(self) -> dict[str, Any]:
        if self.next() != ("mark", "{"):
            raise BadPolicy('"{" expected')
        body: dict[str, Any] = {}
        while (token := self.next()) != ("mark", "}"):
            if token == ("mark", ","):
                continue
            if self.next()[1] not in ("=", ":"):
                raise BadPolicy(f'"=" expected after "{token[1]}"')
            body[token[1]] = self._value()
        return body

    def _value(self) -> Any:
        kind, word = self.next()
        if (kind, word) == ("mark", "["):
            values = []
            while (token := self.next()) != ("mark", "]"):
                if token != ("mark", ","):
                    values.append(token[1])
            return values
        if (kind, word) == ("mark", "{"):
            self.at -= 1
            return self.block()
        if kind == "mark":
            raise BadPolicy(f'unexpected "{word}"')
        return word


class ACL:
    """The policies of one token, all together."""

    def __init__(self, policies: Iterable[Rules], root: bool = False) -> None:
        self.root = root
        self.rules: Rules = {}
        for rules in policies:
            for path, given in rules.items():
                self.rules[path] = merge(self.rules.get(path), given)

    def capabilities(self, path: str) -> list[str]:
        """What ``sys/capabilities`` answers: a LIST's fallback to the path without its slash is part of it."""
        if self.root:
            return ["root"]
        given = self._deciding(path, "list")
        return ["deny"] if not given or "deny" in given else sorted(given)

    def allows(self, operation: str, path: str) -> bool:
        return self.root or operation in self._deciding(path, operation)

    def sudo(self, path: str, operation: str = "update") -> bool:
        return self.root or "sudo" in self._deciding(path, operation)

    def _deciding(self, path: str, operation: str) -> frozenset[str]:
        bare = path.removesuffix("/")
        if path in self.rules:
            return self.rules[path]
        if operation == "list":
            if bare in self.rules:
                return self.rules[bare]
            if bare != path and (found := self._best(bare)) is not None:
                return found
        return self._best(path) or frozenset()

    def _best(self, path: str) -> frozenset[str] | None:
        found = [(rank, given) for pattern, given in self.rules.items() if (rank := _rank(pattern, path))]
        return max(found, key=lambda pair: pair[0])[1] if found else None


def _rank(pattern: str, path: str) -> tuple[int, bool, int, int, str] | None:
    """How specifically a pattern with ``+`` or a last ``*`` matches; None if it does not. The greatest decides."""
    glob = pattern.endswith("*")
    stem = pattern[:-1] if glob else pattern
    parts, wanted = path.split("/"), stem.split("/")
    plus = wanted.count("+")
    if not plus:
        return (len(stem), False, 0, len(stem), stem) if glob and path.startswith(stem) else None
    if len(parts) < len(wanted) or (not glob and len(parts) != len(wanted)):
        return None
    for number, (want, part) in enumerate(zip(wanted, parts, strict=False)):
        last = glob and number == len(wanted) - 1
        if want not in ("+", part) and not (last and part.startswith(want)):
            return None
    return pattern.index("+"), not glob, -plus, len(stem), stem
