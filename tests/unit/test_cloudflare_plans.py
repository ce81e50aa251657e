# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the Cloudflare controls decide, without a server."""

from __future__ import annotations

import contextlib
import ipaddress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.firebreak.incident.plugins.module_utils._cloudflare_expression import reach, with_known_lists
from ansible_collections.firebreak.incident.plugins.module_utils._errors import Refused
from ansible_collections.firebreak.incident.plugins.module_utils._plan import at
from ansible_collections.firebreak.incident.plugins.modules import cloudflare_ip_list, cloudflare_waf_rule
from lab.expression import Expression
from tests.controls import cloudflare_ip_list as list_row
from tests.controls import cloudflare_waf_rule as rule_row
from tests.rows import Case

CASES = [
    *(pytest.param(cloudflare_ip_list, case, id=f"list: {case.name}") for case in list_row.PLANS),
    *(pytest.param(cloudflare_waf_rule, case, id=f"rule: {case.name}") for case in rule_row.PLANS),
]
ADDRESSES = [f"192.0.2.{number}" for number in range(6)] + ["2001:db8::/32", "198.51.100.0/24"]


@pytest.mark.parametrize(("module", "case"), CASES)
def test_plan(module: Any, case: Case) -> None:
    if case.raises:
        with pytest.raises(Refused, match=case.raises):
            module.plan(case.params, case.facts)
        return
    plan = module.plan(case.params, case.facts)
    assert [(change.action, change.target) for change in plan.changes] == case.changes
    assert case.after is None or plan.after == case.after
    assert module.plan(case.params, plan.after).changes == ()
    assert bool(plan.changes) == (plan.before != plan.after)


@pytest.mark.parametrize(("module", "case"), [param for param in CASES if not param.values[1].raises])
def test_undo_puts_back_what_stood_there(module: Any, case: Case) -> None:
    plan = module.plan(case.params, case.facts)
    facts = plan.after
    for change in [change for change in reversed(plan.changes) if change.undo]:
        # A release knows the incident and the recorded options only; all else is as documented.
        spec = module.SPEC["argument_spec"]
        defaults = {name: option.get("default") for name, option in spec.items()}
        common = {name: case.params[name] for name in ("incident_id", "round", "mark")}
        undone = module.plan({**defaults, **common, **change.undo}, facts)
        assert at(undone.after, change.path) == at(plan.before, change.path)
        facts = {**facts, **undone.after}


def model(entries: dict[str, str], wanted: list[str]) -> dict[str, Any]:
    """The facts of a list of somebody else with these comments."""
    ours = {value: comment for value, comment in entries.items() if comment == list_row.MARK and value in wanted}
    others = sorted(value for value in wanted if value in entries and value not in ours)
    foreign = any(comment != list_row.MARK for comment in entries.values())
    return {"list": {"kind": "ip", "ours": False, "others": foreign}, "entries": ours, "listed_by_others": others}


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(ADDRESSES), st.sampled_from([list_row.MARK, "ticket 7", ""])),
    st.lists(st.sampled_from(ADDRESSES)),
)
def test_entries_of_others_are_never_touched_and_undo_is_exact(entries: dict[str, str], wanted: list[str]) -> None:
    params = list_row._params(*wanted)
    plan = cloudflare_ip_list.plan(params, model(entries, wanted))
    added = [value for change in plan.changes for value in (change.undo or {})["items"]]
    assert not set(added) & set(entries)
    assert {*entries, *added} == {*entries, *wanted}
    now = {**entries, **dict.fromkeys(added, list_row.MARK)}
    back = cloudflare_ip_list.plan({**params, "state": "absent", "items": added}, model(now, added))
    removed = {value for change in back.changes for value in (change.undo or {})["items"]}
    assert {value: comment for value, comment in now.items() if value not in removed} == entries


@settings(deadline=None)
@given(st.lists(st.one_of(st.ip_addresses(), st.text(max_size=20)).map(str), max_size=4))
def test_items_are_understood_or_refused(items: list[str]) -> None:
    with contextlib.suppress(Refused):
        for value in cloudflare_ip_list.plan(list_row._params(*items), list_row.ABSENT).after["entries"]:
            assert str(ipaddress.ip_network(value)).removesuffix("/32").removesuffix("/128") == value


def test_a_list_covers_its_addresses_so_that_protected_ones_are_refused() -> None:
    plan = cloudflare_ip_list.plan(list_row._params("198.51.100.0/24", "192.0.2.1"), list_row.ABSENT)
    assert plan.covers == {"addresses": ["198.51.100.0/24", "192.0.2.1"]}


