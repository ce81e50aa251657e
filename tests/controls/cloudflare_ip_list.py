# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The list of addresses at the edge: its plans, and a run against the lab's edge."""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.parse
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from ansible_collections.firebreak.incident.plugins.module_utils import _cloudflare
from tests.foreign import Edge
from tests.rows import Case, Reach, Row, Spoil, State

INCIDENT = "INC-2026-1120-001"
MARK = f"{INCIDENT}/1"
CONNECTION = ("cloudflare_url", "cloudflare_token", "cloudflare_account_id", "cloudflare_zone_id")


def connection(lab: Any) -> dict[str, Any]:
    variables = lab.hostvars("cf")
    return {name: variables[f"firebreak_{name}"] for name in CONNECTION}


def control_path(lab: Any, method: str, path: str, body: Any = None) -> Any:
    """A path of the double beside the API."""
    place = urllib.parse.urlsplit(lab.env["LAB_CLOUDFLARE_URL"]).netloc
    double = http.client.HTTPConnection(place, timeout=10)
    double.request(method, f"/lab/{path}", None if body is None else json.dumps(body))
    answer = double.getresponse()
    content = answer.read()
    double.close()
    assert answer.status == 200, content
    return json.loads(content)


def api(lab: Any, method: str, path: str, body: Any = None) -> Any:
    """A request of anybody else's to the API."""
    where = urllib.parse.urlsplit(lab.env["LAB_CLOUDFLARE_URL"])
    known = {"A": "cloudflare_account_id", "Z": "cloudflare_zone_id"}
    for letter, name in known.items():
        path = path.replace("{" + letter + "}", connection(lab)[name])
    edge = http.client.HTTPConnection(where.netloc, timeout=10)
    headers = {"Authorization": f"Bearer {lab.env['LAB_CLOUDFLARE_TOKEN']}"}
    edge.request(method, f"{where.path}/{path}", None if body is None else json.dumps(body), headers)
    answer = edge.getresponse()
    content = answer.read()
    edge.close()
    assert answer.status in (200, 204), content
    return json.loads(content)["result"] if content else None


def make_list(lab: Any, name: str, description: str, items: list[dict[str, str]]) -> str:
    """A list of somebody else's, with its entries."""
    made = api(lab, "POST", "accounts/{A}/rules/lists", {"name": name, "kind": "ip", "description": description})
    list_id = str(made["id"])
    if items:
        add_items(lab, list_id, items)
    return list_id


def add_items(lab: Any, list_id: str, items: list[dict[str, str]]) -> None:
    finish(lab, api(lab, "POST", f"accounts/{{A}}/rules/lists/{list_id}/items", items))


def delete_items(lab: Any, list_id: str, ids: list[str]) -> None:
    body = {"items": [{"id": one} for one in ids]}
    finish(lab, api(lab, "DELETE", f"accounts/{{A}}/rules/lists/{list_id}/items", body))


def finish(lab: Any, operation: dict[str, Any]) -> None:
    where = f"accounts/{{A}}/rules/lists/bulk_operations/{operation['operation_id']}"
    lab.until(lambda: api(lab, "GET", where)["status"] == "completed", "the operation does not end")


def find_list(dump: dict[str, Any], name: str) -> dict[str, Any] | None:
    found: list[dict[str, Any]] = [each for each in dump["lists"] if each["name"] == name]
    return found[0] if found else None


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


NAME = "attackers_of_the_row"
# As the service keeps them: of others, and to be listed, each holding or lying in another.
VALUES = ("198.51.100.66", "198.51.100.0/24", "198.18.7.7", "2001:db8:bad::/48", "2001:db8:bad::1", "192.0.2.128/25")
# The same as somebody may write them, and what cannot be listed: how it is written, and what is said of it.
SPELLINGS = {
    **{value: value for value in VALUES},
    "198.51.100.66/32": "198.51.100.66",
    "::ffff:198.18.7.7": "198.18.7.7",
    "2001:DB8:BAD:0::/48": "2001:db8:bad::/48",
    " 198.18.7.7": "198.18.7.7",
}
REFUSED = {
    "example.com": "is no address or network in CIDR form",
    "198.51.100.66/24": "is an address with the length of a network",
    "203.0.113.7": "protected: 203.0.113.7/32 covers 203.0.113.0/24",
    "198.0.0.0/8": "breadth: this needs break glass for wide_block",
    "2001::/20": "breadth: this needs break glass for wide_block",
    "::/0": "breadth",
}


