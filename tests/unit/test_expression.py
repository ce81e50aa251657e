# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's rule language: what matches, what does not, what is refused, and where."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.expression import LONGEST, Expression, ExpressionError, Networks

LISTS = {"thieves": Networks([ipaddress.ip_network("198.51.100.0/24"), ipaddress.ip_network("2001:db8::/32")])}


def request(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "ip.src": ipaddress.ip_address("198.51.100.66"),
        "ip.src.country": "T1",
        "ip.src.asnum": 64496,
        "http.host": "www.example.com",
        "http.user_agent": 'curl "x"',
        "http.request.method": "GET",
        "http.request.uri.path": "/api/login",
        "ssl": False,
    }
    return {**values, **{name.replace("__", "."): value for name, value in changes.items()}}


MATCHES = [
    "ip.src in $thieves",
    "ip.src in {192.0.2.1 198.51.100.0/25}",
    "ip.src eq 198.51.100.66",
    "ip.src == 198.51.100.66",
    "ip.src ne 198.51.100.67",
    "not ip.src in {192.0.2.0/24}",
    "!(ip.src in {192.0.2.0/24})",
    'ip.src.country in {"DE" "T1"}',
    'ip.src.country eq "T1" and http.host eq "www.example.com"',
    'http.host eq "other" or ip.src in $thieves',
    'http.host eq "other" || ip.src in $thieves && ssl eq false',
    'http.request.uri.path contains "login"',
    'starts_with(http.request.uri.path, "/api/")',
    'ends_with(http.request.uri.path, "login")',
    'lower(http.request.method) eq "get"',
    'http.user_agent contains "\\"x\\""',
    'http.request.uri.path matches "^/api/.*in$"',
    'http.request.uri.path wildcard "/API/*"',
    "ip.src.asnum in {1 64496}",
    "ip.src.asnum ge 64496",
    "not ssl",
    "true",
    "true xor false",
    # `and` binds tighter than `or`, `not` tighter than both.
    "true or false and false",
    "not false and true",
]
MISSES = [
    "ip.src in {192.0.2.0/24}",
    "ip.src in {2001:db8::/32}",
    "not ip.src in $thieves",
    'ip.src.country eq "t1"',
    'http.host contains "WWW"',
    "ssl",
    "(true or false) and false",
    "true xor true",
    'starts_with(http.request.uri.path, "api")',
]


@pytest.mark.parametrize("text", MATCHES)
def test_it_matches(text: str) -> None:
    assert Expression(text).matches(request(), LISTS)


@pytest.mark.parametrize("text", MISSES)
def test_it_does_not_match(text: str) -> None:
    assert not Expression(text).matches(request(), LISTS)


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("", 0),
        ("ip.source in $thieves", 0),
        ("ip.src in", 9),
        ("ip.src in {}", 10),
        ("ip.src in {192.0.2.1/24}", 11),
        ("ip.src in {300.0.0.1}", 11),
        ('ip.src eq "192.0.2.1"', 10),
        ("http.host in $thieves", 13),
        ("http.host eq 3", 13),
        ("ip.src contains 192.0.2.1", 7),
        ("true true", 5),
        ("(true", 5),
        ("true and", 8),
        ('http.host matches "("', 18),
        ("http.host eq 'single'", 13),
        ("(" * 100 + "true" + ")" * 100, 64),
        ("ip.src in $thieves" + " " * LONGEST, LONGEST),
    ],
)
def test_it_refuses_and_says_where(text: str, position: int) -> None:
    with pytest.raises(ExpressionError) as refusal:
        Expression(text)
    assert refusal.value.position == position


def test_it_names_its_lists() -> None:
    assert Expression("ip.src in $a or (ssl and not ip.src in $b_2)").lists == {"a", "b_2"}


NETWORKS = st.one_of(
    st.builds(lambda n, p: ipaddress.ip_network((n, p), strict=False), st.integers(0, 2**32 - 1), st.integers(8, 32)),
    st.builds(
        lambda n, p: ipaddress.ip_network((n, p), strict=False), st.integers(2**32, 2**128 - 1), st.integers(12, 128)
    ),
)


@settings(deadline=None)
@given(st.lists(NETWORKS, max_size=8), NETWORKS)
def test_many_networks_know_what_each_knows(networks: list[Any], other: Any) -> None:
    known = Networks(networks)
    for address in [other[0], *(network[0] for network in networks), *(network[-1] for network in networks)]:
        assert (address in known) == any(address.version == each.version and address in each for each in networks)


@settings(deadline=None)
@given(st.text(alphabet='ip.src in${}()"and or not true=!&|/192:abcdef', max_size=60))
def test_no_text_does_more_than_be_refused(text: str) -> None:
    try:
        parsed = Expression(text)
    except ExpressionError:
        return
    assert isinstance(parsed.matches(request(), dict.fromkeys(parsed.lists, LISTS["thieves"])), bool)
