# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The double of Cloudflare, held to the SDK's own types where these check anything, and to a table of answers else."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from cloudflare import Cloudflare

from tests.contract.cloudflare_edge import ACCOUNT, ROOT, TOKEN, ZONE, Edge, edge, free_port

PHASE = "http_request_firewall_custom"
RULES = f"/zones/{ZONE}/rulesets"
LISTS = f"/accounts/{ACCOUNT}/rules/lists"
NOWHERE = "f" * 32
BLOCK = {"action": "block", "expression": "ip.src in $scanners"}


@pytest.fixture(scope="module")
def running() -> Iterator[Edge]:
    with edge() as started:
        yield started


@pytest.fixture
def cf(running: Edge) -> Edge:
    running.lab("POST", "settings", {"plan": "enterprise", "delay": 0.02})
    running.lab("POST", "reset?rules=3&entries=3")
    return running


def entry_point(cf: Edge) -> dict[str, Any]:
    return cf.call("GET", f"{RULES}/phases/{PHASE}/entrypoint")[1]["result"]


def list_id(cf: Edge, name: str = "scanners") -> str:
    return next(each["id"] for each in cf.call("GET", LISTS)[1]["result"] if each["name"] == name)


def finish(cf: Edge, operation: str) -> dict[str, Any]:
    for _attempt in range(100):
        state = cf.call("GET", f"{LISTS}/bulk_operations/{operation}")[1]["result"]
        if state["status"] in ("completed", "failed"):
            return state
        time.sleep(0.02)
    raise TimeoutError


# The SDK in strict mode refuses an answer that its types do not describe.


def test_every_read_satisfies_the_types_of_the_sdk(cf: Edge) -> None:
    strict = Cloudflare(api_token=TOKEN, base_url=cf.url, max_retries=0, _strict_response_validation=True)
    ruleset = entry_point(cf)
    scanners = list_id(cf)
    operation = cf.call("POST", f"{LISTS}/{scanners}/items", [{"ip": "192.0.2.9"}])[1]["result"]["operation_id"]
    finish(cf, operation)
    assert strict.user.tokens.verify().status == "active"
    assert [each.phase for each in strict.rulesets.list(zone_id=ZONE)] == [PHASE]
    assert len(strict.rulesets.phases.get(PHASE, zone_id=ZONE).rules or []) == 3
    assert strict.rulesets.get(ruleset["id"], zone_id=ZONE).version == "1"
    assert [each.version for each in strict.rulesets.versions.list(ruleset["id"], zone_id=ZONE)] == ["1"]
    assert strict.rulesets.versions.get("1", zone_id=ZONE, ruleset_id=ruleset["id"]).kind == "zone"
    assert {each.name for each in strict.rules.lists.list(account_id=ACCOUNT)} == {"office", "scanners"}
    assert strict.rules.lists.get(scanners, account_id=ACCOUNT).num_items == 4
    items = list(strict.rules.lists.items.list(scanners, account_id=ACCOUNT))
    assert len(items) == 4
    assert strict.rules.lists.items.get(items[0].id, account_id=ACCOUNT, list_id=scanners).ip == items[0].ip
    done = strict.rules.lists.bulk_operations.get(operation, account_id=ACCOUNT)
    assert done.status == "completed"


def test_after_every_write_of_the_sdk_the_object_reads_back_in_strict_mode(cf: Edge) -> None:
    strict = Cloudflare(api_token=TOKEN, base_url=cf.url, max_retries=0, _strict_response_validation=True)
    ruleset = entry_point(cf)["id"]
    added: Any = strict.rulesets.rules.create(ruleset, zone_id=ZONE, **BLOCK, ref="mine")
    rule = added["rules"][-1]["id"]
    strict.rulesets.rules.edit(rule, zone_id=ZONE, ruleset_id=ruleset, **BLOCK, enabled=False, ref="mine")
    assert [each.ref for each in strict.rulesets.get(ruleset, zone_id=ZONE).rules or []][-1] == "mine"
    strict.rulesets.rules.delete(rule, zone_id=ZONE, ruleset_id=ruleset)
    made = strict.rules.lists.create(account_id=ACCOUNT, kind="ip", name="made")
    finish(cf, strict.rules.lists.items.create(made.id, account_id=ACCOUNT, body=[{"ip": "192.0.2.9"}]).operation_id)
    item = next(iter(strict.rules.lists.items.list(made.id, account_id=ACCOUNT))).id
    finish(cf, strict.rules.lists.items.delete(made.id, account_id=ACCOUNT, items=[{"id": item}]).operation_id)
    strict.rules.lists.delete(made.id, account_id=ACCOUNT)
    assert {each["name"] for each in cf.call("GET", LISTS)[1]["result"]} == {"office", "scanners"}


