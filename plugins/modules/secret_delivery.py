#!/usr/bin/python
# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: secret_delivery
short_description: Bring the current values of a Vault secret to their consumer
version_added: 1.0.0
author: The firebreak.incident contributors (@firebreak)
description:
  - Writes fields of a KV version 2 secret into an env file on the host, reloads the consumer, and proves that it works with them.
  - The file is replaced in one step by a new one. Mode, owner and all other lines stay as they are.
  - The values go from Vault through this control to the host's standard input, and nowhere else. Nothing of the file comes
    back; the host itself compares.
  - The consumer proves what it works with by the HMAC-SHA256 of a nonce, so that no value is sent.
notes:
  - It reaches the host over Ansible's own connection, C(become) included, so it does not work with C(async).
  - The host needs Linux and a POSIX shell with C(awk), C(mktemp), C(readlink), C(stat) and C(sync).
  - ACLs, extended attributes and other names (hard links) of the file are not kept. Security labels are those of a new file in its folder.
  - The token needs C(read) on C(data/) of the secret.
extends_documentation_fragment:
  - firebreak.incident.attributes
  - firebreak.incident.common
  - firebreak.incident.vault
options:
  engine_mount_point: {description: Where the KV version 2 engine is mounted., type: str, default: secret}
  path: {description: "The secret, for example V(app/backend).", type: str, required: true}
  fields: {description: "The fields to deliver, each with its name at the consumer.", type: dict, required: true}
  version:
    description:
      - The version that the secret must have reached; C(state_after.version) of M(firebreak.incident.vault_kv_rotation).
      - In check mode it may be one that is only planned.
    type: int
  destination: {description: What kind of place they are delivered to., type: str, choices: [env_file], default: env_file}
  env_file: {description: "The file on the host, with its full path. It must exist.", type: str, required: true}
  reload:
    description: Command that makes the consumer read the file again, with its arguments.
    type: list
    elements: str
    required: true
  proof_url:
    description: Where the consumer answers C(name) and C(nonce) with C(hmac), the hexadecimal HMAC-SHA256 of the nonce.
    type: str
    required: true
  proof_patience: {description: Seconds that the consumer may take to use the new values., type: float, default: 10}
seealso:
  - module: firebreak.incident.vault_kv_rotation
"""

EXAMPLES = r"""
- name: Deliver the new keys (a stolen key is not brought back, so there is no way back)
  firebreak.incident.secret_delivery:
    path: app/backend
    fields:
      JWT_SECRET: JWT_SECRET
      WEBHOOK_SECRET: WEBHOOK_SECRET
    version: "{{ rotation.state_after.version }}"
    env_file: /etc/app/app.env
    reload: [systemctl, reload, app]
    proof_url: https://app.example.com/internal/secret-proof
    incident_id: INC-2026-1120-001
    vault_url: https://vault.example.com:8200
"""

RETURN = r"""
changes:
  description: What was changed, or would be in check mode, in this order.
  returned: always
  type: list
  elements: dict
  sample: [{"action": "update", "target": "JWT_SECRET in /etc/app/app.env", "reversible": false}]
estimate: {description: "Counts, shown and never compared. This control has none.", returned: always, type: dict, sample: {}}
state_before: {description: "What this control manages, before.", returned: always, type: dict}
state_after: {description: What this control manages afterwards; in check mode as planned., returned: always, type: dict}
diff: {description: The part that differs., returned: always, type: dict}
incident_id: {description: The incident., returned: always, type: str, sample: INC-2026-1120-001}
mark: {description: "Names incident and round, for the record.", returned: always, type: str, sample: INC-2026-1120-001/1}
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

from ansible_collections.firebreak.incident.plugins.module_utils import _delivery, _host_file, _vault
from ansible_collections.firebreak.incident.plugins.module_utils._control import Control
from ansible_collections.firebreak.incident.plugins.module_utils._errors import FirebreakError, Refused, Unproven
from ansible_collections.firebreak.incident.plugins.module_utils._module import run_module
from ansible_collections.firebreak.incident.plugins.module_utils._plan import Change, Facts, Plan
from ansible_collections.firebreak.incident.plugins.module_utils._proof import answers_with

STOLEN = "the value that stood there is stolen"
SPEC: dict[str, Any] = {
    "argument_spec": {
        "engine_mount_point": {"type": "str", "default": "secret"},
        "path": {"type": "str", "required": True},
        "fields": {"type": "dict", "required": True},
        "version": {"type": "int"},
        "destination": {"type": "str", "choices": ["env_file"], "default": "env_file"},
        "env_file": {"type": "str", "required": True},
        "reload": {"type": "list", "elements": "str", "required": True},
        "proof_url": {"type": "str", "required": True},
        "proof_patience": {"type": "float", "default": 10.0},
    }
}


