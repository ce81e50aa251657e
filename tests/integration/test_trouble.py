# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Systems that are down, runs that are partial, doubled, killed or asked for nonsense: each ends honestly."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab.client import Lab
from lab.parts.services import request
from tests import dumps
from tests.dumps import CONTAINED, contained
from tests.runs import Run, entries, extra, finish, glass, incidents, lab_in, run, start


@pytest.fixture
def own_lab(tmp_path: Path) -> Iterator[Lab]:
    with lab_in(tmp_path / "lab") as made:
        yield made


def assert_all_is_well(lab: Lab, done: Run, incident: str) -> None:
    assert done.code == 0, done.output
    assert done.incident == incident and incidents(lab) == [incident]
    assert done.open == set() and "verything is contained" in done.screen
    assert contained(lab) == set(CONTAINED)


# --- every system down; tests/truth/test_faults.py has one at a time

IMPATIENT = extra(verify_recovery_timeout=1, firebreak_evidence_patience=2)


def test_everything_down(own_lab: Lab) -> None:
    parts = ("pg1", "cache1", "vault", "cf", "ssh")
    for part in parts:
        own_lab.kill(part)
    first = run(own_lab, "data_breach", *IMPATIENT)
    assert first.code != 0, first.output
    assert first.open >= {"pg1", "cache1", "vault", "cf", "app"}, first.screen
    for part in parts:
        own_lab.start(part)
    assert_all_is_well(own_lab, run(own_lab, "data_breach"), first.incident)


# --- parts of a run


@dataclasses.dataclass
class Partial:
    """One lab, one incident, and runs that each do a part of it."""

    runs: dict[str, Run]
    dumps: dict[str, dict[str, Any]]
    contained: dict[str, set[str]]
    refreshed: dict[str, int]
    overrides: dict[str, list[dict[str, Any]]]


PARTS: dict[str, tuple[str, ...]] = {
    "limit": ("--limit", "cache1"),
    "contain": ("--tags", "contain"),
    "skip": ("--skip-tags", "preserve"),
    "contain with glass": ("--tags", "contain", *extra(firebreak_break_glass=glass("evidence"))),
    "whole": (),
}


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Partial]:
    with lab_in(tmp_path_factory.mktemp("partial") / "lab") as lab:
        told = Partial({}, {"before": dumps.everything(lab)}, {}, {}, {})
        token = {"refresh_token": lab.stolen["direct"]}
        for name, words in PARTS.items():
            told.runs[name] = run(lab, "data_breach", *words)
            told.dumps[name] = dumps.everything(lab)
            told.contained[name] = contained(lab)
            told.overrides[name] = entries(lab, kind="override")
            headers = {"Content-Type": "application/json"}
            told.refreshed[name], body = request("POST", lab.app_direct_url + "/api/auth/refresh", token, headers)
            if told.refreshed[name] == 200:
                token = {"refresh_token": body["refresh_token"]}
        yield told


def test_one_incident_through_all_parts(partial: Partial) -> None:
    assert len({done.incident for done in partial.runs.values()}) == 1
    assert {name: done.code == 0 for name, done in partial.runs.items()} == {
        "limit": False,
        "contain": False,
        "skip": False,
        "contain with glass": False,  # what was left out was not looked at
        "whole": True,
    }


def test_limit_touches_no_other_system(partial: Partial) -> None:
    done = partial.runs["limit"]
    assert partial.dumps["limit"] == partial.dumps["before"]
    assert "evidence" in done.of("redis_session_revocation")[-1]["msg"]  # nothing was exported
    assert done.open == {"cf", "cache1", "pg1", "vault", "app"}, done.screen


def test_nothing_is_revoked_before_it_is_preserved(partial: Partial) -> None:
    for name in ("contain", "skip"):
        refused = partial.runs[name].of("redis_session_revocation")[-1]["msg"]
        assert "evidence" in refused and "preserve" in refused
        assert "cache1" in partial.runs[name].open
        assert partial.refreshed[name] == 200
        assert "cache1" not in partial.contained[name]
    assert partial.overrides["skip"] == []


def test_tags_contain_only(partial: Partial) -> None:
    assert partial.contained["contain"] == {"vault", "app"}
    for part in ("roles", "configuration", "settings"):
        assert partial.dumps["contain"]["postgresql"][part] == partial.dumps["before"]["postgresql"][part]
    assert partial.dumps["contain"]["edge"] == partial.dumps["before"]["edge"]


def test_skip_tags_preserve(partial: Partial) -> None:
    assert partial.contained["skip"] == {"cf", "pg1", "vault", "app"}
    assert partial.runs["skip"].open == {"cache1", "-"}, partial.runs["skip"].screen
    assert "left out: phase preserve" in partial.runs["skip"].screen


def test_break_glass_goes_on_and_the_case_says_so(partial: Partial) -> None:
    assert "cache1" in partial.contained["contain with glass"]
    said = [
        (entry["stream"], entry["body"]["guard"], entry["body"]["reason"])
        for entry in partial.overrides["contain with glass"]
    ]
    assert said == [("cache1", "evidence", "a test")]
    assert "a test" in partial.runs["contain with glass"].screen
    assert partial.refreshed["contain with glass"] == 401


def test_the_whole_run_completes_the_parts(partial: Partial) -> None:
    assert partial.contained["whole"] == set(CONTAINED)
    assert partial.runs["whole"].open == set(), partial.runs["whole"].screen


# --- two at once


