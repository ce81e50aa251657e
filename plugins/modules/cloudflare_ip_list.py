#!/usr/bin/python
# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: cloudflare_ip_list
short_description: Put addresses of an attack into a Cloudflare list
version_added: 1.0.0
author: The firebreak.incident contributors (@firebreak)
description:
  - Adds addresses and networks to a list of the account, and creates the list where it is absent.
  - Each entry bears incident and round as its comment. Entries that bear no mark of this incident are never changed or removed, and a value
    that somebody else listed already counts as covered.
  - A list has no effect by itself. M(firebreak.incident.cloudflare_waf_rule) makes a rule of it.
notes:
  - The token needs the permission Account Filter Lists Edit.
  - The service carries out additions later. The control waits for that.
  - A value that another incident listed goes with that incident's release.
extends_documentation_fragment:
  - firebreak.incident.attributes
  - firebreak.incident.common
  - firebreak.incident.cloudflare
options:
  name:
    description: Name of the list.
    type: str
    required: true
  items:
    description:
      - Addresses and networks in CIDR form. Required with O(state=present).
      - Host bits are cleared, as the service does.
    type: list
    elements: str
  state:
    description:
      - V(present) adds what is missing.
      - V(absent) removes these entries where they are this incident's. Without O(items) it removes all of this incident, and the list
        itself where this incident created it and nobody else uses it. With an empty O(items) it removes such a list alone, where nothing
        is left in it.
    type: str
    choices: [present, absent]
    default: present
  description:
    description: Text for a list that is created, after the id of the incident.
    type: str
    default: ""
seealso:
  - module: firebreak.incident.cloudflare_waf_rule
  - module: firebreak.incident.control_release
"""

EXAMPLES = r"""
- name: List the addresses of the attack
  firebreak.incident.cloudflare_ip_list:
    name: attackers
    items:
      - 198.51.100.0/24
      - 2001:db8:bad::/48
    incident_id: INC-2026-1120-001
    cloudflare_account_id: 0123456789abcdef0123456789abcdef

- name: Remove this incident's addresses
  firebreak.incident.cloudflare_ip_list:
    name: attackers
    state: absent
    incident_id: INC-2026-1120-001
    cloudflare_account_id: 0123456789abcdef0123456789abcdef
"""

RETURN = r"""
changes:
  description: What was changed, or would be in check mode, in this order.
  returned: always
  type: list
  elements: dict
  sample: [{"action": "create", "target": "2 entries of list attackers", "reversible": true}]
estimate:
  description: Counts and names that traffic moves. They are shown, never compared.
  returned: always
  type: dict
  sample: {"entries": 12}
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
from ansible_collections.firebreak.incident.plugins.module_utils._control import Control
from ansible_collections.firebreak.incident.plugins.module_utils._errors import FirebreakError, Refused
from ansible_collections.firebreak.incident.plugins.module_utils._guards import network
from ansible_collections.firebreak.incident.plugins.module_utils._module import run_module
from ansible_collections.firebreak.incident.plugins.module_utils._plan import Change, Facts, Plan

SPEC: dict[str, Any] = {
    "argument_spec": {
        "name": {"type": "str", "required": True},
        "items": {"type": "list", "elements": "str"},
        "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        "description": {"type": "str", "default": ""},
    },
    "required_if": [("state", "present", ("items",))],
}


def _wanted(params: dict[str, Any]) -> dict[str, None] | None:
    """The values as the service stores them, each once; None where none were named."""
    if params.get("items") is None:
        return None
    values: dict[str, None] = {}
    for number, item in enumerate(params["items"], 1):
        try:
            block = network(str(item))
        except ValueError:
            raise Refused(f"items: number {number}, {item}, is no address or network in CIDR form") from None
        address = str(item).partition("/")[0]
        if block.network_address != network(address).network_address:
            told = f"write {block} for the network, or {address} for the one address"
            raise Refused(f"items: number {number}, {item}, is an address with the length of a network; {told}")
        values[str(block.network_address if block.prefixlen == block.max_prefixlen else block)] = None
    return values


def _owner(text: Any) -> str:
    """The incident that a comment or description names."""
    return re.split("[/:]", str(text or ""), maxsplit=1)[0]


