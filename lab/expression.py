# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The subset of Cloudflare's rule language that the lab's rules use: parse, check, evaluate.

    expression = Expression('ip.src in $thieves and not starts_with(http.request.uri.path, "/health")')
    expression.matches(request, lists)

A request is a mapping of field names to values (``ip.src`` an ``ipaddress`` object, ``ssl`` a boolean, texts else); lists
map a name to something that answers ``address in list``.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, NamedTuple

LONGEST = 4096
DEEPEST = 64
FIELDS: dict[str, str] = {
    "ip.src": "address",
    "ip.src.country": "text",
    "ip.src.continent": "text",
    "ip.src.asnum": "number",
    "ip.geoip.country": "text",
    "http.host": "text",
    "http.referer": "text",
    "http.cookie": "text",
    "http.user_agent": "text",
    "http.request.full_uri": "text",
    "http.request.method": "text",
    "http.request.uri": "text",
    "http.request.uri.path": "text",
    "http.request.uri.query": "text",
    "ssl": "boolean",
}
TOKEN = re.compile(
    r"""\s*(?:
      (?P<text>"(?:\\.|[^"\\])*")
    | (?P<list>\$[a-z0-9_.]+)
    | (?P<address>\d+\.\d+\.\d+\.\d+(?:/\d+)?|[0-9a-fA-F]*:[0-9a-fA-F:.]*(?:/\d+)?)
    | (?P<number>\d+)
    | (?P<word>[a-z][a-z0-9_]*(?:\.[a-z0-9_]+)*)
    | (?P<sign>&&|\|\||\^\^|==|!=|<=|>=|[<>!~(){},])
    )""",
    re.VERBOSE,
)
SAME = {"==": "eq", "!=": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge", "~": "matches"}
LOGICAL = {"&&": "and", "||": "or", "^^": "xor", "!": "not"}
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda left, right: left == right,
    "ne": lambda left, right: left != right,
    "lt": lambda left, right: left < right,
    "le": lambda left, right: left <= right,
    "gt": lambda left, right: left > right,
    "ge": lambda left, right: left >= right,
    "contains": lambda left, right: right in left,
    "matches": lambda left, right: re.search(right, left) is not None,
    "wildcard": lambda left, right: _wildcard(right).fullmatch(left) is not None,
}
TEXT_TESTS: dict[str, Callable[[str, str], bool]] = {"starts_with": str.startswith, "ends_with": str.endswith}
TEXT_CHANGES: dict[str, Callable[[str], str]] = {"lower": str.lower, "upper": str.upper}

Request = Mapping[str, Any]
Lists = Mapping[str, Container[Any]]
Test = Callable[[Request, Lists], bool]


class ExpressionError(ValueError):
    """The expression is not in the language; ``position`` counts characters from 0."""

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(reason)
        self.position = position


class Token(NamedTuple):
    kind: str
    value: str
    position: int


class Value(NamedTuple):
    kind: str
    get: Callable[[Request], Any]


class Networks:
    """Many networks with a look-up that does not depend on their number."""

    def __init__(self, networks: Iterator[Any] | list[Any]) -> None:
        self._by_length: dict[tuple[int, int], set[int]] = {}
        for network in networks:
            key = (network.version, network.max_prefixlen - network.prefixlen)
            self._by_length.setdefault(key, set()).add(int(network.network_address) >> key[1])

    def __contains__(self, address: object) -> bool:
        number, version = int(address), address.version  # type: ignore[call-overload,attr-defined]
        return any(
            family == version and number >> bits in networks for (family, bits), networks in self._by_length.items()
        )


class Expression:
    """One parsed expression; ``lists`` names the lists that it refers to."""

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise ExpressionError(f"the expression is longer than {LONGEST} characters", LONGEST)
        parser = _Parser(text)
        self.text = text
        self._test = parser.whole()
        self.lists = frozenset(parser.lists)

    def matches(self, request: Request, lists: Lists) -> bool:
        return self._test(request, lists)


def _wildcard(pattern: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(part) for part in pattern.split("*")), re.IGNORECASE | re.DOTALL)


def _tokens(text: str) -> list[Token]:
    found, position = [], 0
    end = len(text.rstrip())
    while position < end:
        match = TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            raise ExpressionError("unrecognised input", end - len(text[position:end].lstrip()))
        kind = match.lastgroup
        value = match.group(kind)
        start = match.start(kind)
        if kind == "sign" and value in LOGICAL:
            kind, value = "word", LOGICAL[value]
        elif kind == "sign" and value in SAME:
            kind, value = "word", SAME[value]
        found.append(Token(kind, value, start))
        position = match.end()
    return [*found, Token("end", "", len(text))]


