# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Client file and controls of Cloudflare against the double: what is sent, what is not, and what a failure says."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ansible_collections.firebreak.incident.plugins.module_utils import _cloudflare
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context, Control
from ansible_collections.firebreak.incident.plugins.module_utils._errors import FirebreakError, Refused
from ansible_collections.firebreak.incident.plugins.module_utils._plan import Plan
from ansible_collections.firebreak.incident.plugins.modules import cloudflare_ip_list, cloudflare_waf_rule
from tests.contract.cloudflare_edge import ACCOUNT, TOKEN, ZONE, Edge, edge

INCIDENT = "INC-2026-1120-001"
RANGES = [f"198.{18 + (n >> 16)}.{n >> 8 & 255}.{n & 255}" for n in range(40_000, 45_000)]


@pytest.fixture(scope="module")
def running() -> Iterator[Edge]:
    with edge() as started:
        yield started


@pytest.fixture
def cf(running: Edge) -> Edge:
    running.lab("POST", "settings", {"plan": "enterprise", "delay": 0.02})
    running.lab("POST", "reset?rules=40&entries=3")
    return running


def context(seconds: float = 20.0) -> Context:
    return Context(correlation=INCIDENT, deadline=time.time() + seconds)


def params(cf: Edge, control: Control, **given: Any) -> dict[str, Any]:
    spec = {**_cloudflare.SPEC, **control.spec["argument_spec"]}
    common = {"incident_id": INCIDENT, "round": 1, "mark": f"{INCIDENT}/1"}
    where = {"cloudflare_url": cf.url, "cloudflare_token": TOKEN}
    where |= {"cloudflare_account_id": ACCOUNT, "cloudflare_zone_id": ZONE}
    return {**{name: option.get("default") for name, option in spec.items()}, **common, **where, **given}


def go(cf: Edge, control: Control, seconds: float = 20.0, alone: bool = True, **given: Any) -> Plan:
    """What the engine does: plan, apply, and nothing may be left to do."""
    options = params(cf, control, **given)
    client = control.service.connect(options, context(seconds))
    try:
        plan = control.plan(options, control.read(client, options))
        assert not control.plan(options, plan.after).changes
        for change in plan.changes:
            control.apply(client, options, change)
        left = control.plan(options, control.read(client, options))
        assert not left.changes
        assert left.before == plan.after or not alone
        return plan
    finally:
        client.close()


def undo(cf: Edge, control: Control, plan: Plan, alone: bool = True) -> None:
    for change in reversed(plan.changes):
        go(cf, control, alone=alone, **(change.undo or {}))


LIST, RULE = cloudflare_ip_list.CONTROL, cloudflare_waf_rule.CONTROL


#


def test_five_thousand_ranges_in_a_list_and_a_rule_with_few_calls(cf: Edge) -> None:
    before = cf.lab("GET", "dump")
    cf.lab("DELETE", "log")
    listed = go(cf, LIST, name="attackers", items=RANGES)
    ruled = go(cf, RULE, name="attackers", ip_lists=["attackers"], action="block")
    assert len(cf.lab("GET", "log")) <= 25
    assert cf.entries("attackers") == dict.fromkeys(RANGES, f"{INCIDENT}/1")
    mine = [rule for rule in cf.rules() if rule["ref"] == f"firebreak_{INCIDENT}_attackers"]
    assert [(rule["action"], rule["expression"]) for rule in mine] == [("block", "ip.src in $attackers")]
    assert [rule for rule in cf.rules() if rule not in mine] == before["rulesets"][0]["rules"]
    cf.lab("DELETE", "log")
    assert not go(cf, LIST, name="attackers", items=RANGES).changes
    assert not go(cf, RULE, name="attackers", ip_lists=["attackers"], action="block").changes
    assert cf.writes() == []
    undo(cf, RULE, ruled)
    undo(cf, LIST, listed)
    assert cf.lab("GET", "dump") == before


# The list


def test_entries_and_comments_of_others_stay(cf: Edge) -> None:
    before = cf.entries("scanners")
    foreign = next(iter(before))
    plan = go(cf, LIST, name="scanners", items=[foreign, "2001:DB8::7/128", "192.0.2.0/24"])
    assert plan.changes[0].undo == {"state": "absent", "name": "scanners", "items": ["2001:db8::7", "192.0.2.0/24"]}
    ours = dict.fromkeys(["2001:db8::7", "192.0.2.0/24"], f"{INCIDENT}/1")
    assert cf.entries("scanners") == {**before, **ours}
    go(cf, LIST, name="scanners", items=[foreign, "192.0.2.0/24"], state="absent")
    assert cf.entries("scanners") == {**before, "2001:db8::7": f"{INCIDENT}/1"}
    go(cf, LIST, name="scanners", state="absent")
    assert cf.entries("scanners") == before