# A table of requests: (method, path, body, status, codes). {r}: the ruleset, {u}: its first rule, {l}: the list scanners.

TABLE: list[tuple[str, str, Any, int, list[int]]] = [
    ("GET", "/user/tokens/verify", None, 200, []),
    ("GET", f"/accounts/{ACCOUNT}/tokens/verify", None, 200, []),
    ("GET", f"/zones/{ZONE}", None, 200, []),
    ("GET", f"/zones/{NOWHERE}/rulesets", None, 403, [10000]),
    ("GET", "/zones/short/rulesets", None, 404, [7003, 7000]),
    ("GET", f"/zones/{ZONE}/nothing", None, 404, [7003, 7000]),
    ("GET", f"{RULES}/phases/http_ratelimit/entrypoint", None, 404, [10003]),
    ("GET", f"{RULES}/{NOWHERE}", None, 404, [10003]),
    ("GET", f"/accounts/{ACCOUNT}/rulesets/{{r}}", None, 404, [10003]),
    ("PUT", f"{RULES}/phases/{PHASE}/entrypoint", {"kind": "zone", "rules": []}, 400, [20104]),
    ("POST", RULES, {"name": "x", "kind": "zone", "phase": PHASE}, 400, [20217]),
    ("POST", RULES, {"name": "x", "kind": "root", "phase": PHASE}, 400, [20119]),
    ("POST", f"{RULES}/{{r}}/rules", {**BLOCK, "colour": "red"}, 400, [20104]),
    ("POST", f"{RULES}/{{r}}/rules", {**BLOCK, "ref": "terraform_1"}, 400, [20217]),
    ("POST", f"{RULES}/{{r}}/rules", {**BLOCK, "action": "teleport"}, 400, [20016]),
    ("POST", f"{RULES}/{{r}}/rules", {**BLOCK, "action": "skip"}, 400, [20125]),
    ("POST", f"{RULES}/{{r}}/rules", {**BLOCK, "expression": ""}, 400, [20125]),
    ("POST", f"{RULES}/{{r}}/rules", {**BLOCK, "expression": "ip.src in"}, 400, [20127]),
    ("POST", f"{RULES}/{{r}}/rules", {**BLOCK, "expression": "ip.src in $unknown"}, 400, [20127]),
    ("POST", f"{RULES}/{{r}}/rules", {**BLOCK, "expression": f'http.host eq "{"x" * 4096}"'}, 400, [20127]),
    ("POST", f"{RULES}/{{r}}/rules", {**BLOCK, "position": {"index": 0}}, 400, [20104]),
    ("POST", f"{RULES}/{{r}}/rules", {**BLOCK, "position": {"before": "", "after": ""}}, 400, [20104]),
    ("POST", f"{RULES}/{{r}}/rules?dry_run=maybe", BLOCK, 400, [20104]),
    ("POST", f"{RULES}/{{r}}/rules", None, 400, [10026]),
    ("PATCH", f"{RULES}/{{r}}/rules/{{u}}", {"enabled": False}, 400, [20016]),
    ("PATCH", f"{RULES}/{{r}}/rules/{NOWHERE}", BLOCK, 404, [10003]),
    ("DELETE", f"{RULES}/{{r}}/rules/{NOWHERE}", None, 404, [10003]),
    ("GET", f"{LISTS}/{NOWHERE}", None, 404, [10001]),
    ("POST", LISTS, {"name": "Not-A-Name", "kind": "ip"}, 400, [10026]),
    ("POST", LISTS, {"name": "office", "kind": "ip"}, 409, [10019]),
    ("POST", f"{LISTS}/{{l}}/items", [{"ip": "192.0.2.999"}], 400, [10026]),
    ("POST", f"{LISTS}/{{l}}/items", [{"ip": "10.0.0.0/7"}], 400, [10028]),
    ("POST", f"{LISTS}/{{l}}/items", {"ip": "192.0.2.1"}, 400, [10026]),
    ("DELETE", f"{LISTS}/{{l}}/items", {"items": ["192.0.2.1"]}, 400, [10026]),
    ("DELETE", f"{LISTS}/{{l}}/items", {"items": [{"id": NOWHERE}]}, 400, [10027]),
    ("GET", f"{LISTS}/{{l}}/items?per_page=501", None, 400, [10026]),
    ("DELETE", f"{LISTS}/{{l}}", None, 400, [10031]),
    ("GET", f"{LISTS}/bulk_operations/{NOWHERE}", None, 404, [10001]),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "codes"), TABLE)
