#!/usr/bin/python
# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: incident
short_description: Open an incident, or continue the one that is open
version_added: 1.0.0
description:
  - Looks for an open incident with the same key first and continues it. The key is O(key), else O(type), O(site) and O(affected).
  - Of many runs at the same moment one opens the incident, and all continue it.
  - An incident that nobody touched for twelve hours is not continued unasked.
author: The firebreak.incident contributors (@firebreak)
extends_documentation_fragment:
  - firebreak.incident.attributes
  - firebreak.incident.common
options:
  type:
    description: What kind of incident this is. It decides the severity where none is given.
    type: str
    required: true
    choices:
      - data_breach
      - credential_compromise
      - unauthorized_access
      - ddos
      - service_outage
      - database_failure
      - data_corruption
      - payment_failure
      - api_abuse
      - performance_degradation
      - high_error_rate
      - third_party_failure
  title:
    description: A title for people.
    type: str
  severity:
    description: SEV-1 to SEV-4, or the same as P0 to P3, or as PAGE, TICKET, INFO.
    type: str
  impact:
    description: What is hurt, as any of C (confidentiality), I (integrity), A (availability).
    type: list
    elements: str
    choices: [C, I, A]
  source:
    description: How it was found, for example the name of the alert.
    type: str
  affected:
    description: The inventory hosts that are affected. An empty list is an error, never all.
    type: list
    elements: str
    required: true
  affected_users:
    description: The accounts that are affected. Only their number is recorded.
    type: list
    elements: str
  key:
    description: What tells incidents apart, for example an alert's fingerprint.
    type: str
  new:
    description: Open another incident though one with this key is open.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Open the incident, or continue it
  firebreak.incident.incident:
    type: data_breach
    title: Customer data was read with a stolen role
    affected: [pg1, cache1, vault, cf, app]
    case_store: file:///var/lib/firebreak/cases
    site: production
    owner: ops-team
    protected:
      addresses: [203.0.113.0/24]
  register: opened

- name: Put everything back
  ansible.builtin.command:
    argv: [ansible-playbook, firebreak.incident.release, -e, "firebreak_incident_id={{ opened.incident_id }}"]
"""

RETURN = r"""
continued:
  description: Whether an incident that was open already is gone on with.
  returned: always
  type: bool
incident:
  description: The record, with title, severity (and its other two names), status, time of creation (UTC), owner.
  returned: always
  type: dict
issued_before:
  description: When this round began, in seconds since the epoch. Sessions older than that are the ones to revoke.
  returned: always
  type: float
troubles:
  description: The roles that failed in an earlier run and have not succeeded since, by host.
  returned: always
  type: dict
expires:
  description: When its controls are looked at again (UTC).
  returned: always
  type: str
incident_id:
  description: The incident.
  returned: always
  type: str
  sample: INC-2026-1120-001
"""

from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils import _case, _incident, _status
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context, Record
from ansible_collections.firebreak.incident.plugins.module_utils._errors import Refused
from ansible_collections.firebreak.incident.plugins.module_utils._module import run_module
from ansible_collections.firebreak.incident.plugins.module_utils._store import open_store

SPEC: dict[str, Any] = {
    "argument_spec": {
        "type": {"type": "str", "required": True, "choices": list(_incident.TYPES)},
        "title": {"type": "str"},
        "severity": {"type": "str"},
        "impact": {"type": "list", "elements": "str", "choices": ["C", "I", "A"]},
        "source": {"type": "str"},
        "affected": {"type": "list", "elements": "str", "required": True},
        "affected_users": {"type": "list", "elements": "str"},
        "key": {"type": "str", "no_log": False},
        "new": {"type": "bool", "default": False},
    },
}


def write(case: _case.Case | None, params: dict[str, Any], context: Context) -> dict[str, Any]:
    """Find the incident or open it, and begin the round that was asked for."""
    if not params["affected"]:
        raise Refused("affected: name the affected hosts of the inventory (firebreak_affected); empty is never all")
    severity = _incident.severity_of(params["severity"], params["type"])
    opened = False
    if case is None or case.id == _case.NO_INCIDENT:
        found = _find(params, context)
        if found is None:
            return _planned(params, severity, context)
        case, opened = found
    case.check_halt()
    state = _incident.continued(case, params)
    if not context.check_mode:
        _case.merge_spools(case)
    began = _incident.begin_round(case, state, params["round"])
    if not context.check_mode:
        state = _incident.view(case)
    shown = {
        "id": case.id,
        **{
            name: state[name]
            for name in ("type", "title", "severity", "priority", "alert", "status", "created", "owner")
        },
    }
    return {
        "changed": opened or began,
        "continued": not opened,
        "incident_id": case.id,
        "incident": shown,
        "issued_before": state["rounds"].get(str(params["round"]), context.clock()),
        "expires": state["expires"],
        "troubles": {} if opened else _status.troubles(case),
        "diff": {"before": {}, "after": shown if opened else {}},
        "screen": _told(shown, opened, params["round"]),
    }


def _told(shown: dict[str, Any], opened: bool, number: int) -> list[str]:
    """The first line of a run: which incident this is."""
    name = f"{shown['id']}: {shown['title']}, {shown['severity']}, opened {shown['created'][:19]}Z"
    if opened:
        return [f"new incident {name}"]
    return [
        f"continuing {name}, round {number}",
        "What was rotated, revoked and exported in this round counts as done. -e firebreak_round=<next> does it again,",
        "-e firebreak_incident_new=true opens another incident.",
    ]


def _find(params: dict[str, Any], context: Context) -> tuple[_case.Case, bool] | None:
    if not params.get("case_store") and context.check_mode:
        return None
    store = open_store(params, context)
    _case.Case(store, _case.NO_INCIDENT, params, context).check_halt()
    try:
        return _incident.find_or_open(store, params, context)
    except LookupError:
        return None


def _planned(params: dict[str, Any], severity: str, context: Context) -> dict[str, Any]:
    priority, alert = _incident.CROSSWALK[severity]
    shown = {
        "type": params["type"],
        "title": params["title"],
        "severity": severity,
        "priority": priority,
        "alert": alert,
    }
    return {
        "changed": True,
        "continued": False,
        "incident_id": _case.NO_INCIDENT,
        "incident": {"id": _case.NO_INCIDENT, **shown, "status": "Active", "owner": params["owner"]},
        "issued_before": context.clock(),
        "expires": "",
        "troubles": {},
        "diff": {"before": {}, "after": shown},
        "screen": [f"would open an incident: {params['type']}, {severity}"],
    }


CONTROL = Record(name="incident", service=None, spec=SPEC, write=write, opens=True)


def main() -> None:
    run_module(CONTROL)


if __name__ == "__main__":
    main()
