#!/usr/bin/python
# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: health_gate
short_description: Wait until users get in and the thief does not
version_added: 1.0.0
author: The firebreak.incident contributors (@firebreak)
description:
  - Sends HTTP requests, all checks at once, again and again until every check passes, for as long as O(for_seconds) says, or O(timeout) is
    over. The verdict is written to the case, and a gate that does not pass fails the task.
  - A check passes when its request is served as expected, or, with V(refuse), when it is refused. That is how a thief's doors are tried.
  - A door whose service does not answer, or answers with an error of its own, is neither open nor closed. Such a check does not pass, and
    says V(unknown).
  - Redirects are not followed, and no proxy is used. No header and no body, sent or received, is shown.
extends_documentation_fragment:
  - firebreak.incident.attributes
  - firebreak.incident.common
options:
  checks:
    description: What is tried.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Names the check, once.
        type: str
        required: true
      url:
        description: Where to.
        type: str
        required: true
      method:
        description: The method of HTTP.
        type: str
        default: GET
      headers:
        description: Headers to send.
        type: dict
      body:
        description: A text is sent as it is, anything else as JSON.
        type: raw
      must:
        description: Whether the request must be served or be refused.
        type: str
        choices: [pass, refuse]
        default: pass
      expect_status:
        description: The statuses that count as served, V([200]) when left out, or as refused, V([401, 403]) when left out.
        type: list
        elements: int
      unreachable_is_refused:
        description: With O(checks[].must=refuse), whether a refused connection counts as refusal, for a door that is meant to be gone.
        type: bool
        default: false
      expect:
        description: What else a served answer must show.
        type: dict
        suboptions:
          contains:
            description: A text in the body.
            type: str
          present:
            description: Fields of a JSON body that are there and not empty. A dot leads into a mapping.
            type: list
            elements: str
          equals:
            description: Fields of a JSON body and their values.
            type: dict
          rising:
            description: A metric in Prometheus' text format whose sum over all labels is higher in a second read one second later.
            type: str
      then:
        description: A second request with the bearer token that the first answer brought, such as one for the user's own data.
        type: dict
        suboptions:
          url:
            description: Where to.
            type: str
            required: true
          field:
            description: The field of the first answer's JSON body that holds the token.
            type: str
            default: access_token
          expect_status:
            description: The statuses that pass.
            type: list
            elements: int
            default: [200]
      source_address:
        description: The loopback address to speak from. On the lab only, where addresses stand for users and thieves.
        type: str
  timeout:
    description: Seconds after which the gate gives up.
    type: float
    default: 30
  interval:
    description: Seconds between two rounds.
    type: float
    default: 1
  for_seconds:
    description: Seconds for which every check must pass in every round. A round that does not pass starts the watch anew.
    type: float
    default: 0
  request_timeout:
    description: Seconds to wait for a connection or for a part of an answer.
    type: float
    default: 5
  parallel:
    description: How many checks are under way at once.
    type: int
    default: 16
  ca_cert:
    description: File with the certificates that may have signed the servers'. The system's are used where this is not set.
    type: path
seealso:
  - module: firebreak.incident.redis_session_revocation
"""

EXAMPLES = r"""
- name: A test user logs in and reads its own data, and metrics go on
  firebreak.incident.health_gate:
    incident_id: INC-2026-1120-001
    for_seconds: 10
    checks:
      - name: login
        url: https://app.example.com/api/auth/login
        method: POST
        body: {email: test@example.com, password: "{{ health_gate_password }}"}
        then: {url: "https://app.example.com/api/me"}
      - name: requests are counted
        url: https://app.example.com/obs/metrics
        expect: {rising: divan_http_requests_total}

- name: The stolen token is refused
  firebreak.incident.health_gate:
    incident_id: INC-2026-1120-001
    checks:
      - name: forged token
        url: https://app.example.com/api/me
        headers: {Authorization: "Bearer {{ stolen_token }}"}
        must: refuse
"""

RETURN = r"""
passed:
  description: Whether every check passed for as long as asked.
  returned: always
  type: bool
seconds:
  description: How long it took.
  returned: always
  type: float
checks:
  description: The last round.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: Name of the check.
      type: str
      returned: always
    passed:
      description: Whether it passed.
      type: bool
      returned: always
    state:
      description: V(served), V(refused) or V(unknown).
      type: str
      returned: always
    status:
      description: The status of HTTP, or none when there was no answer.
      type: int
      returned: always
    milliseconds:
      description: Until the answer was read, all requests of the check together.
      type: float
      returned: always
    expected:
      description: What it was to show.
      type: str
      returned: always
    why:
      description: Why it did not pass, or none.
      type: str
      returned: always
incident_id:
  description: The incident.
  returned: always
  type: str
  sample: INC-2026-1120-001
"""

from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils import _http
from ansible_collections.firebreak.incident.plugins.module_utils._checks import probe
from ansible_collections.firebreak.incident.plugins.module_utils._control import Gate
from ansible_collections.firebreak.incident.plugins.module_utils._module import run_module

EXPECT: dict[str, Any] = {
    "contains": {"type": "str"},
    "present": {"type": "list", "elements": "str"},
    "equals": {"type": "dict"},
    "rising": {"type": "str"},
}
THEN: dict[str, Any] = {
    "url": {"type": "str", "required": True},
    "field": {"type": "str", "default": "access_token"},
    "expect_status": {"type": "list", "elements": "int", "default": [200]},
}
CHECK: dict[str, Any] = {
    "name": {"type": "str", "required": True},
    "url": {"type": "str", "required": True},
    "method": {"type": "str", "default": "GET"},
    "headers": {"type": "dict", "no_log": True},
    "body": {"type": "raw", "no_log": True},
    "must": {"type": "str", "choices": ["pass", "refuse"], "default": "pass"},
    "expect_status": {"type": "list", "elements": "int"},
    "unreachable_is_refused": {"type": "bool", "default": False},
    "expect": {"type": "dict", "options": EXPECT},
    "then": {"type": "dict", "options": THEN},
    "source_address": {"type": "str"},
}
SPEC: dict[str, Any] = {
    "argument_spec": {
        "checks": {"type": "list", "elements": "dict", "required": True, "options": CHECK},
        "timeout": {"type": "float", "default": 30},
        "interval": {"type": "float", "default": 1},
        "for_seconds": {"type": "float", "default": 0},
        "request_timeout": {"type": "float", "default": 5},
        "parallel": {"type": "int", "default": 16},
        "ca_cert": {"type": "path"},
    }
}
CONTROL = Gate(name="health_gate", service=_http, spec=SPEC, probe=probe)


def main() -> None:
    run_module(CONTROL)


if __name__ == "__main__":
    main()
