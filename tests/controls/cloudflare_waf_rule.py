# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rule at the edge: its plans, and a run against the lab's edge."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.controls.cloudflare_ip_list import api, connection, control_path, make_list, visit
from tests.foreign import Edge
from tests.rows import Case, Reach, Row, Spoil, State

INCIDENT = "INC-2026-1120-001"
NAME = f"rule firebreak_{INCIDENT}_attackers"
DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("ip_lists", "countries", "hosts", "paths", "except_ip_lists", "expression", "description")),
    "action": "block",
    "position": "first",
    "enabled": True,
    "state": "present",
}


def _params(**own: Any) -> dict[str, Any]:
    return {**DEFAULTS, "name": "attackers", "incident_id": INCIDENT, "round": 1, "mark": f"{INCIDENT}/1", **own}


def _rule(expression: str = "ip.src in $attackers", **own: Any) -> dict[str, Any]:
    return {"expression": expression, "action": "block", "enabled": True, "description": INCIDENT, **own}


def _facts(rule: dict[str, Any] | None = None, ours: bool = False, others: bool = True) -> dict[str, Any]:
    return {"ruleset": {"ours": ours, "others": others}, "rule": rule, "estimate": {"rules": 40}}


def _after(rule: dict[str, Any] | None, ours: bool = False, others: bool = True) -> dict[str, Any]:
    return {"ruleset": {"ours": ours, "others": others}, "rule": rule}


def _written(name: str, text: str, **own: Any) -> Case:
    return Case(name, _params(**own), _facts(), [("create", NAME)], _after(_rule(text)))


NOTHING: dict[str, Any] = {"ruleset": None, "rule": None, "estimate": {"rules": 0}}
LIST = {"ip_lists": ["attackers"]}

PLANS = [
    _written("a list", "ip.src in $attackers", **LIST),
    _written("two lists", "(ip.src in $a or ip.src in $b)", ip_lists=["a", "b"]),
    _written("countries", 'ip.src.country in {"T1" "KP"}', countries=["T1", "KP"]),
    _written("a list or a country", '(ip.src in $a or ip.src.country in {"T1"})', ip_lists=["a"], countries=["T1"]),
    _written("a path", 'ip.src in $a and starts_with(http.request.uri.path, "/api/")', ip_lists=["a"], paths=["/api/"]),
    _written(
        "two paths",
        '(starts_with(http.request.uri.path, "/a") or starts_with(http.request.uri.path, "/b"))',
        paths=["/a", "/b"],
    ),
    _written(
        "a host, but for its responders",
        'http.host in {"app.example.com"} and not ip.src in $office',
        hosts=["app.example.com"],
        except_ip_lists=["office"],
    ),
    _written("an expression", 'http.user_agent contains "x"', expression=' http.user_agent contains "x" '),
    Case(
        "no rules in the zone yet",
        _params(**LIST),
        NOTHING,
        [("create", NAME)],
        _after(_rule(), ours=True, others=False),
    ),
    Case("in force", _params(**LIST), _facts(_rule()), [], _after(_rule())),
    Case("in force since an earlier round", _params(**LIST, round=2, mark=f"{INCIDENT}/2"), _facts(_rule())),
    Case("wanted at another place", _params(**LIST, position="last"), _facts(_rule())),
    Case("escalated", _params(**LIST), _facts(_rule(action="js_challenge")), [("update", NAME)], _after(_rule())),
    Case("disabled by hand", _params(**LIST), _facts(_rule(enabled=False)), [("update", NAME)], _after(_rule())),
    Case("wider", _params(ip_lists=["a"]), _facts(_rule()), [("update", NAME)], _after(_rule("ip.src in $a"))),
    Case("described", _params(**LIST, description="x"), _facts(), [("create", NAME)], _after(_rule(description="x"))),
    Case("undo", _params(state="absent"), _facts(_rule()), [("delete", NAME)], _after(None)),
    Case("undo twice", _params(state="absent"), _facts(), [], _after(None)),
    Case("undo without rules", _params(state="absent"), NOTHING, [], {"ruleset": None, "rule": None}),
    Case(
        "undo in a ruleset of our own",
        _params(state="absent"),
        _facts(_rule(), ours=True, others=False),
        [("delete", NAME), ("delete", "empty ruleset of the incident")],
        {"ruleset": None, "rule": None},
    ),
    Case(
        "undo that was cut off",
        _params(state="absent"),
        _facts(None, ours=True, others=False),
        [("delete", "empty ruleset of the incident")],
        {"ruleset": None, "rule": None},
    ),
    Case(
        "undo in a ruleset of our own with rules of others",
        _params(state="absent"),
        _facts(_rule(), ours=True),
        [("delete", NAME)],
        _after(None, ours=True),
    ),
    Case("an empty ruleset of others stays", _params(state="absent"), _facts(None, others=False)),
    Case("nothing to match", _params(), _facts(), raises="expression: say what the rule matches"),
    Case("blank", _params(expression="  "), _facts(), raises="expression: say what"),
    Case("too long", _params(expression="x" * 4097), _facts(), raises="at most 4096"),
    Case("a name that is none", _params(name="A B", **LIST), _facts(), raises="name:"),
    Case("a list that is none", _params(ip_lists=["ok", "a b"]), _facts(), raises="ip_lists: number 2"),
    Case("a country that is none", _params(countries=["Germany"]), _facts(), raises="countries: number 1"),
    Case("a path that ends the text", _params(paths=['/" or true or "']), _facts(), raises="paths: number 1"),
    Case("a path that escapes", _params(paths=["/\\"]), _facts(), raises="paths: number 1"),
    Case("a host that ends the set", _params(hosts=['x"}']), _facts(), raises="hosts: number 1"),
]