def test_answers(cf: Edge, method: str, path: str, body: Any, status: int, codes: list[int]) -> None:
    before, ruleset = cf.lab("GET", "dump"), entry_point(cf)
    path = path.replace("{r}", ruleset["id"]).replace("{u}", ruleset["rules"][0]["id"]).replace("{l}", list_id(cf))
    got, envelope = cf.call(method, path, body)
    assert (got, [error["code"] for error in envelope["errors"]]) == (status, codes)
    assert envelope["success"] == (status == 200)
    assert {"result", "messages"} <= set(envelope)
    assert cf.lab("GET", "dump") == before


@pytest.mark.parametrize(
    ("authorization", "path", "status", "code"),
    [
        (None, RULES, 400, 6003),
        ("Bearer a\tb", RULES, 400, 6003),
        ("Basic abc", RULES, 400, 6003),
        ("Bearer another", RULES, 403, 10000),
        ("Bearer another", "/user/tokens/verify", 401, 1000),
        ("Bearer another", "/zones/short/rulesets", 403, 10000),
    ],
)
def test_the_token_comes_first(cf: Edge, authorization: str | None, path: str, status: int, code: int) -> None:
    got, envelope = cf.call("GET", path, token=authorization)
    assert (got, envelope["errors"][0]["code"]) == (status, code)


def test_limits_are_told_with_every_answer(cf: Edge) -> None:
    _status, headers, _body = cf.raw("GET", f"/client/v4{RULES}")
    assert "Ratelimit" in headers
    assert "Retry-After" not in headers


# State


def test_rules_have_positions_versions_and_refs(cf: Edge) -> None:
    one = entry_point(cf)
    where = f"{RULES}/{one['id']}/rules"
    two = cf.call("POST", where, {**BLOCK, "ref": "first", "position": {"before": ""}})[1]["result"]
    assert [rule["ref"] for rule in two["rules"]] == ["first", "terraform_0", "terraform_1", "terraform_2"]
    assert two["version"] == "2"
    assert two["rules"][1:] == one["rules"]
    mine = two["rules"][0]
    moved = cf.call("PATCH", f"{where}/{mine['id']}", {"position": {"after": one["rules"][0]["id"]}})[1]["result"]
    assert [rule["ref"] for rule in moved["rules"]][:2] == ["terraform_0", "first"]
    assert moved["rules"][1] == mine
    edited = cf.call("PATCH", f"{where}/{mine['id']}", {**BLOCK, "action": "managed_challenge"})[1]["result"]["rules"][
        1
    ]
    assert (edited["id"], edited["ref"], edited["version"]) == (mine["id"], "first", "2")
    gone = cf.call("DELETE", f"{where}/{mine['id']}")[1]["result"]
    assert gone["rules"] == one["rules"]
    assert gone["version"] == "5"
    _status, history = cf.call("GET", f"{RULES}/{one['id']}/versions")
    assert [each["version"] for each in history["result"]] == ["1", "2", "3", "4", "5"]


def test_a_put_keeps_ids_by_ref_only(cf: Edge) -> None:
    one = entry_point(cf)
    kept = [{"ref": "terraform_1", **BLOCK, "description": "scanners"}, {**BLOCK, "description": "new"}]
    two = cf.call("PUT", f"{RULES}/phases/{PHASE}/entrypoint", {"rules": kept})[1]["result"]
    assert two["rules"][0] == one["rules"][1]
    assert two["rules"][1]["id"] not in {rule["id"] for rule in one["rules"]}
    assert two["rules"][1]["ref"] == two["rules"][1]["id"]


def test_a_dry_run_checks_all_and_changes_nothing(cf: Edge) -> None:
    before, ruleset = cf.lab("GET", "dump"), entry_point(cf)
    where, rule = f"{RULES}/{ruleset['id']}/rules", ruleset["rules"][0]["id"]
    for method, path, body in [
        ("POST", where, BLOCK),
        ("PATCH", f"{where}/{rule}", BLOCK),
        ("DELETE", f"{where}/{rule}", None),
    ]:
        status, envelope = cf.call(method, f"{path}?dry_run=true", body)
        assert (status, envelope["result"], envelope["success"]) == (200, None, True)
    assert cf.raw("DELETE", f"/client/v4{RULES}/{ruleset['id']}?dry_run=true")[0] == 204
    assert cf.call("POST", f"{where}?dry_run=true", {**BLOCK, "expression": "x"})[0] == 400
    assert cf.lab("GET", "dump") == before


