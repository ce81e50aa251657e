# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.

from __future__ import annotations


class ModuleDocFragment:
    """The options that every control has. The playbooks set them from the variables of the same name with firebreak_ in front."""

    DOCUMENTATION = r"""
options:
  case_store:
    description:
      - Where the case is kept, as C(file:///folder) or
        C(s3://bucket/prefix?region=..&endpoint=..&lock_mode=GOVERNANCE&retention_days=90).
      - Lock mode and retention of S3 Object Lock have no default.
      - Required, except in check mode.
    type: str
  case_access_key_id:
    description: Access key of an S3 case store. Off the lab E(AWS_ACCESS_KEY_ID) is used where it is not given.
    type: str
  case_secret_access_key:
    description: Secret key of an S3 case store. Off the lab E(AWS_SECRET_ACCESS_KEY) is used where it is not given.
    type: str
  incident_id:
    description:
      - The incident that this belongs to, as M(firebreak.incident.incident) returns it.
      - Required, except in check mode.
    type: str
  round:
    description: The round of the incident. A second round rotates, revokes and exports again, because the thief came back.
    type: int
    default: 1
  site:
    description:
      - The site that the inventory stands for. V(lab) talks to loopback only and takes nothing from the environment.
      - Required.
    type: str
  phase:
    description: The phase of the incident playbook, for the record.
    type: str
  host:
    description: The system under protection, for the record. The action fills in the inventory's name.
    type: str
  owner:
    description: Who owns the control until it is released. Required off the lab.
    type: str
  expires:
    description: When the control is looked at again, as a UTC time. M(firebreak.incident.incident) returns seven days after the opening.
    type: str
  on_expiry:
    description: Whether an expired control is lifted by C(firebreak.incident.clock_tick) or only reported.
    type: str
    choices: [remind, release]
    default: remind
  protected:
    description:
      - What no control may cover. Required off the lab.
      - A control that would is refused as a whole, and says what is protected; nothing overrides that.
    type: dict
    suboptions:
      addresses:
        description:
          - Addresses and networks in CIDR form. One that is written as IPv4-mapped IPv6, or as the IPv6 address that NAT64 or 6to4 makes
            of it, is the same.
        type: list
        elements: str
      countries:
        description: ISO 3166 codes.
        type: list
        elements: str
      roles:
        description: Roles of databases.
        type: list
        elements: str
      accounts:
        description: Accounts of the application, as they stand in the keys of their sessions.
        type: list
        elements: str
      tokens:
        description: Ids or accessors of tokens, never the tokens.
        type: list
        elements: str
      keys:
        description: Ids of access keys.
        type: list
        elements: str
  seen:
    description:
      - What the systems see of this run itself, as M(firebreak.incident.own_access_info) returns it. It is protected as well.
      - The playbooks look once at their beginning.
    type: list
    elements: dict
    suboptions:
      host:
        description: The system that sees it.
        type: str
        required: true
      addresses:
        description: Where this run comes from, for this system. They are protected everywhere.
        type: list
        elements: str
      roles:
        description: As whom it came. They are protected on this system.
        type: list
        elements: str
      tokens:
        description: The ids or accessors of the tokens that it uses.
        type: list
        elements: str
  break_glass:
    description: Guards that are overridden today, with the reason. Give it on the command line; a date other than today's is refused.
    type: list
    elements: dict
    suboptions:
      guard:
        description: The guard, as its refusal names it.
        type: str
        required: true
      reason:
        description: Why. It becomes an entry of the case.
        type: str
        required: true
      date:
        description: Today's date in UTC, as C(YYYY-MM-DD).
        type: str
        required: true
  evidence:
    description:
      - The exports that cover what a destroying control destroys, each as C(host/round/name), as an export returns it.
    type: list
    elements: str
  evidence_patience:
    description:
      - Seconds that a destroying control waits for an export that was begun. Afterwards it goes on, and says so in the case.
      - Without it 120 in an incident of SEV-1, else 900.
    type: float
  assumed:
    description:
      - What an earlier task of the same control has planned, its C(state_after), so that a dry run of several steps predicts each of them.
      - Used in check mode only.
    type: dict
  unattended:
    description: Whether no person watches this run. Then only what can be undone is changed, at most 25 times an hour.
    type: bool
    default: false
  two_person:
    description: Whether what cannot be undone, or overrides a guard, needs a recorded decision of somebody else.
    type: bool
    default: false
"""
