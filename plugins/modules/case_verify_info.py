#!/usr/bin/python
# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: case_verify_info
short_description: Prove that nobody altered a case
version_added: 1.0.0
description:
  - Recomputes the hash chain of every stream, compares every seal, and recomputes the hash of every artefact.
  - Names the first entry that is bad. It needs the case store only, and changes nothing.
  - A chain can be written anew from end to end by whoever owns a file store. Only O(expect), a seal's hash that was sent out, shows that.
author: The firebreak.incident contributors (@firebreak)
extends_documentation_fragment:
  - firebreak.incident.attributes
  - firebreak.incident.common
options:
  expect:
    description: The hash of a seal, as a message or a last screen told it.
    type: str
"""

EXAMPLES = r"""
- name: Verify the case against the hash in the last message
  firebreak.incident.case_verify_info:
    incident_id: INC-2026-1120-001
    expect: "{{ digest_from_the_message }}"

- name: Verify it before a release
  firebreak.incident.case_verify_info:
    incident_id: INC-2026-1120-001
"""

RETURN = r"""
valid:
  description: Whether every entry, seal and artefact is as it was written.
  returned: always
  type: bool
first_bad:
  description: The first entry that is not, with the reason.
  returned: always
  type: dict
bad:
  description: All of them, up to a hundred.
  returned: always
  type: list
  elements: dict
entries:
  description: How many entries were verified.
  returned: always
  type: int
streams:
  description: In how many streams.
  returned: always
  type: int
seals:
  description: The seals, with turn and hash.
  returned: always
  type: list
  elements: dict
skew:
  description:
    - By how many seconds the clocks of the machines that wrote differ, at least. It alters nothing, since the order of entries is that
      of the chain, never a clock's.
  returned: always
  type: float
  sample: 0.0
incident_id:
  description: The incident.
  returned: always
  type: str
  sample: INC-2026-1120-001
"""

from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils import _case, _verify
from ansible_collections.firebreak.incident.plugins.module_utils._control import Info
from ansible_collections.firebreak.incident.plugins.module_utils._errors import FirebreakError
from ansible_collections.firebreak.incident.plugins.module_utils._module import run_module

SKEW_SECONDS = 5.0
SPEC: dict[str, Any] = {"argument_spec": {"expect": {"type": "str"}}}


def read(client: _case.Case, params: dict[str, Any]) -> dict[str, Any]:
    seen = _verify.verify(client, params["expect"])
    if not seen["valid"]:
        first = seen["first_bad"]
        raise FirebreakError(f"the case {client.id} was altered: {first['entry']}: {first['why']}", **seen)
    seen["screen"] = [
        f"{client.id}: {seen['entries']} entries in {seen['streams']} streams, {len(seen['seals'])} seals: all as written"
    ]
    if seen["skew"] > SKEW_SECONDS:
        seen["screen"].append(
            f"The clocks of its machines differ by {seen['skew']:.0f} s or more: go by the order of entries, not by their times"
        )
    return seen


CONTROL = Info(name="case_verify_info", service=_case, spec=SPEC, read=read)


def main() -> None:
    run_module(CONTROL)


if __name__ == "__main__":
    main()