def test_a_list_with_entries_of_others_is_not_deleted(cf: Edge) -> None:
    go(cf, LIST, name="attackers", items=["192.0.2.1"])
    go(cf, LIST, name="attackers", items=["192.0.2.2"], incident_id="INC-2026-1120-002", mark="INC-2026-1120-002/1")
    go(cf, LIST, name="attackers", state="absent")
    assert cf.entries("attackers") == {"192.0.2.2": "INC-2026-1120-002/1"}


def test_a_list_in_use_cannot_be_deleted(cf: Edge) -> None:
    go(cf, LIST, name="attackers", items=["192.0.2.1"])
    go(cf, RULE, name="attackers", ip_lists=["attackers"])
    with pytest.raises(FirebreakError, match="while a rule uses it") as failure:
        go(cf, LIST, name="attackers", state="absent")
    assert failure.value.effect == "none"


def test_a_full_account_is_explained(cf: Edge) -> None:
    cf.lab("POST", "settings", {"plan": "pro"})
    many = [f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}" for n in range(10_000)]
    with pytest.raises(FirebreakError, match="as many entries as its plan allows"):
        go(cf, LIST, name="attackers", items=many)


def test_an_operation_of_somebody_else_is_waited_for(cf: Edge) -> None:
    cf.lab("POST", "settings", {"delay": 0.7})
    scanners = next(each["id"] for each in cf.lab("GET", "dump")["lists"] if each["name"] == "scanners")
    assert cf.call("POST", f"/accounts/{ACCOUNT}/rules/lists/{scanners}/items", [{"ip": "192.0.2.200"}])[0] == 200
    go(cf, LIST, name="office", items=["192.0.2.1"])
    assert cf.entries("office")["192.0.2.1"] == f"{INCIDENT}/1"


def test_an_operation_that_does_not_end_is_unconfirmed(cf: Edge) -> None:
    cf.lab("POST", "settings", {"delay": 3})
    with pytest.raises(FirebreakError, match="not ended yet") as failure:
        go(cf, LIST, seconds=1, name="scanners", items=["192.0.2.1"])
    assert failure.value.effect == "unknown"


# The rule


def test_a_rule_is_changed_and_put_back_to_what_it_was(cf: Edge) -> None:
    go(cf, RULE, name="attackers", ip_lists=["scanners"], action="managed_challenge", description="Watch them")
    first = cf.rules()
    plan = go(cf, RULE, name="attackers", ip_lists=["scanners"], countries=["T1"], action="block")
    assert plan.changes[0].action == "update"
    assert cf.rules()[0]["expression"] == '(ip.src in $scanners or ip.src.country in {"T1"})'
    undo(cf, RULE, plan)
    unversioned = [{k: v for k, v in rule.items() if k not in ("version", "last_updated")} for rule in cf.rules()]
    assert unversioned == [{k: v for k, v in rule.items() if k not in ("version", "last_updated")} for rule in first]
    assert cf.rules()[1:] == first[1:]


@pytest.mark.parametrize(("position", "place"), [("first", 0), ("last", -1)])
def test_a_new_rule_has_its_position(cf: Edge, position: str, place: int) -> None:
    go(cf, RULE, name="attackers", ip_lists=["scanners"], position=position)
    assert cf.rules()[place]["ref"] == f"firebreak_{INCIDENT}_attackers"


def test_only_the_single_rule_is_ever_written(cf: Edge) -> None:
    plan = go(cf, RULE, name="attackers", ip_lists=["scanners"])
    go(cf, RULE, name="attackers", ip_lists=["scanners"], action="js_challenge")
    undo(cf, RULE, plan)
    kinds = [(each["method"], "rules" in each["path"].split("/")) for each in cf.writes()]
    assert kinds == [("POST", True), ("PATCH", True), ("DELETE", True)]


def test_a_zone_without_rules_gets_a_ruleset_and_loses_it_again(cf: Edge) -> None:
    cf.lab("POST", "reset?rules=-1")
    plan = go(cf, RULE, name="tor", countries=["T1"])
    assert cf.visit("127.66.0.66")[0] == 403
    undo(cf, RULE, plan)
    assert cf.lab("GET", "dump")["rulesets"] == []


