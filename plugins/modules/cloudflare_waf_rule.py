#!/usr/bin/python
# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: cloudflare_waf_rule
short_description: Block or challenge clients at the Cloudflare edge with one rule
version_added: 1.0.0
author: The firebreak.incident contributors (@firebreak)
description:
  - Keeps one custom rule of a zone, named by its C(ref), C(firebreak_<incident>_<name>). Other rules and their order are never touched.
  - The rule is described by selectors, all of which must match, or by an expression.
  - In check mode the service itself checks the rule. A list that does not exist yet is replaced for that.
notes:
  - The token needs the permission Zone WAF Edit, and Account Filter Lists Read for the check of lists in check mode.
  - The action V(log) needs an Enterprise plan.
  - A rule that can hit every visitor needs break glass for C(every_visitor); so does an expression with an C(or), an order or a negation.
  - Protected addresses are checked where they are listed, by M(firebreak.incident.cloudflare_ip_list), and where they stand in an
    expression.
extends_documentation_fragment:
  - firebreak.incident.attributes
  - firebreak.incident.common
  - firebreak.incident.cloudflare
options:
  name:
    description: Name of the rule in this incident; lower-case letters, digits and underscores.
    type: str
    required: true
  ip_lists:
    description: The client's address is in one of these lists of the account.
    type: list
    elements: str
  countries:
    description: Or the client is in one of these countries (ISO 3166 alpha-2; V(T1) is Tor).
    type: list
    elements: str
  hosts:
    description: The request is for one of these host names.
    type: list
    elements: str
  paths:
    description: The path of the request begins with one of these.
    type: list
    elements: str
  except_ip_lists:
    description: The client's address is in none of these lists of the account.
    type: list
    elements: str
  expression:
    description: An expression in the service's language, instead of selectors.
    type: str
  action:
    description: What happens to matching requests.
    type: str
    choices: [block, managed_challenge, js_challenge, log]
    default: block
  position:
    description: Where a new rule is put. A rule that is there already is not moved.
    type: str
    choices: [first, last]
    default: first
  enabled:
    description: Whether the rule is in force.
    type: bool
    default: true
  description:
    description: Text of the rule; the id of the incident where this is not set.
    type: str
  state:
    description: V(absent) removes the rule, and the zone's ruleset where this incident created it and nothing else is in it.
    type: str
    choices: [present, absent]
    default: present
seealso:
  - module: firebreak.incident.cloudflare_ip_list
  - module: firebreak.incident.control_release
"""

EXAMPLES = r"""
- name: Block the addresses of the attack
  firebreak.incident.cloudflare_waf_rule:
    name: attackers
    ip_lists: [attackers]
    action: block
    incident_id: INC-2026-1120-001
    cloudflare_account_id: 0123456789abcdef0123456789abcdef
    cloudflare_zone_id: 89abcdef0123456789abcdef01234567

- name: Let them in again
  firebreak.incident.cloudflare_waf_rule:
    name: attackers
    state: absent
    incident_id: INC-2026-1120-001
    cloudflare_zone_id: 89abcdef0123456789abcdef01234567
"""

RETURN = r"""
changes:
  description: What was changed, or would be in check mode, in this order.
  returned: always
  type: list
  elements: dict
  sample: [{"action": "create", "target": "rule firebreak_INC-2026-1120-001_attackers", "reversible": true}]
estimate:
  description: Counts and names that traffic moves. They are shown, never compared.
  returned: always
  type: dict
  sample: {"rules": 41}
state_before:
  description: What this control manages, before.
  returned: always
  type: dict
state_after:
  description: What this control manages, after; in check mode as planned.
  returned: always
  type: dict
diff:
  description: The part that differs.
  returned: always
  type: dict
incident_id:
  description: The incident.
  returned: always
  type: str
  sample: INC-2026-1120-001
mark:
  description: The mark that the control leaves in the service, naming incident and round.
  returned: always
  type: str
  sample: INC-2026-1120-001/1
outcome:
  description:
    - V(verified) when the target was read again and nothing was left to do, V(applied) when a slow target has not settled yet, V(unproven)
      when the effect could not be shown, V(planned) in check mode, and V(ok) when there was nothing to do.
  returned: always
  type: str
  sample: verified