SELECTIONS = st.fixed_dictionaries(
    {
        "ip_lists": st.lists(st.from_regex("[a-z0-9_]{1,9}", fullmatch=True), max_size=3),
        "countries": st.lists(st.from_regex("[A-Z][A-Z0-9]", fullmatch=True), max_size=3),
        "hosts": st.lists(st.from_regex("[a-z0-9.-]{1,9}", fullmatch=True), max_size=3),
        "paths": st.lists(st.from_regex("/[!-~]{0,9}", fullmatch=True), max_size=3),
        "except_ip_lists": st.lists(st.from_regex("[a-z0-9_]{1,9}", fullmatch=True), max_size=3),
    }
)


@settings(deadline=None)
@given(SELECTIONS)
def test_what_selectors_write_is_in_the_language_and_means_them(selection: dict[str, list[str]]) -> None:
    try:
        rule = cloudflare_waf_rule.plan(rule_row._params(**selection), rule_row._facts()).after["rule"]
    except Refused:
        assert not any(selection.values()) or any(set(path) & set('"\\') for path in selection["paths"])
        return
    expression = Expression(rule["expression"])
    assert expression.lists == {*selection["ip_lists"], *selection["except_ip_lists"]}
    listed = [ipaddress.ip_address("192.0.2.1")]
    lists = {name: listed if name in selection["ip_lists"] else [] for name in expression.lists}
    clash = set(selection["ip_lists"]) & set(selection["except_ip_lists"])
    request = {
        "ip.src": listed[0],
        "ip.src.country": (selection["countries"] or [""])[-1],
        "http.host": (selection["hosts"] or [""])[-1],
        "http.request.uri.path": (selection["paths"] or [""])[-1] + "more",
    }
    assert expression.matches(request, lists) == (not clash)
    for name, selector in (("http.host", "hosts"), ("http.request.uri.path", "paths")):
        if selection[selector] and "/" not in selection[selector]:
            assert not expression.matches({**request, name: "#"}, lists)


@pytest.mark.parametrize(
    ("own", "covers", "wide"),
    [
        ({"ip_lists": ["a"]}, {"countries": []}, ()),
        ({"countries": ["T1", "KP"]}, {"countries": ["T1", "KP"]}, ()),
        ({"paths": ["/a"]}, {"countries": []}, ()),
        ({"hosts": ["app.example.com"], "except_ip_lists": ["office"]}, {"countries": []}, ("every_visitor",)),
        ({"hosts": ["app.example.com"], "action": "log"}, {}, ()),
        ({"hosts": ["app.example.com"], "enabled": False}, {}, ()),
        (
            {"expression": "ip.src in {192.0.2.0/24 2001:db8::/32}"},
            {"addresses": ["192.0.2.0/24", "2001:db8::/32"], "countries": []},
            (),
        ),
        ({"expression": "ip.src eq 192.0.2.1"}, {"addresses": ["192.0.2.1"], "countries": []}, ()),
        ({"expression": 'ip.src.country in {"DE" "FR"}'}, {"addresses": [], "countries": ["DE", "FR"]}, ()),
        ({"expression": 'ip.geoip.country eq "DE"'}, {"addresses": [], "countries": ["DE"]}, ()),
        ({"expression": "not ip.src in {192.0.2.0/24}"}, {"addresses": [], "countries": []}, ("every_visitor",)),
        ({"expression": "ip.src in $a or ssl"}, {"addresses": [], "countries": []}, ("every_visitor",)),
        ({"expression": "ip.src ge 0.0.0.0"}, {"addresses": [], "countries": []}, ("every_visitor",)),
        ({"expression": 'ip.src in $a and http.user_agent contains "not or"'}, {"addresses": [], "countries": []}, ()),
        ({"expression": "true"}, {"addresses": [], "countries": []}, ("every_visitor",)),
        ({"expression": 'http.host eq "x"'}, {"addresses": [], "countries": []}, ("every_visitor",)),
        ({"expression": 'ip.src.continent eq "EU"'}, {"addresses": [], "countries": []}, ("every_visitor",)),
    ],
)
def test_whom_a_rule_can_hit(own: dict[str, Any], covers: dict[str, list[str]], wide: tuple[str, ...]) -> None:
    params = rule_row._params(**own)
    plan = cloudflare_waf_rule.plan(params, rule_row._facts())
    assert reach(params, plan.after["rule"]) == (covers, wide) == (plan.covers, plan.wide)


def test_a_dry_run_keeps_known_lists() -> None:
    text = "ip.src in $known and not ip.src in $new and ip.src in $cf.malware"
    assert (
        with_known_lists(text, {"known"}) == "ip.src in $known and not ip.src in {192.0.2.1} and ip.src in $cf.malware"
    )
    assert with_known_lists(text, None) == text