def test_a_ruleset_of_ours_with_rules_of_others_stays(cf: Edge) -> None:
    cf.lab("POST", "reset?rules=-1")
    plan = go(cf, RULE, name="tor", countries=["T1"])
    cf.lab("POST", "foreign", {})
    undo(cf, RULE, plan)
    assert [rule["description"] for rule in cf.rules()] == ["by hand"]


def test_a_rule_added_in_between_survives_the_removal(cf: Edge) -> None:
    cf.lab("POST", "reset?rules=-1")
    plan = go(cf, RULE, name="tor", countries=["T1"])
    cf.lab("POST", "foreign", {"when": "before_write"})
    undo(cf, RULE, plan, alone=False)
    assert [rule["description"] for rule in cf.rules()] == ["by hand"]


def test_an_empty_ruleset_of_others_stays(cf: Edge) -> None:
    cf.lab("POST", "reset?rules=0")
    before = cf.lab("GET", "dump")
    undo(cf, RULE, go(cf, RULE, name="tor", countries=["T1"]))
    assert cf.lab("GET", "dump") == before


@pytest.mark.parametrize("status", ["500", "502", "unsuccessful", "drop"])
def test_unreadable_rules_are_not_taken_for_none(cf: Edge, status: str) -> None:
    cf.lab("POST", "faults", [{"kind": status, "on": "reads", "times": 9}])
    with pytest.raises(FirebreakError):
        go(cf, RULE, name="tor", countries=["T1"])
    assert cf.writes() == []


def test_the_dry_run_asks_the_service_and_changes_nothing(cf: Edge) -> None:
    before = cf.lab("GET", "dump")

    def dry(**given: Any) -> None:
        options = params(cf, RULE, **given)
        client = RULE.service.connect(options, context())
        for change in RULE.plan(options, RULE.read(client, options)).changes:
            assert RULE.dry_run
            RULE.dry_run(client, options, change)
        client.close()

    dry(name="attackers", ip_lists=["scanners"])
    dry(name="attackers", ip_lists=["comes_later"])
    with pytest.raises(FirebreakError, match="wrong at line 1, character 8"):
        dry(name="attackers", expression="ip.src is bad")
    cf.lab("POST", "settings", {"plan": "pro"})
    with pytest.raises(FirebreakError, match="400"):
        dry(name="attackers", ip_lists=["scanners"])
    assert cf.lab("GET", "dump") == before
    assert [each for each in cf.lab("GET", "log") if each["query"].get("dry_run")]
    assert cf.writes() == []


def test_the_dry_run_of_a_zone_without_rules(cf: Edge) -> None:
    cf.lab("POST", "reset?rules=-1")
    options = params(cf, RULE, name="tor", countries=["T1"])
    client = RULE.service.connect(options, context())
    (change,) = RULE.plan(options, RULE.read(client, options)).changes
    assert RULE.dry_run
    RULE.dry_run(client, options, change)
    client.close()
    assert cf.lab("GET", "dump")["rulesets"] == []
    assert [each["query"] for each in cf.lab("GET", "log") if each["method"] == "POST"] == [{"dry_run": "true"}]


# Failures


def control_of(name: str) -> tuple[Control, dict[str, Any]]:
    if name == "rule":
        return RULE, {"name": "tor", "countries": ["T1"]}
    return LIST, {"name": "office", "items": ["192.0.2.1"]}


@pytest.mark.parametrize("name", ["rule", "list"])
def test_a_write_whose_answer_is_lost_is_sent_once_and_found(cf: Edge, name: str) -> None:
    control, given = control_of(name)
    cf.lab("POST", "faults", [{"kind": "drop", "after": True}])
    assert go(cf, control, **given).changes
    assert len(cf.writes()) == 1


@pytest.mark.parametrize("kind", ["drop", "500", "502", "unsuccessful"])
@pytest.mark.parametrize("name", ["rule", "list"])
def test_a_write_that_is_lost_is_not_repeated(cf: Edge, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cloudflare, "SETTLE_SECONDS", 0.0)
    control, given = control_of(name)
    before = cf.lab("GET", "dump")
    cf.lab("POST", "faults", [{"kind": kind}])
    with pytest.raises(FirebreakError) as failure:
        go(cf, control, **given)
    assert failure.value.effect == "unknown"
    assert len(cf.writes()) == 1
    assert cf.lab("GET", "dump") == before
    go(cf, control, **given)  # the same command again


@pytest.mark.parametrize("step", [1, 2])
def test_the_removal_of_a_rule_is_found_too(cf: Edge, step: int) -> None:
    cf.lab("POST", "reset?rules=-1")
    plan = go(cf, RULE, name="tor", countries=["T1"])
    cf.lab("POST", "faults", [{"kind": "drop", "after": True, "nth": step}])
    undo(cf, RULE, plan)
    assert cf.lab("GET", "dump")["rulesets"] == []


