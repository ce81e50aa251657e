# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Names, times and answers: the pure parts of the revocation and of the gate."""

from __future__ import annotations

import json

import pytest

from ansible_collections.firebreak.incident.plugins.module_utils._checks import field, metric
from ansible_collections.firebreak.incident.plugins.module_utils._sessions import (
    Template,
    begun_before,
    epoch,
    iso,
    issued,
)

KEYS = [
    b"session:refresh:1:a",
    b"session:refresh:11:a",
    b"session:refresh:1:a:b",
    b"session:refresh:1:",
    b"session:refresh:1",
    b"session:refresh:::",
    b"xsession:refresh:1:a",
    b"session:refresh:\xff:a",
    b"session:refresh:1:a\n",
]


def test_a_user_is_compared_as_a_whole() -> None:
    only = Template("session:refresh:{user}:{id}", ["1"])
    assert only.pick(KEYS) == [b"session:refresh:1:a", b"session:refresh:1:a\n"]
    assert only.match == b"session:refresh:1:*"
    assert only.prefix == b"session:refresh:"


def test_all_are_the_keys_of_the_form_and_no_others() -> None:
    everybody = Template("session:refresh:{user}:{id}", None)
    assert everybody.pick(KEYS) == [KEYS[0], KEYS[1], KEYS[7], KEYS[8]]
    assert everybody.match == b"session:refresh:*:*"


def test_characters_of_a_glob_in_a_name_are_literal() -> None:
    assert Template("s[1]:{user}", ["a*?"]).match == rb"s\[1\]:a\*\?"
    assert Template("s.{user}", ["a"]).pick([b"s.a", b"sxa", b"s.a.b"]) == [b"s.a"]


@pytest.mark.parametrize(
    ("value", "moment"),
    [
        ({"iat": 1000}, 1000.0),
        ({"iat": 1000.5}, 1000.5),
        ({"iat": "1000"}, 1000.0),
        ({"iat": 1_795_143_600_000}, 1_795_143_600.0),
        ({"iat": "2026-11-20T03:00:00Z"}, 1_795_143_600.0),
        ({"iat": "2026-11-20T03:00:00"}, None),
        ({"iat": True}, None),
        ({"iat": None}, None),
        ({"iat": -1}, None),
        ({"iat": float("nan")}, None),
        ({"exp": 5, "device": {"iat": 1000}}, None),
        ([1000], None),
    ],
)
def test_when_a_session_began(value: object, moment: float | None) -> None:
    assert issued([json.dumps(value).encode()], "iat") == [moment]


def test_one_bad_value_does_not_hide_the_others() -> None:
    values = [b'{"iat":1}', b"no JSON", None, b'{"iat":3}', b'{"iat":4},{"iat":5}', b""]
    assert issued(values, "iat") == [1.0, None, None, 3.0, None, None]
    # Two halves that make one document together are still two values.
    assert issued([b'{"a":[1', b'2],"iat":7}'], "iat") == [None, None]
    assert issued([b'{"iat":1},{"iat":2', b'"x":1}'], "iat") == [None, None]


def test_the_cut_is_strict_and_what_does_not_tell_is_old() -> None:
    keys = [b"a", b"b", b"c", b"d"]
    values = [b'{"iat":9}', b'{"iat":10}', b'{"iat":11}', b"{}"]
    assert begun_before(keys, values, "iat", 10) == [b"a", b"d"]


def test_a_time_survives_being_written() -> None:
    assert iso(epoch("issued_before", "1795143600")) == "2026-11-20T03:00:00Z"
    assert epoch("issued_before", iso(1795143600.25)) == 1795143600.25
    for number in range(500):  # a clock tells more digits than ISO 8601 holds
        moment = epoch("issued_before", repr(1795143600.1234567 + number * 0.0137))
        assert epoch("issued_before", iso(moment)) == moment


def test_a_metric_is_summed_over_its_labels_and_no_comment_counts() -> None:
    text = b'# HELP hits all\n# TYPE hits counter\nhits{path="/a b"} 2\nhits{path="/"} 3 1795143600\nhits_created 9\n'
    assert metric(text, "hits") == 5
    assert metric(b"# hits 7\n", "hits") is None
    assert metric(b"hits x\n", "hits") is None


def test_a_field_of_a_body() -> None:
    body = b'{"data": {"token": "t", "list": [1]}}'
    assert field(body, "data.token") == "t"
    assert field(body, "data.none") is None
    assert field(body, "data.token.more") is None
    assert field(b"<html>", "data") is None
