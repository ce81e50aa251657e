# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The list of addresses at the edge: its plans, and a run against the lab's edge."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from typing import Any

from tests.foreign import Edge
from tests.rows import Case, Reach, Row

INCIDENT = "INC-2026-1120-001"
MARK = f"{INCIDENT}/1"
CONNECTION = ("cloudflare_url", "cloudflare_token", "cloudflare_account_id", "cloudflare_zone_id")


def connection(lab: Any) -> dict[str, Any]:
    variables = lab.hostvars("cf")
    return {name: variables[f"firebreak_{name}"] for name in CONNECTION}


def control_path(lab: Any, method: str, path: str) -> Any:
    """A path of the double beside the API."""
    place = urllib.parse.urlsplit(lab.env["LAB_CLOUDFLARE_URL"]).netloc
    double = http.client.HTTPConnection(place, timeout=10)
    double.request(method, f"/lab/{path}")
    answer = double.getresponse()
    content = answer.read()
    double.close()
    assert answer.status == 200, content
    return json.loads(content)


def visit(lab: Any, source: str, path: str = "/health") -> int:
    """The status that a visitor from this address of the loopback network gets from the application."""
    place = urllib.parse.urlsplit(lab.app_url).netloc
    visitor = http.client.HTTPConnection(place, timeout=10, source_address=(source, 0))
    visitor.request("GET", path)
    status = visitor.getresponse().status
    visitor.close()
    return status


def _params(*items: str, **own: Any) -> dict[str, Any]:
    given = {"name": "attackers", "items": list(items), "state": "present", "description": ""}
    return {**given, "incident_id": INCIDENT, "round": 1, "mark": MARK, **own}


def _facts(*ours: str, others: tuple[str, ...] = (), made: bool = True, foreign: bool = False) -> dict[str, Any]:
    return {
        "list": {"kind": "ip", "ours": made, "others": foreign or bool(others)},
        "entries": dict.fromkeys(ours, MARK),
        "listed_by_others": list(others),
        "estimate": {"entries": len(ours) + len(others)},
    }


ABSENT: dict[str, Any] = {"list": None, "entries": {}, "listed_by_others": [], "estimate": {"entries": 0}}
CREATE = ("create", "list attackers")
DELETE = ("delete", "list attackers")
NEW_LIST = {"kind": "ip", "ours": True, "others": False}

PLANS = [
    Case(
        "no list yet",
        _params("192.0.2.1", "198.51.100.0/24"),
        ABSENT,
        [CREATE, ("create", "2 entries of list attackers")],
        {"list": NEW_LIST, "entries": {"192.0.2.1": MARK, "198.51.100.0/24": MARK}, "listed_by_others": []},
    ),
    Case("a list, and nothing to put in", _params(), ABSENT, [CREATE], {**ABSENT, "list": NEW_LIST, "estimate": None}),
    Case("all there", _params("192.0.2.1"), _facts("192.0.2.1")),
    Case(
        "one is missing",
        _params("192.0.2.1", "192.0.2.2"),
        _facts("192.0.2.1"),
        [("create", "1 entries of list attackers")],
    ),
    Case("somebody else listed it", _params("192.0.2.1"), _facts(others=("192.0.2.1",))),
    Case(
        "somebody else listed one of them",
        _params("192.0.2.1", "192.0.2.2"),
        _facts(others=("192.0.2.1",), made=False),
        [("create", "1 entries of list attackers")],
        {
            "list": {"kind": "ip", "ours": False, "others": True},
            "entries": {"192.0.2.2": MARK},
            "listed_by_others": ["192.0.2.1"],
        },
    ),
    Case(
        "the same value, written otherwise",
        _params("192.0.2.1/32", "2001:DB8:0::/32"),
        _facts("192.0.2.1", "2001:db8::/32"),
    ),
    Case(
        "an address with a network's length",
        _params("198.51.100.66/24"),
        _facts(),
        raises="write 198.51.100.0/24 for the network, or 198.51.100.66 for the one address",
    ),
    Case("IPv4 written as IPv6", _params("::ffff:192.0.2.1"), _facts("192.0.2.1")),
    Case("twice the same", _params("192.0.2.1", "192.0.2.1/32"), _facts(), [("create", "1 entries of list attackers")]),
    Case("in a second round", _params("192.0.2.1", round=2, mark=f"{INCIDENT}/2"), _facts("192.0.2.1")),
    Case("no address", _params("192.0.2.1", "300.0.2.1"), _facts(), raises="items: number 2, 300.0.2.1, is no address"),
    Case("a name", _params("example.com"), _facts(), raises="items: number 1"),
    Case("an empty item", _params(""), _facts(), raises="items: number 1"),
    Case("two in one item", _params("192.0.2.1,192.0.2.2"), _facts(), raises="items: number 1"),
    Case("a prefix that is too long", _params("192.0.2.0/33"), _facts(), raises="items: number 1"),
    Case("a name that no list can have", _params(name="Attackers!"), ABSENT, raises="name: a list's name"),
    Case(
        "a list of hosts",
        _params(),
        {**_facts(), "list": {**NEW_LIST, "kind": "hostname"}},
        raises="holds no addresses",
    ),
    Case(
        "undo of entries",
        _params("192.0.2.1", state="absent"),
        _facts("192.0.2.1"),
        [("delete", "1 entries of list attackers")],
        {"list": NEW_LIST, "entries": {}, "listed_by_others": []},
    ),
    Case("undo of entries that are gone", _params("192.0.2.1", state="absent"), _facts()),
    Case("never of somebody else", _params("192.0.2.1", state="absent"), _facts(others=("192.0.2.1",))),
    Case("undo of the list", _params(items=None, state="absent"), _facts(), [DELETE], {**ABSENT, "estimate": None}),
    Case(
        "all of the incident",
        _params(items=None, state="absent"),
        _facts("192.0.2.1", "192.0.2.2"),
        [("delete", "2 entries of list attackers"), DELETE],
    ),
    Case("a list with entries of others", _params(items=None, state="absent"), _facts(foreign=True)),
    Case("a list of somebody else", _params(items=None, state="absent"), _facts(made=False)),
    Case("undo without a list", _params(items=None, state="absent"), ABSENT),
]
for _case in PLANS:
    (_case.after or {}).pop("estimate", None)