class Lab(Row):
    control = "cloudflare_ip_list"
    host = "cf"
    touches = ("edge",)
    usual = {"scanners": 60}

    def params(self, lab: Any) -> dict[str, Any]:
        items = ["198.51.100.66", "2001:DB8:bad::/48", "198.18.0.1", *(f"198.18.{n}.0/24" for n in range(100, 130))]
        return {"name": NAME, "items": items, **connection(lab)}

    def states(self) -> st.SearchStrategy[State]:
        comments = st.sampled_from([None, "", "ticket 7", "INC-2020-0101-001/1", "INC-2020-0101-001: x", "INC", "a/b"])
        listed = st.dictionaries(st.sampled_from([*VALUES, "203.0.113.9"]), comments)
        ours = {
            "description": st.sampled_from(["", "of the office", "INC-2020-0101-001", "INC-2020-0101-001: x"]),
            "entries": listed,
            # Around what fits on one page, two, and more.
            "more": st.sampled_from([0, 0, 0, 499, 500, 501, 1003]),
        }
        usual = st.lists(st.sampled_from(sorted(SPELLINGS)), max_size=6)
        odd = st.lists(st.sampled_from(sorted([*SPELLINGS, *REFUSED])), max_size=3)
        options = st.fixed_dictionaries(
            {"items": st.one_of(usual, usual, usual, odd)}, optional={"description": st.sampled_from(["", "x: y", "ü"])}
        )
        return st.fixed_dictionaries({"options": options}, optional={"list": st.fixed_dictionaries(ours)})

    def bring(self, lab: Any, state: State) -> None:
        control_path(lab, "POST", f"reset?rules=40&entries={state.get('scanners', 3)}")
        make_list(lab, "attackers", "", [{"ip": "198.51.100.66", "comment": "x"}])
        if "list" in state:
            entries = [{"ip": ip, "comment": comment} for ip, comment in state["list"]["entries"].items()]
            entries = [{key: value for key, value in one.items() if value is not None} for one in entries]
            entries += [{"ip": f"100.64.{n >> 8}.{n & 255}"} for n in range(state["list"]["more"])]
            make_list(lab, NAME, state["list"]["description"], entries)

    def observe(self, lab: Any) -> dict[str, Any]:
        return {
            "edge": control_path(lab, "GET", "dump"),
            "thief": visit(lab, "127.66.0.66"),
            "user": visit(lab, "127.0.2.7"),
        }

    def contained(self, lab: Any, before: dict[str, Any], seen: dict[str, Any]) -> None:
        mine = [each for each in seen["edge"]["lists"] if each not in before["edge"]["lists"]]
        assert [each["name"] for each in mine] == [NAME]
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

    def refusal(self, lab: Any, state: State) -> str | None:
        asked = [item for item in self.asked(lab, state)["items"] if item in REFUSED]
        unreadable = [item for item in asked if not REFUSED[item].startswith(("protected", "breadth"))]
        listed = state.get("list", {}).get("entries", {})
        wanted = {SPELLINGS.get(item, item) for item in self.asked(lab, state)["items"]}
        if unreadable or not asked or ("list" in state and wanted <= listed.keys()):
            return REFUSED[unreadable[0]] if unreadable else None
        # What is protected is said first; a block that covers everything is both.
        kept = [item for item in asked if item in ("203.0.113.7", "::/0")]
        return "covers 203.0.113.0/24, which is protected" if kept else REFUSED[asked[0]]

    def effect(self, lab: Any, state: State, before: dict[str, Any], seen: dict[str, Any]) -> None:
        before, seen = before["edge"], seen["edge"]
        asked = self.asked(lab, state)
        mine, found = find_list(seen, NAME), find_list(before, NAME)
        assert mine is not None
        entries, mine["items"] = mine["items"], []
        listed = found["items"] if found else []
        assert entries[: len(listed)] == listed
        new = entries[len(listed) :]
        marks = {item["comment"] for item in new}
        assert len(marks) <= 1 and all(mark.startswith("INC-") and mark.endswith("/1") for mark in marks)
        wanted = {SPELLINGS.get(item, item.lower()) for item in asked["items"]}
        assert sorted(item["ip"] for item in new) == sorted(wanted - {item["ip"] for item in listed})
        if found:
            found["items"], found["num_items"] = [], mine["num_items"]
        else:
            incident, _colon, told = mine["description"].partition(": ")
            assert incident.startswith("INC-") and told == asked.get("description", "")
            seen["lists"].remove(mine)
        assert seen == before

    def spoils(self, lab: Any) -> dict[str, Spoil]:
        def mine() -> dict[str, Any]:
            return find_list(control_path(lab, "GET", "dump"), NAME) or {"id": "", "items": []}

        def entry() -> list[str | None]:
            return [item.get("comment") for item in mine()["items"] if item["ip"] == "198.51.100.66"]

        def commented() -> None:
            add_items(lab, mine()["id"], [{"ip": "198.51.100.66", "comment": "ticket 7"}])

        def marked() -> None:
            incident = mine()["description"]
            add_items(lab, mine()["id"], [{"ip": "198.51.100.66", "comment": f"{incident}/1 seen by x"}])

        def unlisted() -> None:
            delete_items(lab, mine()["id"], [item["id"] for item in mine()["items"] if item["ip"] == "198.51.100.66"])

        return {
            "taken over": Spoil(commented, lambda: entry() == ["ticket 7"], theirs=True),
            "commented": Spoil(marked, lambda: [str(one)[-9:] for one in entry()] == ["seen by x"]),
            "unlisted": Spoil(unlisted, lambda: entry() == [], conflict=False),
        }

    @contextlib.contextmanager
    def half(self, lab: Any) -> Iterator[None]:
        """The second part of the entries is not taken."""
        batch, _cloudflare.BATCH = _cloudflare.BATCH, 20
        fault = {"kind": "500", "on": "writes", "nth": 2, "times": 9, "path": "/items$"}
        control_path(lab, "POST", "faults", [fault])
        try:
            yield
        finally:
            control_path(lab, "DELETE", "faults")
            _cloudflare.BATCH = batch
