# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""You cannot lock yourself out, destroy what is evidence, or reach too far: each guard refuses before anything is touched, in a
dry run with the same words, and yields only to a record.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.firebreak.incident.plugins.module_utils import _decision, _engine, _guards, _task
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context
from ansible_collections.firebreak.incident.plugins.module_utils._errors import Refused
from ansible_collections.firebreak.incident.plugins.modules import cloudflare_waf_rule, incident_event
from lab.client import Lab
from tests import helpers
from tests.contract.rotation_walk import LocalHost
from tests.controls.cloudflare_ip_list import visit
from tests.rows import Row
from tests.runs import glass
from tests.truth import FULL, budget

ROWS = helpers.every_row()
BLOCKING = [row for row in ROWS if row.blocking([], []) is not None]
SETS = budget(5_000, 10_000)  # for each control that blocks
SERVED = budget(6, 60)

# --- what is covered, by an oracle of its own: intervals of numbers, and addresses one by one

V4 = ("192.0.2.", "198.51.100.", "203.0.113.", "203.0.112.")
# How IPv4 addresses are spelled in IPv6: the first 128 bits, and by how many an IPv4 address stands further left.
SPELLED = ((0xFFFF << 32, 0, 1 << 32), (0x64FF9B << 96, 0, 1 << 32), (0x2002 << 112, 80, 1 << 112))
COUNTRIES = ("DE", "FR", "CH", "AT", "T1", "XX", "US", "BR")


def interval(text: str) -> tuple[int, int, int]:
    network = ipaddress.ip_network(text.strip(), strict=False)
    return network.version, int(network[0]), int(network[-1])


def machines(text: str) -> list[tuple[int, int, int]]:
    """The addresses in it, and those that are spelled in it, as intervals."""
    version, first, last = interval(text)
    found = [(version, first, last)]
    for start, shift, size in SPELLED if version == 6 else ():
        low, high = max(first, start), min(last, start + size - 1)
        if low <= high:
            found.append((4, (low - start) >> shift, (high - start) >> shift))
    return found


def covered(block: str, kept: str) -> bool:
    pairs = ((one, other) for one in machines(block) for other in machines(kept))
    return any(one[0] == other[0] and one[1] <= other[2] and other[1] <= one[2] for one, other in pairs)