class Lab(Row):
    control = "cloudflare_ip_list"
    host = "cf"

    def params(self, lab: Any) -> dict[str, Any]:
        items = ["198.51.100.66", "2001:DB8:bad::/48", "198.18.0.1", *(f"198.18.{n}.0/24" for n in range(100, 130))]
        return {"name": "attackers_of_the_row", "items": items, **connection(lab)}

    def prepare(self, lab: Any) -> None:
        control_path(lab, "POST", "reset?rules=40&entries=60")

    def observe(self, lab: Any) -> dict[str, Any]:
        return {
            "edge": control_path(lab, "GET", "dump"),
            "thief": visit(lab, "127.66.0.66"),
            "user": visit(lab, "127.0.2.7"),
        }

    def contained(self, lab: Any, before: dict[str, Any], seen: dict[str, Any]) -> None:
        mine = [each for each in seen["edge"]["lists"] if each not in before["edge"]["lists"]]
        assert [each["name"] for each in mine] == ["attackers_of_the_row"]
        assert {item["comment"].split("/")[0] for item in mine[0]["items"]} == {mine[0]["description"]}
        values = sorted(item["ip"] for item in mine[0]["items"])
        assert len(values) == len(set(values)) == 33
        assert {"198.51.100.66", "2001:db8:bad::/48", "198.18.0.1"} < set(values)
        assert [each for each in seen["edge"]["lists"] if each not in mine] == before["edge"]["lists"]
        assert seen["edge"]["rulesets"] == before["edge"]["rulesets"]
        # A list alone keeps nobody out.
        assert (seen["thief"], seen["user"]) == (before["thief"], before["user"])

    def reach(self, lab: Any) -> Reach:
        spellings = (
            "198.51.100.66",
            "198.51.100.0/24",
            "::ffff:198.51.100.66",
            "64:ff9b::c633:6442",
            "2002:c633:6442::/48",
        )
        inside = ("198.18.100.77", "2001:db8:bad:7::1", "::/0", "2002:c612:6400::1")
        covers = tuple(({"addresses": ["192.0.2.0/24", each]}, {}) for each in (*spellings, *inside))
        return Reach(covers, {"wide_block": {"items": ["198.16.0.0/13"]}})

    def blocking(self, addresses: list[str], countries: list[str]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        return _params(*addresses), ABSENT

    def foreign(self, lab: Any) -> Edge:
        return Edge(lab, shared="attackers_of_the_row")

    def secrets(self, lab: Any) -> list[str]:
        return [lab.hostvars("cf")["firebreak_cloudflare_token"]]
