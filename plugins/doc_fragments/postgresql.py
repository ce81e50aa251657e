# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.

from __future__ import annotations


class ModuleDocFragment:
    """Options of every control that talks to PostgreSQL."""

    DOCUMENTATION = r"""
options:
  postgresql_host:
    description:
      - Name or address of the server. Name the server itself, not a connection pooler before it.
    type: str
  postgresql_port:
    description: Port of the server.
    type: int
    default: 5432
  postgresql_user:
    description: The role to work with.
    type: str
  postgresql_password:
    description:
      - Its password. Off the lab, E(PGPASSWORD) of the task is used where this is not set.
      - Nothing else is taken from libpq's environment variables, its password file or its service file.
    type: str
  postgresql_database:
    description: The database to connect to.
    type: str
    default: postgres
  postgresql_sslmode:
    description: Whether the connection is encrypted, and whether the server's certificate is checked.
    type: str
    choices: [disable, allow, prefer, require, verify-ca, verify-full]
    default: prefer
  postgresql_ca_cert:
    description: File with the certificates that may have signed the server's, or V(system) for those of the system.
    type: str
requirements:
  - psycopg >= 3.2
"""
