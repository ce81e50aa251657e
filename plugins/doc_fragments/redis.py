# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.

from __future__ import annotations


class ModuleDocFragment:
    """Options of every control that talks to Redis or Valkey."""

    DOCUMENTATION = r"""
options:
  redis_host:
    description: Name or address of the primary.
    type: str
  redis_port:
    description: Its port.
    type: int
    default: 6379
  redis_username:
    description: The ACL user to work as. The default user where this is not set.
    type: str
  redis_password:
    description: Its password. Off the lab, E(REDISCLI_AUTH) of the task is used where this is not set.
    type: str
  redis_db:
    description: Number of the database.
    type: int
    default: 0
  redis_tls:
    description: Whether to use TLS. The server's certificate and name are checked against the system's certificates.
    type: bool
    default: false
requirements:
  - redis >= 8.0
"""
