# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.

from __future__ import annotations


class ModuleDocFragment:
    """What every control of this collection supports."""

    DOCUMENTATION = r"""
attributes:
  check_mode:
    description: Can run in check mode and predict exactly what the real run does, without writing anything anywhere.
    support: full
  diff_mode:
    description: Returns what was changed, or would be, as a diff of non-secret facts.
    support: full
  idempotent:
    description: Run again with the same options for the same incident and round, it changes nothing.
    support: full
  action_group:
    description: Use C(group/firebreak.incident.all) in C(module_defaults) to set the common options for all controls.
    support: full
    membership:
      - firebreak.incident.all
"""