class _Parser:
    """Recursive descent, in the order of binding: or, xor, and, not, comparison."""

    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._next = 0
        self._depth = 0
        self.lists: set[str] = set()

    def whole(self) -> Test:
        test = self._or()
        if self._peek().kind != "end":
            raise self._error("expected the end of the expression")
        return test

    def _peek(self) -> Token:
        return self._tokens[self._next]

    def _take(self) -> Token:
        token = self._tokens[self._next]
        self._next += token.kind != "end"
        return token

    def _accept(self, value: str) -> bool:
        token = self._peek()
        if token.kind in ("word", "sign") and token.value == value:
            self._take()
            return True
        return False

    def _expect(self, value: str) -> None:
        if not self._accept(value):
            raise self._error(f"expected {value}")

    def _error(self, reason: str, token: Token | None = None) -> ExpressionError:
        return ExpressionError(reason, (token or self._peek()).position)

    def _or(self) -> Test:
        left = self._xor()
        while self._accept("or"):
            left = _either(left, self._xor())
        return left

    def _xor(self) -> Test:
        left = self._and()
        while self._accept("xor"):
            left = _differ(left, self._and())
        return left

    def _and(self) -> Test:
        left = self._not()
        while self._accept("and"):
            left = _both(left, self._not())
        return left

    def _not(self) -> Test:
        self._depth += 1
        if self._depth > DEEPEST:
            raise self._error("the expression is nested too deeply")
        if self._accept("not"):
            test = _opposite(self._not())
        elif self._accept("("):
            test = self._or()
            self._expect(")")
        else:
            test = self._comparison()
        self._depth -= 1
        return test

    def _comparison(self) -> Test:
        token = self._peek()
        if token.kind == "word" and token.value in ("true", "false"):
            self._take()
            return _constant(token.value == "true")
        if token.kind == "word" and token.value in TEXT_TESTS:
            return self._text_test()
        value = self._value()
        if value.kind == "boolean" and self._peek().value not in COMPARE:
            return lambda request, _lists: bool(value.get(request))
        operator = self._take()
        if operator.value == "in":
            return self._membership(value)
        if operator.value not in COMPARE or operator.kind != "word":
            raise self._error("expected a comparison", operator)
        return self._compare(value, operator)

    def _compare(self, value: Value, operator: Token) -> Test:
        textual = operator.value in ("contains", "matches", "wildcard")
        if textual and value.kind != "text":
            raise self._error(f"{operator.value} needs a text on its left", operator)
        token = self._peek()
        right, compare = self._literal(value.kind), COMPARE[operator.value]
        if operator.value == "matches":
            self._check_pattern(right, token)
        return lambda request, _lists: compare(value.get(request), right)

    def _check_pattern(self, pattern: str, token: Token) -> None:
        try:
            re.compile(pattern)
        except re.error:
            raise self._error("the pattern is not a regular expression", token) from None

    def _membership(self, value: Value) -> Test:
        token = self._take()
        if token.kind == "list":
            if value.kind != "address":
                raise self._error("only an address can be in a list", token)
            name = token.value[1:]
            self.lists.add(name)
            return lambda request, lists: value.get(request) in lists[name]
        if token.value != "{":
            raise self._error("expected a set or a list", token)
        members: list[Any] = []
        while not self._accept("}"):
            members.append(self._member(value.kind))
        if not members:
            raise self._error("a set has at least one member", token)
        known: Container[Any] = Networks(members) if value.kind == "address" else frozenset(members)
        return lambda request, _lists: value.get(request) in known

    def _member(self, kind: str) -> Any:
        if kind != "address":
            return self._literal(kind)
        return self._network(self._take())

    def _network(self, token: Token) -> Any:
        try:
            if token.kind == "address":
                return ipaddress.ip_network(token.value)
        except ValueError:
            pass
        raise self._error("expected an address or a network without host bits", token)

    def _literal(self, kind: str) -> Any:
        token = self._take()
        if kind == "text" and token.kind == "text":
            return re.sub(r"\\(.)", r"\1", token.value[1:-1])
        if kind == "number" and token.kind == "number":
            return int(token.value)
        if kind == "boolean" and token.value in ("true", "false"):
            return token.value == "true"
        if kind == "address" and token.kind == "address" and "/" not in token.value:
            return self._network(token).network_address
        raise self._error(f"expected a value of type {kind}", token)

    def _text_test(self) -> Test:
        test = TEXT_TESTS[self._take().value]
        self._expect("(")
        value = self._value()
        if value.kind != "text":
            raise self._error("expected a text")
        self._expect(",")
        right = self._literal("text")
        self._expect(")")
        return lambda request, _lists: test(value.get(request), right)

    def _value(self) -> Value:
        token = self._take()
        if token.kind == "word" and token.value in TEXT_CHANGES:
            change = TEXT_CHANGES[token.value]
            self._expect("(")
            inner = self._value()
            self._expect(")")
            return Value("text", lambda request: change(inner.get(request)))
        if token.kind != "word" or token.value not in FIELDS:
            raise self._error("unknown identifier", token)
        name = token.value
        return Value(FIELDS[name], lambda request: request[name])


def _constant(value: bool) -> Test:
    return lambda _request, _lists: value


def _opposite(test: Test) -> Test:
    return lambda request, lists: not test(request, lists)


def _both(left: Test, right: Test) -> Test:
    return lambda request, lists: left(request, lists) and right(request, lists)


def _either(left: Test, right: Test) -> Test:
    return lambda request, lists: left(request, lists) or right(request, lists)


def _differ(left: Test, right: Test) -> Test:
    return lambda request, lists: left(request, lists) != right(request, lists)