def read(client: _cloudflare.Client, params: dict[str, Any]) -> Facts:
    wanted, incident = _wanted(params), params["incident_id"]
    known, items = client.listed(params["name"])
    comments = {item["ip"]: item.get("comment") for item in items}
    ours = {value: comment for value, comment in comments.items() if _owner(comment) == incident}
    whole = not wanted and params["state"] == "absent"  # where the list itself may go
    found: Facts | None = None
    if known:
        made = _owner(known.get("description")) == incident
        found = {"kind": known["kind"], "ours": made, "others": len(comments) > len(ours)}
    return {
        "list": found,
        "entries": {value: ours[value] for value in sorted(ours) if whole or value in (wanted or ())},
        "listed_by_others": sorted(value for value in wanted or () if value in comments and value not in ours),
        "estimate": {"entries": len(comments)},
    }


def plan(params: dict[str, Any], facts: Facts) -> Plan:
    if not re.fullmatch("[a-z0-9_]{1,50}", params["name"]):
        raise Refused("name: a list's name has 1 to 50 lower-case letters, digits and underscores")
    before = {name: facts[name] for name in ("list", "entries", "listed_by_others")}
    if before["list"] and before["list"]["kind"] != "ip":
        raise Refused("name: the list holds no addresses, but something else")
    wanted = _wanted(params)
    if params["state"] == "present":
        return _addition(params, before, wanted or {}, facts.get("estimate", {}))
    return _removal(params, before, wanted, facts.get("estimate", {}))


def _addition(params: dict[str, Any], before: Facts, wanted: dict[str, None], estimate: Facts) -> Plan:
    name, changes = params["name"], []
    if before["list"] is None:
        undo = {"state": "absent", "name": name, "items": []}
        changes.append(Change("create", f"list {name}", ("list",), undo, data={"description": _description(params)}))
    listed = {*before["entries"], *before["listed_by_others"]}
    new = [value for value in wanted if value not in listed]
    if new:
        undo = {"state": "absent", "name": name, "items": new}
        changes.append(Change("create", f"{len(new)} entries of list {name}", ("entries",), undo, bulk="items"))
    entries = {**before["entries"], **dict.fromkeys(new, params["mark"])}
    after = {**before, "list": before["list"] or {"kind": "ip", "ours": True, "others": False}, "entries": entries}
    return Plan(before, after, tuple(changes), estimate, covers={"addresses": list(wanted)})


def _removal(params: dict[str, Any], before: Facts, wanted: dict[str, None] | None, estimate: Facts) -> Plan:
    name, known, changes = params["name"], before["list"], []
    gone = [value for value in before["entries"] if wanted is None or value in wanted]
    kept = before["entries"].keys() - set(gone)
    after = {**before, "entries": {value: before["entries"][value] for value in sorted(kept)}}
    if gone:
        undo = {"state": "present", "name": name, "items": gone}
        changes.append(Change("delete", f"{len(gone)} entries of list {name}", ("entries",), undo, bulk="items"))
    if not wanted and not kept and known and known["ours"] and not known["others"]:
        undo = {"state": "present", "name": name, "items": [], "description": params["description"]}
        changes.append(Change("delete", f"list {name}", ("list",), undo))
        after["list"] = None
    return Plan(before, after, tuple(changes), estimate)


def _description(params: dict[str, Any]) -> str:
    return f"{params['incident_id']}: {params['description']}".removesuffix(": ")


def apply(client: _cloudflare.Client, params: dict[str, Any], change: Change) -> None:
    name = params["name"]
    if (change.action, change.path) == ("create", ("list",)):
        client.create_list(name, change.data["description"])
        return
    known = client.find_list(name)
    if known is None:
        raise FirebreakError(f"the list {name} has gone in between", effect="none")
    if change.path == ("list",):
        client.delete_list(known["id"], name)
        return
    values = set((change.undo or {})["items"])
    if change.action == "create":
        client.add_items(known["id"], [{"ip": value, "comment": params["mark"]} for value in sorted(values)])
        return
    incident = params["incident_id"]
    ids = [i["id"] for i in client.items(known["id"]) if i["ip"] in values and _owner(i.get("comment")) == incident]
    client.delete_items(known["id"], ids)


CONTROL = Control("cloudflare_ip_list", _cloudflare, SPEC, read, plan, apply, slow=True)


def main() -> None:
    run_module(CONTROL)


if __name__ == "__main__":
    main()