"""

import re
from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils import _cloudflare
from ansible_collections.firebreak.incident.plugins.module_utils._cloudflare_expression import (
    SELECTORS,
    expression_of,
    reach,
    with_known_lists,
)
from ansible_collections.firebreak.incident.plugins.module_utils._control import Control
from ansible_collections.firebreak.incident.plugins.module_utils._errors import Refused
from ansible_collections.firebreak.incident.plugins.module_utils._module import run_module
from ansible_collections.firebreak.incident.plugins.module_utils._plan import Change, Facts, Plan

FIELDS = ("expression", "action", "enabled", "description")
POSITIONS = {"first": {"before": ""}, "last": {"after": ""}}
SPEC: dict[str, Any] = {
    "argument_spec": {
        "name": {"type": "str", "required": True},
        **{selector: {"type": "list", "elements": "str"} for selector in SELECTORS},
        "expression": {"type": "str"},
        "action": {"type": "str", "choices": ["block", "managed_challenge", "js_challenge", "log"], "default": "block"},
        "position": {"type": "str", "choices": ["first", "last"], "default": "first"},
        "enabled": {"type": "bool", "default": True},
        "description": {"type": "str"},
        "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    },
    "mutually_exclusive": [("expression", selector) for selector in SELECTORS],
}


def _ref(params: dict[str, Any]) -> str:
    return f"firebreak_{params['incident_id']}_{params['name']}"


def read(client: _cloudflare.Client, params: dict[str, Any]) -> Facts:
    ruleset = client.entry_point()
    if ruleset is None:
        return {"ruleset": None, "rule": None, "estimate": {"rules": 0}}
    found = [rule for rule in ruleset["rules"] if rule.get("ref") == _ref(params)]
    others = len(ruleset["rules"]) > len(found)
    return {
        "ruleset": {"ours": ruleset.get("description") == params["incident_id"], "others": others},
        "rule": {field: found[0].get(field) for field in FIELDS} if found else None,
        "estimate": {"rules": len(ruleset["rules"])},
    }


def plan(params: dict[str, Any], facts: Facts) -> Plan:
    if not re.fullmatch("[a-z0-9_]{1,50}", params["name"]):
        raise Refused("name: 1 to 50 lower-case letters, digits and underscores")
    before = {"ruleset": facts["ruleset"], "rule": facts["rule"]}
    if params["state"] == "absent":
        return _removal(params, before, facts.get("estimate", {}))
    rule = {field: params.get(field) for field in FIELDS} | {"expression": expression_of(params)}
    rule["description"] = params["incident_id"] if rule["description"] is None else rule["description"]
    after = {"ruleset": before["ruleset"] or {"ours": True, "others": False}, "rule": rule}
    undo, action = ({"state": "present", "name": params["name"], **before["rule"]}, "update") if before["rule"] else (
        {"state": "absent", "name": params["name"]}, "create")  # fmt: skip
    changes = (Change(action, f"rule {_ref(params)}", ("rule",), undo, data={"rule": rule}),)
    covers, wide = reach(params, rule)
    return Plan(before, after, changes if rule != before["rule"] else (), facts.get("estimate", {}), covers, wide=wide)


def _removal(params: dict[str, Any], before: Facts, estimate: Facts) -> Plan:
    after, changes = {**before, "rule": None}, []
    undo = {"state": "present", "name": params["name"], "position": params["position"], **(before["rule"] or {})}
    if before["rule"]:
        changes.append(Change("delete", f"rule {_ref(params)}", ("rule",), undo))
    if before["ruleset"] and before["ruleset"]["ours"] and not before["ruleset"]["others"]:
        way_back = {"undo": undo} if before["rule"] else {"irreversible": "the next rule makes it again"}
        changes.append(Change("delete", "empty ruleset of the incident", ("ruleset",), **way_back))
        after["ruleset"] = None
    return Plan(before, after, tuple(changes), estimate)


def _send(client: _cloudflare.Client, params: dict[str, Any], change: Change, dry: bool) -> None:
    ruleset = client.entry_point()
    rule = {**change.data.get("rule", {}), "ref": _ref(params)}
    if dry and "expression" in rule:
        rule["expression"] = with_known_lists(rule["expression"], client.list_names())
    if ruleset is None:
        if change.action == "create":
            client.create_entry_point(params["incident_id"], rule, dry)
        return
    found = next((each for each in ruleset["rules"] if each.get("ref") == rule["ref"]), None)
    if change.path == ("ruleset",):
        if not ruleset["rules"] and not dry:
            client.delete_entry_point(ruleset["id"])
    elif change.action == "delete":
        if found:
            client.delete_rule(ruleset["id"], found["id"], rule["ref"], dry)
    elif found:
        client.edit_rule(ruleset["id"], found["id"], rule, dry)
    else:
        client.add_rule(ruleset["id"], rule, POSITIONS[params["position"]], dry)


def apply(client: _cloudflare.Client, params: dict[str, Any], change: Change) -> None:
    _send(client, params, change, dry=False)


def dry_run(client: _cloudflare.Client, params: dict[str, Any], change: Change) -> None:
    _send(client, params, change, dry=True)


CONTROL = Control("cloudflare_waf_rule", _cloudflare, SPEC, read, plan, apply, dry_run=dry_run, slow=True)


def main() -> None:
    run_module(CONTROL)


if __name__ == "__main__":
    main()
