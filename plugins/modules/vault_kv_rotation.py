#!/usr/bin/python
# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: vault_kv_rotation
short_description: Replace stolen values in a Vault KV secret
version_added: 1.0.0
author: The firebreak.incident contributors (@firebreak)
description:
  - Rotates fields of one secret in a KV version 2 engine, and proves that the old values are refused.
  - It goes in three steps. Each can be repeated after a crash, and is made once for each incident and round.
  - The new values are stored under C(_pending/) before anybody else knows them. In the end a record without values stays,
    by which a later run notices that somebody wrote other values; it then names version and writer, and fails.
notes:
  - The token needs C(read) and C(patch) on C(data/) of the secret; C(create), C(read) and C(update) on
    C(data/_pending/*); C(read) on C(metadata/) of both and on C(config) of the mount; and for V(retired) C(update) on
    C(destroy/) of both. All of it is asked before the first write.
  - Vault must keep two versions. Where C(max_versions) of secret and mount allows only one, nothing is written.
extends_documentation_fragment:
  - firebreak.incident.attributes
  - firebreak.incident.common
  - firebreak.incident.vault
options:
  state:
    description:
      - V(staged) generates the new values and stores them as pending.
      - V(current) writes them to the secret as well. Its other fields stay as they are.
      - V(retired) also proves that the new values are accepted and the old ones refused, then destroys the pending copy
        and all older versions of the secret. Deliver the new values before, with M(firebreak.incident.secret_delivery).
    type: str
    choices: [staged, current, retired]
    default: retired
  engine_mount_point: {description: Where the KV version 2 engine is mounted., type: str, default: secret}
  path: {description: "The secret, for example V(app/backend).", type: str, required: true}
  fields: {description: The fields that are rotated together., type: list, elements: str, required: true}
  format: {description: How generated values are written., type: str, choices: [urlsafe, base64, hex], default: urlsafe}
  bytes: {description: "Random bytes in a generated value, at least 32.", type: int, default: 32}
  new_values: {description: "Values that a provider issued, by field. The other fields are generated.", type: dict}
  proof:
    description: How V(retired) tries the values. Each field needs one. The old value must be refused with status 401.
    type: list
    elements: dict
    default: []
    suboptions:
      field: {description: The field whose values are tried., type: str, required: true}
      kind:
        description:
          - V(jwt) asks O(proof[].url) with a token that is signed with the value (HS256).
          - V(webhook) posts O(proof[].body) with its HMAC-SHA256 in O(proof[].header).
          - V(challenge) sends C(name) and C(nonce) and compares C(hmac) of the answer, the HMAC-SHA256 of the nonce.
        type: str
        choices: [jwt, webhook, challenge]
        required: true
      url: {description: Where they are tried., type: str, required: true}
      name: {description: "The value's name at the consumer; by default O(proof[].field).", type: str}
      claims: {description: "Claims of the token, those of somebody who may use O(proof[].url).", type: dict}
      body:
        description: Body of the webhook; take an event that the consumer accepts and that changes nothing.
        type: str
        default: '{}'
      header: {description: Header that carries the signature., type: str, default: X-Signature}
      prefix: {description: "What stands before the signature, for example V(sha256=).", type: str, default: ''}
seealso:
  - module: firebreak.incident.secret_delivery
"""

EXAMPLES = r"""
- name: Make new keys current
  firebreak.incident.vault_kv_rotation:
    path: app/backend
    fields: [JWT_SECRET, WEBHOOK_SECRET]
    state: current
    incident_id: INC-2026-1120-001
    vault_url: https://vault.example.com:8200
  register: rotation

- name: Retire the stolen keys after the new ones were delivered (there is no way back from a stolen key)
  firebreak.incident.vault_kv_rotation:
    path: app/backend
    fields: [JWT_SECRET, WEBHOOK_SECRET]
    state: retired
    proof:
      - {field: JWT_SECRET, kind: jwt, url: 'https://app.example.com/api/me', claims: {sub: '1'}}
      - {field: WEBHOOK_SECRET, kind: webhook, url: 'https://app.example.com/hooks/payment'}
    incident_id: INC-2026-1120-001
    vault_url: https://vault.example.com:8200
"""

RETURN = r"""
changes:
  description: What was changed, or would be in check mode, in this order.
  returned: always
  type: list
  elements: dict
  sample: [{"action": "update", "target": "JWT_SECRET of secret/app/backend", "reversible": false}]
estimate: {description: "Counts, shown and never compared.", returned: always, type: dict, sample: {"old_versions": 3}}
state_before: {description: "What this control manages, before.", returned: always, type: dict}
state_after:
  description:
    - What this control manages, after; in check mode as planned.
    - Its C(version) is what M(firebreak.incident.secret_delivery) takes as C(version).
  returned: always
  type: dict
diff: {description: The part that differs., returned: always, type: dict}
incident_id: {description: The incident., returned: always, type: str, sample: INC-2026-1120-001}
mark: {description: "The mark of incident and round in Vault.", returned: always, type: str, sample: INC-2026-1120-001/1}
outcome:
  description:
    - V(verified) when the target was read again and nothing was left to do, V(applied) when a slow target has not settled yet, V(unproven)
      when the effect could not be shown, V(planned) in check mode, and V(ok) when there was nothing to do.
  returned: always
  type: str
  sample: verified
"""

from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils import _kv_rotation, _proof, _vault
from ansible_collections.firebreak.incident.plugins.module_utils._control import Control
from ansible_collections.firebreak.incident.plugins.module_utils._errors import Refused
from ansible_collections.firebreak.incident.plugins.module_utils._kv_rotation import STATES, fields_of, name_of
from ansible_collections.firebreak.incident.plugins.module_utils._module import run_module
from ansible_collections.firebreak.incident.plugins.module_utils._plan import Change, Facts, Plan

FEWEST_BYTES = 32
STOLEN = "the old value is stolen"

SPEC: dict[str, Any] = {
    "argument_spec": {
        "state": {"type": "str", "choices": ["staged", "current", "retired"], "default": "retired"},
        "engine_mount_point": {"type": "str", "default": "secret"},
        "path": {"type": "str", "required": True},
        "fields": {"type": "list", "elements": "str", "required": True},
        "format": {"type": "str", "choices": ["urlsafe", "base64", "hex"], "default": "urlsafe"},
        "bytes": {"type": "int", "default": FEWEST_BYTES},
        "new_values": {"type": "dict", "no_log": True},
        "proof": {"type": "list", "elements": "dict", "default": [], "options": _proof.SPEC},
    }
}


def read(client: _vault.Client, params: dict[str, Any]) -> Facts:
    return _kv_rotation.read(client, params)


def plan(params: dict[str, Any], facts: Facts) -> Plan:
    _check_options(params)
    before = {name: value for name, value in facts.items() if name != "estimate"}
    if before["conflict"]:
        raise Refused(
            f"{name_of(params)}: {before['conflict']}. Find out why, then set another round.", guard="conflict"
        )
    after, changes = dict(before), []

    def change(step: str, action: str, target: str, fact: str, value: Any, state: str, why: str) -> None:
        data = {"step": step, "base": before["replaces"]}
        changes.append(Change(action, target, (fact,), irreversible=why, data=data))
        after.update({fact: value, "state": state})

    def missing(state: str) -> bool:
        return STATES.index(before["state"]) < STATES.index(state) <= STATES.index(params["state"])

    names = ", ".join(fields_of(params))
    if missing(params["state"]) and not before["mark"] and (absent := set(params["fields"]) - set(before["fields"])):
        raise Refused(f"fields: {name_of(params)} has no readable {', '.join(sorted(absent))}")
    if missing("staged"):
        why = "it is the claim of this incident and round, and ends as a record without values"
        change("stage", "create", f"pending {names} of {name_of(params)}", "pending", "stored", "staged", why)
    if missing("current"):
        next_version = before["version"] + 1
        change("promote", "update", f"{names} of {name_of(params)}", "version", next_version, "current", STOLEN)
    if missing("retired"):
        if not before["mark"]:
            why = "a refusal that was seen stays on record"
            change("prove", "run", f"proof that the old {names} are refused", "mark", params["mark"], "current", why)
        if after["pending"] == "stored":
            why = "no second copy of a value in use is kept"
            change("forget", "delete", f"pending {names} of {name_of(params)}", "pending", "destroyed", "retired", why)
        if before["old_versions"] == "readable":
            target = f"old versions of {name_of(params)}"
            change("destroy", "delete", target, "old_versions", "destroyed", "retired", STOLEN)
    return Plan(before, after, tuple(changes), facts.get("estimate", {}))


def apply(client: _vault.Client, params: dict[str, Any], change: Change) -> None:
    _kv_rotation.STEPS[change.data["step"]](client, params, change.data["base"])


def _check_options(params: dict[str, Any]) -> None:
    fields, given = set(params["fields"]), params["new_values"] or {}
    if not fields:
        raise Refused("fields is empty")
    if params["bytes"] < FEWEST_BYTES:
        raise Refused(f"bytes must be at least {FEWEST_BYTES}")
    if set(given) - fields or not all(isinstance(value, str) and value for value in given.values()):
        raise Refused("new_values must hold texts for names in fields only")
    unproven = fields - {proof["field"] for proof in params["proof"]}
    if params["state"] == "retired" and unproven:
        raise Refused(f"proof names no check for {', '.join(sorted(unproven))}")
    if {proof["field"] for proof in params["proof"]} - fields:
        raise Refused("proof names a field that is not in fields")


CONTROL = Control("vault_kv_rotation", _vault, SPEC, read, plan, apply)


def main() -> None:
    run_module(CONTROL)


if __name__ == "__main__":
    main()
