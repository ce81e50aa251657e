# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.

from __future__ import annotations


class ModuleDocFragment:
    """Options of every control that talks to Vault or OpenBao."""

    DOCUMENTATION = r"""
options:
  vault_url:
    description:
      - Address of Vault or OpenBao, for example V(https://vault.example.com:8200).
      - It must lead to the active node or a load balancer. A redirect is refused, because it would take the token along.
    type: str
  vault_token:
    description:
      - The token to work with. Off the lab, E(VAULT_TOKEN) of the task is used where this is not set.
    type: str
  vault_namespace:
    description:
      - Namespace of Vault Enterprise or OpenBao. Refused on a server without namespaces, which would ignore it.
    type: str
  vault_ca_cert:
    description:
      - File with the certificates that may have signed the server's. The system's are used where this is not set.
    type: str
requirements:
  - hvac >= 2.3.0
"""