def test_the_service_says_how_long_to_wait(cf: Edge) -> None:
    cf.lab("POST", "faults", [{"kind": "429", "retry_after": "1", "on": "all", "times": 2}])
    begun = time.monotonic()
    assert go(cf, RULE, name="tor", countries=["T1"]).changes
    assert time.monotonic() - begun >= 2
    assert len(cf.writes()) == 1


def test_a_limited_write_had_no_effect_and_is_sent_again(cf: Edge) -> None:
    cf.lab("POST", "faults", [{"kind": "429", "retry_after": "0", "times": 2}])
    go(cf, RULE, name="tor", countries=["T1"])
    assert [each.get("status") for each in cf.writes()] == [None, None, 200]
    assert len(cf.rules()) == 41


def test_a_long_wait_is_told_and_not_waited_for(cf: Edge) -> None:
    cf.lab("POST", "faults", [{"kind": "429", "retry_after": "300", "on": "all"}])
    begun = time.monotonic()
    with pytest.raises(FirebreakError, match="asks to wait 300 s") as failure:
        go(cf, RULE, name="tor", countries=["T1"])
    assert failure.value.effect == "none"
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cloudflare_token": "expired-token"}, "403, code 10000: cloudflare_token is not valid, lacks a permission"),
        ({"cloudflare_token": "two\nlines"}, "cloudflare_token holds characters"),
        ({"cloudflare_token": None}, "cloudflare_token is missing"),
        ({"cloudflare_zone_id": "f" * 32}, "403, code 10000"),
        ({"cloudflare_zone_id": "example.com"}, "cloudflare_zone_id must be set to 32 hexadecimal digits"),
        ({"cloudflare_zone_id": None}, "cloudflare_zone_id must be set"),
        ({"cloudflare_url": "file:///etc"}, "cloudflare_url must begin with"),
        ({"cloudflare_url": "http://127.0.0.1:1/client/v4"}, "gave no answer \\(ConnectError\\)"),
    ],
)
def test_bad_connection_options_are_named_before_anything_is_touched(
    cf: Edge, given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FirebreakError, match=message) as failure:
        go(cf, RULE, name="tor", countries=["T1"], **given)
    assert failure.value.effect == "none"
    assert not any(str(value) in failure.value.msg for value in given.values() if value and "\n" not in str(value))
    assert cf.writes() == []


def test_a_dead_application_programming_interface_says_so_soon(cf: Edge) -> None:
    begun = time.monotonic()
    with pytest.raises(FirebreakError, match="gave no answer"):
        go(cf, LIST, name="office", items=["192.0.2.1"], cloudflare_url="http://127.0.0.1:1/client/v4")
    assert time.monotonic() - begun < 3


def test_what_the_environment_says_is_not_heard(cf: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = {
        "CLOUDFLARE_EMAIL": "someone@example.com",
        "CLOUDFLARE_API_KEY": "key",
        "CLOUDFLARE_API_TOKEN": "other",
        "CLOUDFLARE_API_USER_SERVICE_KEY": "v1.0-key",
        "CLOUDFLARE_BASE_URL": "http://127.0.0.1:1",
        "CLOUDFLARE_CUSTOM_HEADERS": "X-Stray: 1",
        "HTTP_PROXY": "http://127.0.0.1:1",
        "ALL_PROXY": "http://127.0.0.1:1",
    }
    for name, value in hostile.items():
        monkeypatch.setenv(name, value)
    go(cf, RULE, name="tor", countries=["T1"])
    assert {name: os.environ[name] for name in hostile} == hostile


def test_a_token_of_the_task_s_environment_is_used_and_is_a_secret(cf: Edge) -> None:
    options = params(cf, RULE, name="tor", countries=["T1"], cloudflare_token=None)
    surroundings = Context(env={"CLOUDFLARE_API_TOKEN": TOKEN}, correlation=INCIDENT)
    client = _cloudflare.connect(options, surroundings)
    assert client.entry_point()
    client.close()
    assert surroundings.secrets.censor({"x": f"Bearer {TOKEN}"}) == {"x": "Bearer ********"}


def test_a_token_of_the_lab_comes_from_options_only(cf: Edge) -> None:
    with pytest.raises(Refused, match="cloudflare_token is missing"):
        _cloudflare.connect(params(cf, RULE, name="tor", cloudflare_token=None), Context(env={}))
