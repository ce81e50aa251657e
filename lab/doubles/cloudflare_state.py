# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the Cloudflare double knows: rulesets of custom rules and account lists, with the service's own strictness.

Codes and texts of errors are those that users of the service report; ``20127``, the code of an unknown field and that of
a repeated ``ref`` are guesses: clients must not depend on them.
"""

from __future__ import annotations

import copy
import datetime
import ipaddress
import re
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from lab.expression import Expression, ExpressionError, Networks

PHASE = "http_request_firewall_custom"
PHASES = {PHASE, "http_ratelimit", "http_request_firewall_managed", "http_request_cache_settings"}
ACTIONS = {"block", "challenge", "js_challenge", "managed_challenge", "log", "skip"}
RULE_FIELDS = {"action", "action_parameters", "description", "enabled", "expression", "id", "logging", "ref"}
RULESET_FIELDS = {"name", "description", "rules"}
RULES = {"free": 5, "pro": 20, "business": 100, "enterprise": 1000}
ITEMS = {"free": 10_000, "pro": 10_000, "business": 10_000, "enterprise": 500_000}
LISTS = {"free": 1, "pro": 10, "business": 10, "enterprise": 1000}
PAGE, LONGEST_PAGE = 25, 500

Json = dict[str, Any]


class ApiError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, code: int, message: str, pointer: str = "", **more: Any) -> None:
        super().__init__(message)
        self.status = status
        error: Json = {"code": code, "message": message, **more}
        if pointer:
            error["source"] = {"pointer": pointer}
        self.errors = [error]


def new_id() -> str:
    return uuid.uuid4().hex


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def refuse_unknown(body: Json, known: set[str]) -> None:
    for field in body:
        if field not in known:
            raise ApiError(400, 20104, f"invalid JSON: unknown field {field}")


class Edge:
    """The state of one account with one zone. Every public method is one request, made under the lock."""

    def __init__(self, account: str, zone: str, plan: str = "enterprise", delay: float = 0.02) -> None:
        self.account, self.zone, self.plan, self.delay = account, zone, plan, delay
        self.lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        with self.lock:
            self._rulesets: dict[str, Json] = {}
            self._scopes: dict[str, str] = {}
            self._history: dict[str, dict[str, Json]] = {}
            self._expressions: dict[str, Expression] = {}
            self._lists: dict[str, Json] = {}
            self._items: dict[str, dict[str, Json]] = {}
            self._networks: dict[str, Networks] = {}
            self._operations: dict[str, Json] = {}
            self._work: dict[str, tuple[float, Callable[[], str | None]]] = {}

    # Rulesets

    def rulesets(self, scope: str) -> list[Json]:
        return [{k: v for k, v in each.items() if k != "rules"} for each in self._of(scope)]

    def entry_point(self, scope: str, phase: str) -> Json:
        if phase not in PHASES:
            raise ApiError(400, 20120, f"unknown phase {phase}")
        for ruleset in self._of(scope):
            if ruleset["phase"] == phase:
                return self._shown(ruleset)
        raise ApiError(404, 10003, f"could not find entrypoint ruleset in the {phase} phase")

    def ruleset(self, scope: str, ruleset_id: str) -> Json:
        return self._shown(self._ruleset(scope, ruleset_id))

    def versions(self, scope: str, ruleset_id: str) -> list[Json]:
        self._ruleset(scope, ruleset_id)
        return [{k: v for k, v in each.items() if k != "rules"} for each in self._history[ruleset_id].values()]

    def version(self, scope: str, ruleset_id: str, version: str) -> Json:
        self._ruleset(scope, ruleset_id)
        if version not in self._history[ruleset_id]:
            raise ApiError(404, 10003, f"could not find version {version} of ruleset {ruleset_id}")
        return copy.deepcopy(self._history[ruleset_id][version])

    def create_ruleset(self, scope: str, body: Json, dry: bool) -> Json | None:
        refuse_unknown(body, RULESET_FIELDS | {"kind", "phase"})
        kind = "zone" if scope.startswith("zones/") else "root"
        if not body.get("name"):
            raise ApiError(400, 20118, "'' is not a valid value for name because it cannot be blank", "/name")
        if body.get("kind") != kind:
            raise ApiError(400, 20119, f"'{body.get('kind')}' is not a valid value for kind", "/kind")
        if body.get("phase") != PHASE:
            raise ApiError(400, 20120, f"'{body.get('phase')}' is not a valid value for phase", "/phase")
        if any(each["phase"] == PHASE for each in self._of(scope)):
            reason = f"exceeded maximum number of zone rulesets for phase {PHASE}"
            raise ApiError(400, 20217, f"'{kind}' is not a valid value for kind because {reason}", "/kind")
        return self._write(scope, self._new_ruleset(body, kind), self._rules(body.get("rules", []), []), dry)

    def put_entry_point(self, scope: str, phase: str, body: Json, dry: bool) -> Json | None:
        refuse_unknown(body, RULESET_FIELDS)
        try:
            known = self.entry_point(scope, phase)
        except ApiError as error:
            if error.status != 404:
                raise
            kind = "zone" if scope.startswith("zones/") else "root"
            known = self._new_ruleset({"name": "default", "phase": phase, **body}, kind)
        return self._replace(scope, known, body, dry)

    def put_ruleset(self, scope: str, ruleset_id: str, body: Json, dry: bool) -> Json | None:
        refuse_unknown(body, RULESET_FIELDS | {"kind", "phase"})
        return self._replace(scope, self.ruleset(scope, ruleset_id), body, dry)

    def delete_ruleset(self, scope: str, ruleset_id: str, dry: bool) -> None:
        self._ruleset(scope, ruleset_id)
        if not dry:
            del self._rulesets[ruleset_id], self._history[ruleset_id], self._scopes[ruleset_id]

    def add_rule(self, scope: str, ruleset_id: str, body: Json, dry: bool) -> Json | None:
        ruleset = self.ruleset(scope, ruleset_id)
        fields = {key: value for key, value in body.items() if key != "position"}
        rule = self._rule(fields, None, "")
        rules = self._together([*ruleset["rules"], rule])
        return self._write(scope, ruleset, _moved(rules, rule, body.get("position", {"after": ""})), dry)

    def edit_rule(self, scope: str, ruleset_id: str, rule_id: str, body: Json, dry: bool) -> Json | None:
        ruleset = self.ruleset(scope, ruleset_id)
        index = self._index(ruleset, rule_id)
        fields = {key: value for key, value in body.items() if key not in ("position", "id")}
        rules = ruleset["rules"]
        rule = self._rule({"ref": rules[index]["ref"], **fields}, rules[index], "") if fields else rules[index]
        rules = self._together([*rules[:index], rule, *rules[index + 1 :]])
        return self._write(scope, ruleset, _moved(rules, rule, body["position"]) if "position" in body else rules, dry)

    def delete_rule(self, scope: str, ruleset_id: str, rule_id: str, dry: bool) -> Json | None:
        ruleset = self.ruleset(scope, ruleset_id)
        index = self._index(ruleset, rule_id)
        return self._write(scope, ruleset, ruleset["rules"][:index] + ruleset["rules"][index + 1 :], dry)

    def _of(self, scope: str) -> list[Json]:
        return [each for each in self._rulesets.values() if self._scopes[each["id"]] == scope]

    def _ruleset(self, scope: str, ruleset_id: str) -> Json:
        found = self._rulesets.get(ruleset_id)
        if found is None or self._scopes[ruleset_id] != scope:
            raise ApiError(404, 10003, f"could not find ruleset {ruleset_id}")
        return found

    @staticmethod
    def _index(ruleset: Json, rule_id: str) -> int:
        for index, rule in enumerate(ruleset["rules"]):
            if rule["id"] == rule_id:
                return index
        raise ApiError(404, 10003, f"could not find rule {rule_id}")

    @staticmethod
    def _shown(ruleset: Json) -> Json:
        return {**copy.deepcopy(ruleset), "rules": copy.deepcopy(ruleset.get("rules", []))}

    @staticmethod
    def _new_ruleset(body: Json, kind: str) -> Json:
        return {
            "id": new_id(),
            "name": body["name"],
            "description": body.get("description", ""),
            "kind": kind,
            "phase": body["phase"],
            "version": "0",
            "last_updated": "",
            "rules": [],
        }

    def _replace(self, scope: str, known: Json, body: Json, dry: bool) -> Json | None:
        rules = self._rules(body["rules"], known["rules"]) if "rules" in body else known["rules"]
        return self._write(scope, {**known, "description": body.get("description", known["description"])}, rules, dry)

    def _rules(self, given: Any, known: list[Json]) -> list[Json]:
        """Whole rules from given ones: a known ref keeps its id, an unchanged rule its version."""
        if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
            raise ApiError(400, 20104, "invalid JSON: rules is not a list of objects", "/rules")
        by_ref = {rule["ref"]: rule for rule in known}
        return self._together(
            [
                self._rule(each, by_ref.get(each.get("ref", each.get("id", ""))), f"/rules/{index}")
                for index, each in enumerate(given)
            ]
        )

    def _together(self, rules: list[Json]) -> list[Json]:
        if len(rules) > RULES[self.plan]:
            raise ApiError(400, 20217, f"exceeded maximum number of rules in the phase {PHASE}", "/rules")
        refs = [rule["ref"] for rule in rules]
        if len(set(refs)) < len(refs):
            raise ApiError(400, 20217, "the ref of a rule is not unique in its ruleset", "/ref")
        return rules

    def _rule(self, given: Json, known: Json | None, where: str) -> Json:
        fields = {key: value for key, value in given.items() if key not in ("version", "last_updated")}
        refuse_unknown(fields, RULE_FIELDS)
        self._check_action(fields, where)
        self._check_expression(fields, where)
        if not isinstance(fields.get("enabled", True), bool):
            raise ApiError(400, 20104, "invalid JSON: enabled is not a boolean", f"{where}/enabled")
        if fields.get("ref") == "":
            raise ApiError(400, 20118, "'' is not a valid value for ref because it cannot be blank", f"{where}/ref")
        rule_id = known["id"] if known else new_id()
        rule = {"enabled": True, "description": "", "ref": rule_id, **fields, "id": rule_id}
        kept = {key: value for key, value in (known or {}).items() if key not in ("version", "last_updated")}
        if rule == kept:
            return copy.deepcopy(known or {})
        return {**rule, "version": str(int(known["version"]) + 1 if known else 1), "last_updated": now()}

    def _check_action(self, fields: Json, where: str) -> None:
        action = fields.get("action")
        if not action and "action_parameters" in fields:
            raise ApiError(400, 20125, "action is required for action parameters", f"{where}/action")
        if action not in ACTIONS or (action == "log" and self.plan != "enterprise"):
            reason = (
                f"'{action}' is not a valid value for action because the action is not allowed in the phase {PHASE}"
            )
            raise ApiError(400, 20016, reason, f"{where}/action")
        if action == "skip" and not fields.get("action_parameters"):
            raise ApiError(400, 20125, "action parameters are required for action skip", f"{where}/action_parameters")

    def _check_expression(self, fields: Json, where: str) -> None:
        text = fields.get("expression", "")
        pointer = f"{where}/expression"
        if not isinstance(text, str) or not text.strip():
            reason = "'' is not a valid value for expression because the expression cannot be blank"
            raise ApiError(400, 20125, reason, pointer)
        try:
            parsed = Expression(text)
        except ExpressionError as error:
            reason = (
                f"could not parse filter expression: Filter parsing error (1:{error.position + 1}): {text} ^^^ {error}"
            )
            raise ApiError(
                400, 20127, f"'{text}' is not a valid value for expression because {reason}", pointer
            ) from None
        known = {each["name"] for each in self._lists.values()}
        for name in parsed.lists - known:
            raise ApiError(
                400, 20127, f"'{text}' is not a valid value for expression because list ${name} is unknown", pointer
            )

    def _write(self, scope: str, ruleset: Json, rules: list[Json], dry: bool) -> Json | None:
        if dry:
            return None
        written = {**ruleset, "rules": rules, "version": str(int(ruleset["version"]) + 1), "last_updated": now()}
        self._rulesets[written["id"]] = written
        self._scopes[written["id"]] = scope
        self._history.setdefault(written["id"], {})[written["version"]] = copy.deepcopy(written)
        for rule in rules:
            self._expressions.setdefault(rule["expression"], Expression(rule["expression"]))
        return self._shown(written)

    # Lists

    def lists(self) -> list[Json]:
        return [self._described(list_id) for list_id in self._lists]

    def account_list(self, list_id: str) -> Json:
        if list_id not in self._lists:
            raise ApiError(404, 10001, "filters.api.not_found")
        return self._described(list_id)

    def create_list(self, body: Json) -> Json:
        refuse_unknown(body, {"name", "description", "kind"})
        name = body.get("name", "")
        if not isinstance(name, str) or not re.fullmatch(r"[a-zA-Z0-9_]{1,50}", name):
            raise ApiError(400, 10026, "filters.api.invalid_json")
        if body.get("kind") != "ip":
            raise ApiError(400, 10026, "filters.api.invalid_json")
        if any(each["name"] == name for each in self._lists.values()):
            raise ApiError(409, 10019, "filters.api.list_name_taken")
        if len(self._lists) >= LISTS[self.plan]:
            raise ApiError(400, 10009, "filters.api.too_many_lists")
        list_id, moment = new_id(), now()
        self._lists[list_id] = {"id": list_id, "name": name, "kind": "ip", "created_on": moment, "modified_on": moment}
        if body.get("description"):
            self._lists[list_id]["description"] = body["description"]
        self._items[list_id] = {}
        self._networks[list_id] = Networks([])
        return self._described(list_id)

    def edit_list(self, list_id: str, body: Json) -> Json:
        refuse_unknown(body, {"description"})
        self.account_list(list_id)
        self._lists[list_id].update(description=body.get("description", ""), modified_on=now())
        return self._described(list_id)

    def delete_list(self, list_id: str) -> Json:
        if self.account_list(list_id)["num_referencing_filters"]:
            raise ApiError(400, 10031, "filters.api.ip_list_in_use")
        self._refuse_while_busy()
        del self._lists[list_id], self._items[list_id], self._networks[list_id]
        return {"id": list_id}

    def items(self, list_id: str, cursor: str, per_page: int, search: str) -> tuple[list[Json], Json]:
        self.account_list(list_id)
        known = [item for item in self._items[list_id].values() if search in item["ip"]]
        start = int(cursor, 16) if re.fullmatch(r"[0-9a-f]{1,8}", cursor) else 0
        page = known[start : start + min(per_page, LONGEST_PAGE)]
        end = start + len(page)
        return copy.deepcopy(page), {"cursors": {"after": f"{end:x}"} if end < len(known) else {}}

    def item(self, list_id: str, item_id: str) -> Json:
        self.account_list(list_id)
        for item in self._items[list_id].values():
            if item["id"] == item_id:
                return dict(item)
        raise ApiError(404, 10001, "filters.api.not_found")

    def add_items(self, list_id: str, body: Any, replace: bool = False) -> Json:
        self.account_list(list_id)
        items = self._parsed(body)
        return self._operation(lambda: self._store(list_id, items, replace))

    def delete_items(self, list_id: str, body: Any) -> Json:
        self.account_list(list_id)
        given = body.get("items") if isinstance(body, dict) else None
        if not isinstance(given, list) or not given or not all(set(each) == {"id"} for each in given):
            raise ApiError(400, 10026, "filters.api.invalid_json")
        ids = {each["id"] for each in given}
        if not ids <= {item["id"] for item in self._items[list_id].values()}:
            raise ApiError(400, 10027, "filters.api.item_not_found")
        return self._operation(lambda: self._remove(list_id, ids))

    def operation(self, operation_id: str) -> Json:
        if operation_id not in self._operations:
            raise ApiError(404, 10001, "filters.api.not_found")
        return dict(self._operations[operation_id])

    def settle(self, moment: float | None = None) -> None:
        """Do what the asynchronous operations have come to; called before every request."""
        moment = time.monotonic() if moment is None else moment
        for operation_id, (due, work) in list(self._work.items()):
            if moment < due:
                self._operations[operation_id]["status"] = "running"
                continue
            error = work()
            self._operations[operation_id].update(status="failed" if error else "completed", completed=now())
            if error:
                self._operations[operation_id]["error"] = error
            del self._work[operation_id]

    def _described(self, list_id: str) -> Json:
        known = self._lists[list_id]
        rules = [rule for ruleset in self._rulesets.values() for rule in ruleset["rules"]]
        using = sum(known["name"] in self._expressions[rule["expression"]].lists for rule in rules)
        return {**known, "num_items": len(self._items[list_id]), "num_referencing_filters": using}

    @staticmethod
    def _parsed(body: Any) -> list[Json]:
        if not isinstance(body, list):
            raise ApiError(400, 10026, "filters.api.invalid_json")
        items = []
        for given in body:
            if (
                not isinstance(given, dict)
                or not set(given) <= {"ip", "comment"}
                or not isinstance(given.get("ip"), str)
            ):
                raise ApiError(400, 10026, "filters.api.invalid_json")
            items.append({**given, "ip": normalised(given["ip"])})
        return items

    def _refuse_while_busy(self) -> None:
        if self._work:
            raise ApiError(
                429, 10040, "filters.api.pending: another operation is being processed, submit your request again later"
            )

    def _operation(self, work: Callable[[], str | None]) -> Json:
        self._refuse_while_busy()
        operation_id = new_id()
        self._operations[operation_id] = {"id": operation_id, "status": "pending"}
        self._work[operation_id] = (time.monotonic() + self.delay, work)
        return {"operation_id": operation_id}

    def _store(self, list_id: str, items: list[Json], replace: bool) -> str | None:
        known = {} if replace else dict(self._items[list_id])
        for item in items:
            old, moment = known.pop(item["ip"], None), now()
            created = old["created_on"] if old else moment
            known[item["ip"]] = {"id": new_id(), **item, "created_on": created, "modified_on": moment}
        others = sum(len(each) for name, each in self._items.items() if name != list_id)
        if len(known) + others > ITEMS[self.plan]:
            return "This list is at the maximum number of items"
        self._change(list_id, known)
        return None

    def _remove(self, list_id: str, ids: set[str]) -> None:
        self._change(list_id, {ip: item for ip, item in self._items[list_id].items() if item["id"] not in ids})

    def _change(self, list_id: str, items: dict[str, Json]) -> None:
        self._items[list_id] = items
        self._networks[list_id] = Networks([ipaddress.ip_network(ip) for ip in items])
        self._lists[list_id]["modified_on"] = now()

    # The edge itself

    def verdict(self, request: Json) -> str:
        """The action of the first rule that ends the request, else ``pass``."""
        with self.lock:
            self.settle()
            rules = [rule for each in self._of(f"zones/{self.zone}") for rule in each["rules"] if rule["enabled"]]
            networks = {each["name"]: self._networks[list_id] for list_id, each in self._lists.items()}
        for rule in rules:
            if rule["action"] == "log" or not self._expressions[rule["expression"]].matches(request, networks):
                continue
            if rule["action"] != "skip":
                return str(rule["action"])
            if rule["action_parameters"].get("ruleset") == "current":
                return "pass"
        return "pass"

    def dump(self) -> Json:
        """Everything that a client can own; counters and times of what holds it are the service's."""
        with self.lock:
            self.settle()
            rulesets = [
                {k: v for k, v in each.items() if k not in ("version", "last_updated")}
                for each in self._rulesets.values()
            ]
            lists = [
                {
                    **{k: v for k, v in self._described(i).items() if k != "modified_on"},
                    "items": list(self._items[i].values()),
                }
                for i in self._lists
            ]
            return copy.deepcopy({"rulesets": rulesets, "lists": lists})

    def seed(self, rules: int, entries: int) -> None:
        """What other people own: rules, and lists with comments of their own."""
        with self.lock:
            scope = f"zones/{self.zone}"
            names = {each["name"] for each in self._lists.values()}
            if "office" not in names:
                office = self.create_list({"name": "office", "kind": "ip", "description": "Ways out of the office"})[
                    "id"
                ]
                self._store(office, [{"ip": "203.0.113.0/24", "comment": "office"}, {"ip": "2001:db8:0:1::/64"}], False)
            if "scanners" not in names:
                scanners = self.create_list({"name": "scanners", "kind": "ip"})["id"]
                found = [{"ip": f"198.18.{n >> 8}.{n & 255}", "comment": f"ticket {1000 + n}"} for n in range(entries)]
                self._store(scanners, found, False)
            foreign = [_foreign(number) for number in range(rules)]
            self.put_entry_point(scope, PHASE, {"rules": foreign}, False)

    def add_foreign(self, rule: Json | None) -> None:
        with self.lock:
            scope = f"zones/{self.zone}"
            rule = rule or {
                "action": "block",
                "expression": 'http.request.uri.path eq "/foreign"',
                "description": "by hand",
            }
            try:
                self.add_rule(scope, self.entry_point(scope, PHASE)["id"], rule, False)
            except ApiError as error:
                if error.status != 404:
                    raise
                self.put_entry_point(scope, PHASE, {"rules": [rule]}, False)