PHASE = "http_request_firewall_custom"
# Rules of others, the last ones with names almost as ours.
FOREIGN: list[dict[str, Any]] = [
    {"action": "skip", "action_parameters": {"ruleset": "current"}, "expression": "ip.src in $office", "ref": "a"},
    {"action": "block", "expression": 'http.request.uri.path eq "/x"', "enabled": False, "description": "ünï"},
    {"action": "log", "expression": 'ip.geoip.country eq "T1"'},
    {"action": "block", "expression": 'http.host eq "a"', "ref": "firebreak_INC-2020-0101-001_row"},
    {"action": "block", "expression": 'http.host eq "b"', "ref": "firebreak_INC-2020-0101-001", "description": "INC"},
]
MATCHES: list[dict[str, Any]] = [
    {"expression": "ip.src in {198.51.100.64/26}"},
    {"expression": 'ip.src in {2001:db8:bad::/48 198.18.0.1} and http.request.uri.path contains "\\"q\\""'},
    {"ip_lists": ["attackers"]},
    {"ip_lists": ["attackers"], "except_ip_lists": ["office"], "paths": ["/api/", "/x"]},
    {"countries": ["KP", "T1"], "hosts": ["app.example.com"]},
    {"paths": ["/old"]},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"expression": "ip.src in {198.51.100.64/26"}, "the expression is wrong at line 1"),
    ({"expression": "ip.src in {203.0.113.0/25}"}, "which is protected"),
    ({"hosts": ["app.example.com"]}, "breadth: this needs break glass for every_visitor"),
    ({"ip_lists": ["Not A List"]}, "ip_lists: number 1"),
    ({"expression": "  "}, "expression: say what the rule matches"),
    ({}, "expression: say what the rule matches"),
]