def test_plans_limit_rules_actions_and_entries(cf: Edge) -> None:
    cf.lab("POST", "settings", {"plan": "free"})
    where = f"{RULES}/{entry_point(cf)['id']}/rules"
    assert cf.call("POST", where, {**BLOCK, "action": "log"})[0] == 400
    assert [cf.call("POST", where, BLOCK)[0] for _number in range(3)] == [200, 200, 400]
    items = [{"ip": f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}"} for n in range(10_001)]
    status, envelope = cf.call("POST", f"{LISTS}/{list_id(cf)}/items", items)
    assert status == 200
    done = finish(cf, envelope["result"]["operation_id"])
    assert (done["status"], done["error"]) == ("failed", "This list is at the maximum number of items")
    assert len(cf.entries("scanners")) == 3


def test_list_writes_come_later_one_at_a_time(cf: Edge) -> None:
    cf.lab("POST", "settings", {"delay": 0.3})
    where = f"{LISTS}/{list_id(cf)}/items"
    _status, first = cf.call("POST", where, [{"ip": "2001:DB8::1/128", "comment": "one"}, {"ip": "192.0.2.77/24"}])
    assert "192.0.2.0/24" not in cf.entries("scanners")
    assert cf.call("POST", where, [{"ip": "192.0.2.1"}])[0] == 429
    assert finish(cf, first["result"]["operation_id"])["status"] == "completed"
    known = cf.entries("scanners")
    assert (known["2001:db8::1"], known["192.0.2.0/24"]) == ("one", None)
    assert cf.call("POST", where, [{"ip": "2001:db8::1", "comment": "two"}])[0] == 200


def test_a_second_post_of_a_value_replaces_its_comment(cf: Edge) -> None:
    where = f"{LISTS}/{list_id(cf)}/items"
    value = next(iter(cf.entries("scanners")))
    finish(cf, cf.call("POST", where, [{"ip": value, "comment": "overwritten"}])[1]["result"]["operation_id"])
    assert cf.entries("scanners")[value] == "overwritten"
    assert len(cf.entries("scanners")) == 3


def test_pages_of_a_list_have_cursors(cf: Edge) -> None:
    cf.lab("POST", "reset?rules=3&entries=60")
    where, seen, cursor = f"{LISTS}/{list_id(cf)}/items", [], ""
    while True:
        _status, page = cf.call("GET", f"{where}?cursor={cursor}")
        seen += [item["ip"] for item in page["result"]]
        cursor = page["result_info"]["cursors"].get("after")
        if not cursor:
            break
        assert len(page["result"]) == 25
    assert len(seen) == len(set(seen)) == 60


# Faults


def test_a_lost_write_had_its_effect_or_not_as_asked(cf: Edge) -> None:
    where = f"{RULES}/{entry_point(cf)['id']}/rules"
    for after, added in ((False, 0), (True, 1)):
        before = len(cf.rules())
        cf.lab("POST", "faults", [{"kind": "drop", "nth": 1, "after": after}])
        with pytest.raises((http.client.HTTPException, OSError)):
            cf.call("POST", where, BLOCK)
        assert len(cf.rules()) == before + added
    assert cf.call("POST", where, BLOCK)[0] == 200


def test_faults_of_every_kind(cf: Edge) -> None:
    asked: list[dict[str, Any]] = [
        {"kind": "429", "retry_after": "300"},
        {"kind": "500"},
        {"kind": "502"},
        {"kind": "unsuccessful"},
        {"kind": "slow", "seconds": 0.2},
    ]
    # A fault that strikes hides the request from those behind it: they come one after the other.
    cf.lab("POST", "faults", [{**each, "on": "reads"} for each in asked])
    answers = []
    for _number in asked:
        begun = time.monotonic()
        status, headers, body = cf.raw("GET", f"/client/v4{RULES}")
        answers.append((status, headers.get("Retry-After"), b'"success": true' in body, time.monotonic() - begun > 0.2))
    assert answers[:4] == [
        (429, "300", False, False),
        (500, None, False, False),
        (502, None, False, False),
        (200, None, False, False),
    ]
    assert answers[4] == (200, None, True, True)
    assert cf.lab("GET", "faults") == []


def test_another_writer_comes_between_a_read_and_a_write(cf: Edge) -> None:
    ruleset = entry_point(cf)
    cf.lab("POST", "foreign", {"when": "before_write"})
    assert entry_point(cf) == ruleset
    after = cf.call("POST", f"{RULES}/{ruleset['id']}/rules", BLOCK)[1]["result"]
    assert (len(after["rules"]), after["version"]) == (5, "3")


def test_the_log_holds_requests_and_no_token(cf: Edge) -> None:
    cf.lab("DELETE", "log")
    cf.call("POST", LISTS, {"name": "logged", "kind": "ip"})
    log = cf.lab("GET", "log")
    assert [(each["method"], each["body"]["name"], each["status"]) for each in log] == [("POST", "logged", 200)]
    assert TOKEN not in str(log)


# The proxy


def test_visitors_have_documentation_addresses(cf: Edge) -> None:
    pairs = {
        "127.0.2.7": "192.0.2.7",
        "127.66.0.66": "198.51.100.66",
        "127.0.113.9": "203.0.113.9",
        "127.0.0.1": "127.0.0.1",
    }
    for source, address in pairs.items():
        status, _headers, body = cf.visit(source, "/x?y=1", **{"CF-Connecting-IP": "192.0.2.254"})
        assert status == 200
        assert f'"address": ["{address}"]'.encode() in body
        assert b'"path": "/x?y=1"' in body
    status, _headers, body = cf.visit("127.0.2.7", "/p", "POST")
    assert (status, b'"body": "body"' in body) == (201, True)


@pytest.mark.parametrize(
    ("rule", "thief", "user"),
    [
        ({"action": "block", "expression": "ip.src in {198.51.100.0/24}"}, 403, 200),
        ({"action": "managed_challenge", "expression": 'ip.src.country eq "T1"'}, 403, 200),
        ({"action": "js_challenge", "expression": 'starts_with(http.request.uri.path, "/a")'}, 403, 403),
        ({"action": "log", "expression": "true"}, 200, 200),
        ({"action": "block", "expression": "true", "enabled": False}, 200, 200),
    ],
)
def test_rules_are_in_force_at_once(cf: Edge, rule: dict[str, Any], thief: int, user: int) -> None:
    cf.call("POST", f"{RULES}/{entry_point(cf)['id']}/rules", {**rule, "position": {"before": ""}})
    status, headers, _body = cf.visit("127.66.0.66", "/a")
    assert (status, cf.visit("127.0.2.7", "/a")[0]) == (thief, user)
    assert (headers.get("Cf-Mitigated") == "challenge") == ("challenge" in rule["action"])


def test_the_first_rule_that_ends_a_request_decides(cf: Edge) -> None:
    where = f"{RULES}/{entry_point(cf)['id']}/rules"
    cf.call("POST", where, {"action": "block", "expression": "true", "ref": "all"})
    assert cf.visit("127.0.113.9")[0] == 200  # the seeded rule for the office stands before it, and skips the rest
    assert cf.visit("127.0.2.7")[0] == 403


def test_without_an_application_the_edge_answers_502_and_ends_when_told() -> None:
    given = Edge(free_port(), free_port())
    command = [
        sys.executable,
        "-m",
        "lab.doubles.cloudflare",
        "--port",
        str(given.api),
        "--proxy-port",
        str(given.proxy),
    ]
    command += ["--account-id", ACCOUNT, "--zone-id", ZONE, "--origin", f"http://127.0.0.1:{free_port()}"]
    environment = {**os.environ, "LAB_CLOUDFLARE_TOKEN": TOKEN}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    assert given.visit("127.0.2.7")[0] == 502
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 0


def test_it_ends_with_its_parent() -> None:
    port = free_port()
    command = [sys.executable, "-m", "lab.doubles.cloudflare", "--port", str(port), "--proxy-port", str(free_port())]
    command += ["--origin", "http://127.0.0.1:1", "--account-id", ACCOUNT, "--zone-id", ZONE]
    program = f"import subprocess, time\nsubprocess.Popen({command!r})\ntime.sleep(60)"
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "LAB_CLOUDFLARE_TOKEN": TOKEN},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    parent.wait()
    for _attempt in range(100):
        try:
            Edge(port, 0).call("GET", "/user/tokens/verify")
        except OSError:
            return
        time.sleep(0.02)
    pytest.fail("the double outlives its parent")