def read(client: _vault.Client, params: dict[str, Any]) -> Facts:
    """The host compares: the facts say whether a value is the current one, never what it is."""
    _check_options(params)
    secret = client.read_secret(params["engine_mount_point"], params["path"]) or {"version": 0, "data": None}
    data = secret["data"] or {}
    # What no file can hold as it stands in Vault (null, true, an object) is not there for a consumer.
    texts = {field: str(value) for field, value in data.items() if type(value) in (str, int)}
    values = {name: client.secret(texts[field]) for field, name in params["fields"].items() if field in texts}
    seen, standings = _delivery.compare(client.host, params["env_file"], values, client.left())
    client.held.update(seen=seen, values=values, version=secret["version"])
    fields = {name: standings.get(name, "unknown") for name in params["fields"].values()}
    version = max(secret["version"], params["version"] or 0)
    if version > secret["version"]:  # what will be there is in no file yet
        fields = {name: "stale" if standing == "current" else standing for name, standing in fields.items()}
        return {"version": version, "fields": fields, "consumer": "stale"}
    return {"version": version, "fields": fields, "consumer": _consumer(client, params, values)}


def _consumer(client: _vault.Client, params: dict[str, Any], values: dict[str, str]) -> str:
    try:
        answers = [answers_with(client, params["proof_url"], name, value) for name, value in values.items()]
    except Unproven as failure:
        client.held["why"] = failure.msg
        return "unreachable"
    return "current" if all(answers) else "stale"


def plan(params: dict[str, Any], facts: Facts) -> Plan:
    _check_options(params)
    if unknown := sorted(field for field, name in params["fields"].items() if facts["fields"][name] == "unknown"):
        raise Refused(f"fields: {params['engine_mount_point']}/{params['path']} has no readable {', '.join(unknown)}")
    after, changes = dict(facts), []
    stale = sorted(name for name, standing in facts["fields"].items() if standing != "current")
    if stale:
        after["fields"] = dict.fromkeys(facts["fields"], "current")
        target = f"{', '.join(stale)} in {params['env_file']}"
        data = {"step": "write", "version": facts["version"]}
        changes.append(Change("update", target, ("fields",), irreversible=STOLEN, data=data))
    if facts["consumer"] != "current":
        after["consumer"] = "current"
        target = f"reload of the consumer of {params['env_file']}"
        changes.append(Change("run", target, ("consumer",), irreversible=STOLEN, data={"step": "reload"}))
    return Plan(facts, after, tuple(changes))


def _check_options(params: dict[str, Any]) -> None:
    names = list(params["fields"].values())
    if not names or len(set(names)) < len(names):
        raise Refused("fields must map at least one field, each to a name of its own")
    if not all(isinstance(name, str) and re.fullmatch(_delivery.NAME, name) for name in names):
        raise Refused("fields: a name in an env file consists of letters, digits and underscores")
    if not params["env_file"].startswith("/"):
        raise Refused("env_file must be a full path on the host")
    if not params["reload"]:
        raise Refused("reload is empty")


def apply(client: _vault.Client, params: dict[str, Any], change: Change) -> None:
    if change.data["step"] == "reload":
        _host_file.run_command(client.host, params["reload"], "reload", client.left())
        return
    held = client.held
    if held["version"] < change.data["version"]:
        raise FirebreakError(
            f"Vault holds version {held['version']} of the secret, not yet {change.data['version']}", "none"
        )
    _delivery.replace(client.host, params["env_file"], held["seen"], held["values"], client.left())


def prove(client: _vault.Client, params: dict[str, Any], change: Change) -> None:
    if change.data["step"] != "reload":
        return
    until = client.clock() + min(params["proof_patience"], client.left())
    while (consumer := _consumer(client, params, client.held["values"])) != "current":
        if client.clock() >= until:
            why = client.held["why"] if consumer == "unreachable" else "it does not use the new values"
            raise Unproven(f"reloaded, but proof_url shows that the consumer is {consumer}: {why}")
        client.sleep(0.1)


CONTROL = Control("secret_delivery", _vault, SPEC, read, plan, apply, prove, needs_host=True)


def main() -> None:
    run_module(CONTROL)


if __name__ == "__main__":
    main()