class Lab(Row):
    control = "cloudflare_waf_rule"
    host = "cf"
    touches = ("edge",)
    usual = {"seeded": 40}

    def params(self, lab: Any) -> dict[str, Any]:
        expression = 'ip.src in {198.51.100.64/26} and starts_with(http.request.uri.path, "/")'
        return {"name": "row", "expression": expression, "action": "block", **connection(lab)}

    def states(self) -> st.SearchStrategy[State]:
        matches = st.sampled_from([*MATCHES, *MATCHES, *(match for match, _said in REFUSED)])
        others = st.fixed_dictionaries(
            {},
            optional={
                "action": st.sampled_from(["block", "managed_challenge", "js_challenge", "log"]),
                "position": st.sampled_from(["first", "last"]),
                "enabled": st.booleans(),
                "description": st.sampled_from(["", "why: ü", "INC-2020-0101-001"]),
            },
        )
        ruleset = {
            "description": st.sampled_from(["", "of the office", "INC-2020-0101-001"]),
            "rules": st.lists(st.sampled_from(range(len(FOREIGN))), unique=True),
        }
        return st.fixed_dictionaries(
            {"match": matches, "others": others},
            optional={
                "ruleset": st.fixed_dictionaries(ruleset),
                "limits": st.booleans(),  # rules of another phase
                "plan": st.just("free"),
            },
        )

    def bring(self, lab: Any, state: State) -> None:
        control_path(lab, "POST", f"reset?rules={state.get('seeded', -1)}&entries=3")
        control_path(lab, "POST", "settings", {"plan": "enterprise"})
        make_list(lab, "attackers", "", [{"ip": "198.51.100.66", "comment": "x"}])
        if "seeded" in state:
            return
        make_list(lab, "office", "", [{"ip": "203.0.113.0/24"}])
        if "ruleset" in state:
            given = {**state["ruleset"], "rules": [FOREIGN[number] for number in state["ruleset"]["rules"]]}
            api(lab, "PUT", f"zones/{{Z}}/rulesets/phases/{PHASE}/entrypoint", given)
        if state.get("limits"):
            rules = [{"action": "block", "expression": 'http.host eq "slow"'}]
            api(lab, "PUT", "zones/{Z}/rulesets/phases/http_ratelimit/entrypoint", {"rules": rules})
        control_path(lab, "POST", "settings", {"plan": state.get("plan", "enterprise")})

    def asked(self, lab: Any, state: State) -> dict[str, Any]:
        if "seeded" in state:
            return self.params(lab)
        return {"name": "row", **state["match"], **state["others"], **connection(lab)}

    def observe(self, lab: Any) -> dict[str, Any]:
        visitors = {"thief": "127.66.0.66", "neighbour": "127.66.0.5", "user": "127.0.2.7", "responder": "127.0.113.9"}
        statuses = {name: visit(lab, source) for name, source in visitors.items()}
        return {"edge": control_path(lab, "GET", "dump"), "statuses": statuses}

    def contained(self, lab: Any, before: dict[str, Any], seen: dict[str, Any]) -> None:
        assert before["statuses"] == dict.fromkeys(before["statuses"], 200)
        assert seen["statuses"] == {**before["statuses"], "thief": 403}
        (old,), (new,) = before["edge"]["rulesets"], seen["edge"]["rulesets"]
        assert new["rules"][1:] == old["rules"]
        assert new["rules"][0]["ref"].startswith("firebreak_INC-")
        assert new["rules"][0]["ref"].endswith("_row")
        assert {**new, "rules": 0} == {**old, "rules": 0}
        assert seen["edge"]["lists"] == before["edge"]["lists"]

    def reach(self, lab: Any) -> Reach:
        country = {"expression": None, "countries": ["T1", "DE"]}
        written = {"expression": 'ip.geoip.country in {"T1" "DE"}'}
        spelled = {"expression": "ip.src eq ::ffff:198.51.100.66"}
        covers = (
            ({"addresses": ["198.51.100.65"]}, {}),
            ({"addresses": ["198.51.100.66"]}, spelled),
            ({"countries": ["de"]}, country),
            ({"countries": ["DE"]}, written),
        )
        return Reach(covers, {"every_visitor": {"expression": 'lower(ip.src.country) eq "xx"'}})

    def blocking(self, addresses: list[str], countries: list[str]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        tests = [f"ip.src in {{{' '.join(each.strip() for each in addresses)}}}"] if addresses else []
        tests += (
            [f"ip.src.country in {{{' '.join(f'{chr(34)}{each}{chr(34)}' for each in countries)}}}"]
            if countries
            else []
        )
        return _params(expression=" and ".join(tests) or "ip.src in {192.0.2.1}"), NOTHING

    def foreign(self, lab: Any) -> Edge:
        return Edge(lab)

    def secrets(self, lab: Any) -> list[str]:
        return [lab.hostvars("cf")["firebreak_cloudflare_token"]]

    def refusal(self, lab: Any, state: State) -> str | None:
        asked = self.asked(lab, state)
        harmless = asked.get("action") == "log" or asked.get("enabled") is False
        said = next((words for match, words in REFUSED if match == state.get("match")), None)
        if said and not (harmless and ("protected" in said or "breadth" in said)):
            return said
        if state.get("plan") == "free" and asked.get("action") == "log":
            return "add the rule" if "ruleset" in state else "create the custom rules"
        full = state.get("plan") == "free" and len(state.get("ruleset", {}).get("rules", ())) >= 5
        return "add the rule" if full else None

    def effect(self, lab: Any, state: State, before: dict[str, Any], seen: dict[str, Any]) -> None:
        before, seen, asked = before["edge"], seen["edge"], self.asked(lab, state)
        (mine,) = (each for each in seen["rulesets"] if each["phase"] == PHASE)
        place = 0 if asked.get("position", "first") == "first" else -1
        rule = mine["rules"].pop(place)
        assert rule["ref"].startswith("firebreak_INC-") and rule["ref"].endswith("_row")
        assert (rule["action"], rule["enabled"]) == (asked.get("action", "block"), asked.get("enabled", True))
        incident = rule["ref"].removeprefix("firebreak_").removesuffix("_row")
        assert rule["description"] == asked.get("description", incident)
        if "expression" in asked:
            assert rule["expression"] == asked["expression"].strip()
        if not [each for each in before["rulesets"] if each["phase"] == PHASE]:
            assert (mine["description"], mine["rules"]) == (incident, [])
            seen["rulesets"].remove(mine)
        assert seen == before | {"lists": seen["lists"]}
        counted = [{**each, "num_referencing_filters": 0} for each in before["lists"]]
        assert [{**each, "num_referencing_filters": 0} for each in seen["lists"]] == counted

    def spoils(self, lab: Any) -> dict[str, Spoil]:
        def mine() -> tuple[str, list[dict[str, Any]]]:
            (ruleset,) = control_path(lab, "GET", "dump")["rulesets"]
            return ruleset["id"], [rule for rule in ruleset["rules"] if rule["ref"].endswith("_row")]

        def ask(method: str, body: Any = None) -> None:
            ruleset, (rule,) = mine()
            api(lab, method, f"zones/{{Z}}/rulesets/{ruleset}/rules/{rule['id']}", body)

        same = ("action", "expression", "description")

        def edited(**fields: Any) -> None:
            _ruleset, (rule,) = mine()
            ask("PATCH", {**{name: rule[name] for name in same}, **fields})

        return {
            "softened": Spoil(
                lambda: edited(action="js_challenge"), lambda: [one["action"] for one in mine()[1]] == ["js_challenge"]
            ),
            "disabled": Spoil(lambda: edited(enabled=False), lambda: [one["enabled"] for one in mine()[1]] == [False]),
            "moved": Spoil(lambda: ask("PATCH", {"position": {"after": ""}}), lambda: True, conflict=False),
            "deleted": Spoil(lambda: ask("DELETE"), lambda: mine()[1] == [], conflict=False),
        }