def _foreign(number: int) -> Json:
    kinds: list[Json] = [
        {
            "action": "skip",
            "action_parameters": {"ruleset": "current"},
            "expression": "ip.src in $office",
            "description": "office",
        },
        {"action": "block", "expression": "ip.src in $scanners", "description": "scanners"},
        {"action": "managed_challenge", "expression": 'ip.geoip.country eq "T1" and http.request.uri.path eq "/login"'},
    ]
    if number < len(kinds):
        return {"ref": f"terraform_{number}", **kinds[number]}
    path = f'starts_with(http.request.uri.path, "/old-{number}")'
    return {"action": "block", "expression": path, "enabled": number % 2 == 0, "ref": f"terraform_{number}"}


def _moved(rules: list[Json], rule: Json, position: Any) -> list[Json]:
    if not isinstance(position, dict) or len(position) != 1 or not set(position) <= {"before", "after", "index"}:
        raise ApiError(400, 20104, "invalid JSON: position needs exactly one of before, after and index", "/position")
    others = [each for each in rules if each is not rule]
    (kind, value), ids = *position.items(), [each["id"] for each in others]
    if kind == "index":
        if not isinstance(value, int) or not 1 <= value <= len(rules):
            raise ApiError(400, 20104, "invalid JSON: index is out of range", "/position/index")
        place = value - 1
    elif value == "":
        place = 0 if kind == "before" else len(others)
    elif value in ids:
        place = ids.index(value) + (kind == "after")
    else:
        raise ApiError(400, 20104, f"could not find rule {value}", f"/position/{kind}")
    return [*others[:place], rule, *others[place:]]


def normalised(value: str) -> str:
    """As the service stores it: no host bits, no suffix of a single address, short IPv6 in lower case."""
    try:
        network = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise ApiError(400, 10026, "filters.api.invalid_json") from None
    if (network.version == 4 and network.prefixlen < 8) or (network.version == 6 and network.prefixlen < 12):
        raise ApiError(400, 10028, "filters.api.invalid_ip_range")
    return str(network.network_address) if network.prefixlen == network.max_prefixlen else str(network)