def test_two_runs_at_the_same_moment(own_lab: Lab) -> None:
    before = dumps.everything(own_lab)
    began = time.monotonic()
    both = [start(own_lab, "data_breach") for _unused in range(2)]
    done = [finish(process, record, began) for process, record in both]
    assert [each.code for each in done] == [0, 0], "\n".join(each.output for each in done if each.code)
    (incident,) = incidents(own_lab)
    assert {each.incident for each in done} == {incident}
    assert contained(own_lab) == set(CONTAINED)
    made = Counter(
        (entry["stream"], change["action"], change["target"])
        for entry in entries(own_lab, incident, "intent")
        for change in entry["body"]["changes"]
    )
    assert {change: count for change, count in made.items() if count > 1} == {}
    seen = done[0].of("incident_info")[-1]
    assert max(Counter((one["host"], one["action"], one["target"]) for one in seen["done"]).values()) == 1
    assert dumps.ask_vault(own_lab, "GET", "secret/metadata/app/backend")["data"]["current_version"] == 2
    rules = [rule for ruleset in dumps.edge(own_lab)["rulesets"] for rule in ruleset["rules"]]
    assert sum("firebreak" in rule["ref"] for rule in rules) == 1
    assert run(own_lab, "release", *extra(firebreak_incident_id=incident)).code == 0
    assert dumps.but_for_what_is_final(dumps.everything(own_lab), before) == dumps.but_for_what_is_final(before, before)


# --- bad input


@pytest.fixture(scope="module")
def quiet_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab_in(tmp_path_factory.mktemp("quiet") / "lab") as made:
        yield made


OFF_LOOPBACK = "s3://cases?endpoint=http://192.0.2.1:9000&lock_mode=GOVERNANCE&retention_days=1"
BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown incident": ({"firebreak_incident_id": "INC-2026-0101-999"}, ["INC-2026-0101-999", "firebreak_incident_id", "case_store"]),
    "no id at all": ({"firebreak_incident_id": "../../etc"}, ["firebreak_incident_id"]),
    "nobody affected": ({"firebreak_affected": []}, ["firebreak_affected", "empty"]),
    "unknown host": ({"firebreak_affected": ["pg1", "pg9"]}, ["firebreak_affected", "pg9"]),
    "yesterday's glass": ({"firebreak_break_glass": glass("all_sessions", day=-1)}, ["break_glass", "all_sessions", "-e"]),
    "glass without a reason": ({"firebreak_break_glass": [{**glass("all_sessions")[0], "reason": " "}]}, ["break_glass", "reason"]),
    "severity": ({"firebreak_severity": "SEV-9"}, ["severity", "SEV-1"]),
    "round": ({"firebreak_round": 7}, ["round"]),
    "store that is no address": ({"firebreak_case_store": "cases"}, ["case_store", "file:///"]),
    "store without lock mode": ({"firebreak_case_store": "s3://cases/x"}, ["case_store", "lock_mode"]),
    "store nowhere": ({"firebreak_case_store": "file:///proc/firebreak"}, ["case_store", "/proc/firebreak"]),
    "off loopback": ({"firebreak_case_store": OFF_LOOPBACK}, ["site", "loopback"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_option_and_remedy_and_touches_nothing(quiet_lab: Lab, name: str) -> None:
    values, words = BAD[name]
    assert_refused(quiet_lab, words, *extra(**values))


def assert_refused(lab: Lab, words: list[str], *options: str, **more: Any) -> None:
    before = dumps.everything(lab)
    done = run(lab, "data_breach", *options, **more)
    assert done.code != 0, done.output
    told = " ".join(str(line["result"].get("msg", "")) for line in done.results if line["event"] == "failed")
    assert [word for word in words if word not in told] == [], told or done.output
    assert "Traceback" not in done.output and "unexpected" not in told
    assert dumps.everything(lab) == before
    assert entries(lab, kind="intent") == []


def test_a_file_stands_where_the_store_should_be(quiet_lab: Lab, tmp_path: Path) -> None:
    place = tmp_path / "cases"
    place.write_text("somebody's")
    assert_refused(quiet_lab, ["case_store", str(place)], *extra(firebreak_case_store=f"file://{place}"))
    assert place.read_text() == "somebody's"


def test_an_inventory_without_a_site(quiet_lab: Lab, tmp_path: Path) -> None:
    content = yaml.safe_load(quiet_lab.inventory_path.read_text())
    del content["all"]["vars"]["firebreak_site"]
    inventory = tmp_path / "inventory.yml"
    inventory.write_text(yaml.safe_dump(content))
    assert_refused(quiet_lab, ["site", "firebreak_site"], inventory=inventory)


def test_what_only_one_system_can_refuse_keeps_no_other_back(own_lab: Lab) -> None:
    """A malformed network and a wrong token: known before the first change, told with the option, and nobody else waits."""
    wrong = "wrong-token-of-somebody"
    bad = extra(firebreak_block_addresses=["198.51.100.0/33"], firebreak_vault_token=wrong)
    done = run(own_lab, "data_breach", *bad, *IMPATIENT)
    assert done.code != 0
    assert contained(own_lab) == {"pg1", "cache1"}
    assert done.open >= {"cf", "vault"}, done.screen
    edge_text = " ".join(result["msg"] for result in done.of("cloudflare_ip_list"))
    vault_text = " ".join(result["msg"] for result in done.of("vault_kv_rotation"))
    assert "198.51.100.0/33" in edge_text and "items" in edge_text
    assert "vault_token" in vault_text and wrong not in done.output
    first = done.output.index("198.51.100.0/33")
    assert first < done.output.index("PLAY [Data breach | Fence")
    corrected = run(own_lab, "data_breach")
    assert_all_is_well(own_lab, corrected, done.incident)