class Generator:
    """Blocks and protected sets that often touch: in few networks, of every width, and in every spelling."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def network(self, narrowest: int = 8) -> str:
        pick = self.random
        if pick.random() < 0.3:
            prefix = pick.choice((128, 128, 64, 48, 40, 33, 32, 24, 16))
            word = pick.choice(("2001:db8:", "2001:db8:bad:", "2001:0DB8:0:1:", "2001:DB8:BAD:7:"))
            address = int(ipaddress.ip_address(word + ":")) + pick.choice((0, 1, 0x42))
            return self.spell6(ipaddress.IPv6Network((address >> (128 - prefix) << (128 - prefix), prefix)))
        prefix = pick.choice((32, 32, 32, 30, 28, 25, 24, 24, 23, 22, 20, 16, 12, narrowest))
        address = int(ipaddress.ip_address(pick.choice(V4) + str(pick.choice((0, 1, 9, 66, 128, 255)))))
        return self.spell4(ipaddress.IPv4Network((address >> (32 - prefix) << (32 - prefix), prefix)))

    def spell4(self, network: ipaddress.IPv4Network) -> str:
        first, prefix = network.network_address, network.prefixlen
        words = f"{int(first) >> 16:x}:{int(first) & 0xFFFF:X}"
        ways = [str(network)] * 4
        ways += [f"::ffff:{first}/{96 + prefix}", f"::FFFF:{words}/{96 + prefix}", f"64:ff9b::{words}/{96 + prefix}"]
        ways += [f"2002:{words}::/{16 + prefix}", f" {network} "]
        ways += [str(first), f"0:0:0:0:0:ffff:{words}", f"64:ff9b::{first}"] if prefix == 32 else []
        ways += [f"2002:{words}:1:2:3:4:5"] if prefix == 32 else []
        return self.random.choice(ways)

    def spell6(self, network: ipaddress.IPv6Network) -> str:
        ways = [str(network), network.exploded, str(network).upper()]
        return self.random.choice(ways + ([str(network.network_address)] if network.prefixlen == 128 else []))

    def blocks(self) -> list[str]:
        pick = self.random
        found = [self.network(pick.choice((8, 17, 20, 24))) for _each in range(pick.randrange(1, 9))]
        if pick.random() < 0.3:  # neighbours, which together are a wider network
            base = ipaddress.ip_network(f"{pick.choice(V4)}0/24")
            found += [str(each) for each in base.subnets(pick.randrange(1, 4))]
        if pick.random() < 0.05:
            found.append(pick.choice(("0.0.0.0/0", "::/0", "::ffff:0:0/96", "2002::/16", "64:ff9b::/96", "2000::/3")))
        return [*found, *pick.sample(found, pick.randrange(0, 2))]

    def countries(self) -> list[str]:
        return self.random.sample(COUNTRIES, self.random.randrange(0, 4)) if self.random.random() < 0.4 else []

    def kept(self) -> dict[str, list[str]]:
        pick = self.random
        addresses = [self.network(22) for _each in range(pick.randrange(0, 4))]
        return {"addresses": addresses, "countries": [pick.choice((str.upper, str.lower))(c) for c in self.countries()]}


def decided(row: Row, blocks: list[str], countries: list[str], kept: dict[str, list[str]], wide: bool) -> str | None:
    """The guard that refuses the plan of this control, or None."""
    control = helpers.module_of(row.control).CONTROL
    params, facts = row.blocking(blocks, countries) or ({}, {})
    params = {**params, "protected": kept}
    broken = dict.fromkeys(("wide_block", "every_visitor"), "a test") if wide else {}
    task = _task.Task(control, params, Context(), broken)
    try:
        _decision.guard(task, control.plan(params, facts))
    except Refused as refusal:
        return refusal.guard
    return None


@pytest.mark.parametrize("row", BLOCKING, ids=helpers.name_of)
def test_what_is_blocked_covers_nobody_protected(row: Row, record_property: Callable[[str, object], None]) -> None:
    given = Generator(int.from_bytes(os.urandom(4)) if FULL else 4)
    counted = {"protected": 0, "breadth": 0, None: 0}
    for _number in range(SETS):
        blocks, kept, wide = given.blocks(), given.kept(), given.random.random() < 0.7
        countries = given.countries() if row.control == "cloudflare_waf_rule" else []
        guard = decided(row, blocks, countries, kept, wide)
        hit = [(block, one) for block in blocks for one in kept["addresses"] if covered(block, one)]
        hit += [(one, one) for one in countries if one in {each.upper() for each in kept["countries"]}]
        broad = any(last - first + 1 > 1 << (16 if kind == 4 else 96) for kind, first, last in map(interval, blocks))
        expected = "protected" if hit else "breadth" if broad and not wide else None
        if guard == "breadth" and not wide and expected is None:
            mapped = [block for block in blocks if machines(block)[1:] and _mapped_is_wide(block)]
            assert mapped, (blocks, kept)
            expected = "breadth"
        assert guard == expected, (blocks, countries, kept, wide, hit)
        counted[guard] += 1
        if guard is None:
            for address in (ipaddress.ip_network(one.strip(), strict=False)[0] for one in kept["addresses"]):
                assert not any(address in ipaddress.ip_network(each.strip(), strict=False) for each in blocks)
    assert min(counted.values()) > SETS / 50, counted
    record_property("tried", SETS)


def _mapped_is_wide(block: str) -> bool:
    """An IPv4 network of more than 65,536 addresses, written as IPv4-mapped IPv6."""
    network = ipaddress.ip_network(block.strip(), strict=False)
    return network.version == 6 and network[0].ipv4_mapped is not None and 96 <= network.prefixlen < 112  # type: ignore[union-attr]


def test_the_oracle_knows_what_is_covered() -> None:
    yes = [("192.0.2.0/24", "192.0.2.9"), ("192.0.2.9", "192.0.2.0/24"), ("::ffff:192.0.2.0/120", "192.0.2.9")]
    yes += [("2002:c000:209::/48", "192.0.2.9"), ("64:ff9b::c000:209", "192.0.2.9"), ("::/0", "192.0.2.9")]
    yes += [("192.0.2.9", "::ffff:0:0/96"), ("2002:c000::/20", "192.0.2.9"), ("2001:db8::/32", "2001:db8::1")]
    no = [("192.0.2.0/25", "192.0.2.128"), ("2001:db8::/33", "2001:db8:8000::"), ("2002:c000:20a::/48", "192.0.2.9")]
    no += [("::ffff:192.0.2.8", "192.0.2.9"), ("2001:db8::/32", "192.0.2.9"), ("::c000:209", "192.0.2.9")]
    assert all(covered(*pair) for pair in yes) and not any(covered(*pair) for pair in no)


@pytest.mark.parametrize("row", BLOCKING[:1], ids=helpers.name_of)
def test_at_the_real_edge_whoever_is_protected_is_served(
    lab: Lab, row: Row, record_property: Callable[[str, object], None]
) -> None:
    """Sets through the whole control, then a rule over the list, then visits from every address that the edge knows."""
    given = Generator(11)
    sources = {f"192.0.2.{n}": f"127.0.2.{n}" for n in (1, 9, 66, 128)}
    sources |= {f"198.51.100.{n}": f"127.66.0.{n}" for n in (1, 9, 66, 128)}
    sources |= {f"203.0.113.{n}": f"127.0.113.{n}" for n in (1, 9, 66, 128)}
    row.prepare(lab)
    store = helpers.store_of(lab)
    outcomes = set()
    for _number in range(SERVED):
        kept = given.random.sample(sorted(sources), 3)
        blocks = [f"{given.random.choice(V4)}{given.random.choice((1, 9, 66, 128))}" for _each in range(4)]
        blocks += [given.random.choice(("192.0.2.0/28", "198.51.100.64/26", "203.0.113.128/25", "2001:db8::/32"))]
        spelled = [given.spell4(ipaddress.IPv4Network(block)) if ":" not in block else block for block in blocks]
        incident = helpers.open_incident(lab, store, row.host)
        around = {**helpers.surroundings(lab, store, row.host, incident), "protected": {"addresses": kept}}
        params = {**row.params(lab), **around, "host": row.host, "items": spelled}
        listed = helpers.execute(helpers.module_of(row.control).CONTROL, params)
        hit = [block for block in spelled if any(covered(block, one) for one in kept)]
        assert bool(listed.get("failed")) == bool(hit), (spelled, kept, listed.get("msg"))
        connection = helpers.connection_options(row.control, params)
        rule = {"name": "served", "ip_lists": [params["name"]], **connection, **around, "host": row.host}
        if not hit:
            helpers.execute(cloudflare_waf_rule.CONTROL, rule)
        networks = [] if hit else [ipaddress.ip_network(block.strip(), strict=False) for block in spelled]
        networks += [
            ipaddress.ip_network(str(each[0].ipv4_mapped))
            for each in networks
            if each.version == 6 and each[0].ipv4_mapped is not None
        ]
        for address, source in sources.items():
            blocked = any(ipaddress.ip_address(address) in network for network in networks)
            assert visit(lab, source) == (403 if blocked else 200), (address, spelled)
            assert not (blocked and address in kept)
            outcomes.add(blocked)
        assert not helpers.release(lab, store, row.control, params, incident).get("failed")
    assert outcomes == {True, False}
    record_property("tried", SERVED)


# --- every guard, every control

# Off the lab these come from the environment; on the lab they never do.
CREDENTIALS = {
    "postgresql_password": "PGPASSWORD",
    "redis_password": "REDISCLI_AUTH",
    "vault_token": "VAULT_TOKEN",
    "cloudflare_token": "CLOUDFLARE_API_TOKEN",
}


class Trial:
    """A control in an incident of its own; a refusal is asked for twice, and must leave everything as it was."""

    def __init__(self, lab: Lab, row: Row) -> None:
        self.lab, self.row = lab, row
        row.prepare(lab)
        self.control = helpers.module_of(row.control).CONTROL
        self.store = helpers.store_of(lab)
        self.incident = helpers.open_incident(lab, self.store, row.host)
        helpers.begin(lab, row, self.store, self.incident)
        around = helpers.surroundings(lab, self.store, row.host, self.incident)
        self.params = {**row.params(lab), **around, "host": row.host}
        self.before = row.observe(lab)
        self.tried = 0

    def run(self, check: bool = False, **more: Any) -> dict[str, Any]:
        given = {name: value for name, value in {**self.params, **more}.items() if value is not None}
        env = given.pop("env", {})
        return helpers.execute(self.control, given, host=LocalHost(), check_mode=check, env=env)

    def entries(self, kind: str) -> list[dict[str, Any]]:
        folder = Path(self.store.removeprefix("file://")) / self.incident / "journal"
        found = [json.loads(path.read_bytes()) for path in sorted(folder.glob("*/*.json"))]
        return [one for one in found if one["kind"] == kind and one["stream"] != "_run"]

    def refused(self, *words: str, guard: str | None = None, **more: Any) -> None:
        intents = len(self.entries("intent"))
        dry, real = self.run(check=True, **more), self.run(**more)
        for result in (dry, real):
            assert result.get("failed") and not result["changed"], result
            assert all(word in result["msg"] for word in words), (words, result["msg"])
        assert dry["msg"] == real["msg"]
        assert self.row.observe(self.lab) == self.before
        assert len(self.entries("intent")) == intents
        if guard is not None:
            assert self.entries("refused")[-1]["body"]["guard"] == guard
        self.tried += 2

    def yields(self, guard: str, **more: Any) -> None:
        """It goes on, and the record says why."""
        before = len(self.entries("override"))
        result = self.run(**more)
        assert not result.get("failed"), result["msg"]
        assert [one["body"]["guard"] for one in self.entries("override")[before:]] == [guard]
        self.tried += 1

    def end(self) -> None:
        assert not helpers.release(self.lab, self.store, self.row.control, self.params, self.incident).get("failed")


@pytest.mark.parametrize("row", ROWS, ids=helpers.name_of)
def test_each_guard_refuses_and_yields_only_to_a_record(
    lab: Lab, row: Row, record_property: Callable[[str, object], None]
) -> None:
    one, reach = Trial(lab, row), row.reach(lab)
    irreversible = not row.reversible and not one.control.evidence
    yesterday = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)).date().isoformat()
    # Where nothing of a guard applies to a control, there is nothing to try, and its reach says so.
    for kept, more in reach.covers:
        one.refused("protected", guard="protected", **{"protected": kept, **more})
        kinds = {kind for kind in kept if kind in ("addresses", "roles", "tokens")}
        if kinds:  # the same where only the systems see it
            here = {kind: kept[kind] for kind in kinds}
            one.refused(
                "protected", guard="protected", **{"protected": {}, "seen": [{"host": row.host, **here}], **more}
            )
    for guard, more in reach.wide.items():
        glasses = {"break_glass": [each for each in one.params.get("break_glass", []) if each["guard"] != guard]}
        one.refused("breadth", guard, guard="breadth", **{**more, **glasses})
    if reach.destroys:
        one.refused("evidence", guard="evidence", break_glass=None)
    for bad, words in (
        ({"date": yesterday}, "is not today's"),
        ({"reason": " "}, "has no reason"),
        ({"guard": "nonsense"}, "is no guard"),
    ):
        one.refused(words, break_glass=[{**glass("store")[0], **bad}])
    if irreversible:
        one.refused("unattended", guard="unattended", unattended=True)
        one.refused("two_person", guard="two_person", two_person=True)
    one.refused("FIREBREAK_LAB is set", site="production", env={"FIREBREAK_LAB": "1"})
    one.refused("owner", site="production", owner=None)
    one.refused("firebreak_protected", site="production", protected={})
    one.refused("every inventory sets firebreak_site", site=None)
    for option, away in elsewhere(one.params).items():
        one.refused("loopback only", **{option: away})
    for option, variable in CREDENTIALS.items():
        if option in one.params:  # the right one, but from the environment
            one.refused(option, **{option: None, "env": {variable: one.params[option]}})
    halt = Path(one.store.removeprefix("file://")) / "HALT"
    halt.touch()
    try:
        one.refused("HALT", guard="halt")
    finally:
        halt.unlink()
    if irreversible:
        approve(one, "tester")  # one's own word is none
        one.refused("two_person", guard="two_person", two_person=True)
        approve(one, "somebody else")
    again = {"two_person": True} if irreversible else {}
    if reach.destroys:
        one.yields("evidence", **again)
    elif irreversible:
        assert not one.run(**again).get("failed")
    else:
        assert not one.run(**again, unattended=True).get("failed")
    one.end()
    record_property("tried", one.tried + 1)


@pytest.mark.parametrize("row", ROWS, ids=helpers.name_of)
def test_too_wide_a_run_yields_to_break_glass(
    lab: Lab, row: Row, record_property: Callable[[str, object], None]
) -> None:
    """But where it would lock out everybody: that is tried as far as the plan."""
    wide = row.reach(lab).wide
    for guard, more in wide.items():
        one = Trial(lab, row)
        glasses = [*one.params.get("break_glass", []), *glass(guard)]
        if guard == "all_login_roles":
            assert one.run(check=True, **{**more, "break_glass": glasses})["outcome"] == "planned"
        else:
            result = one.run(**{**more, "break_glass": glasses})
            assert not result.get("failed"), result["msg"]
            assert guard in [entry["body"]["guard"] for entry in one.entries("override")]
        one.end()
    record_property("tried", len(wide))


def test_every_guard_that_can_be_overridden_is_tried(lab: Lab) -> None:
    tried = {guard for row in ROWS for guard in row.reach(lab).wide} | {"evidence"}
    assert {*_guards.OVERRIDABLE} - {"store"} == tried  # what is done without the store is another file's: faults


def elsewhere(params: dict[str, Any]) -> dict[str, str]:
    """The options that say where a service is, with an address that is not this machine's."""
    found = {name: "192.0.2.10" for name in ("postgresql_host", "redis_host") if name in params}
    urls = {"vault_url": "http://192.0.2.10:8200", "cloudflare_url": "http://192.0.2.10/client/v4"}
    urls |= {"proof_url": "http://192.0.2.10/proof"}
    found |= {name: url for name, url in urls.items() if name in params}
    return {
        **found,
        "case_store": "s3://cases/x?endpoint=http://192.0.2.10:9000&region=us-east-1&lock_mode=GOVERNANCE&retention_days=1",
    }


def approve(one: Trial, who: str) -> None:
    around = helpers.surroundings(one.lab, one.store, one.row.host, one.incident)
    options = {"kind": "decision", "approves": [one.row.control], "text": "go on", **around}
    control = incident_event.CONTROL
    full = helpers.complete(control, options)
    context = helpers.context_for(control, full)
    context.actor = who
    assert not _engine.execute(control, full, context).get("failed")


def test_an_unattended_run_changes_25_things_an_hour(lab: Lab) -> None:
    row = helpers.row_of("postgresql_login_lock")
    one = Trial(lab, row)
    for number in range(_decision.UNATTENDED_AN_HOUR):
        state = ("enabled", "disabled")[number % 2]
        result = one.run(state=state, unattended=True)
        assert result.get("changed"), result
    one.before = row.observe(lab)
    one.refused("unattended", "a person goes on", guard="unattended", state="disabled", unattended=True)
    assert one.run(state="disabled")["changed"]
    one.end()
