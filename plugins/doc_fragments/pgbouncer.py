# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.

from __future__ import annotations


class ModuleDocFragment:
    """Options of every control that talks to PgBouncer."""

    DOCUMENTATION = r"""
options:
  pgbouncer_host:
    description: Name or address of the pool, where its clients reach it.
    type: str
  pgbouncer_port:
    description: Its port.
    type: int
    default: 6432
  pgbouncer_user:
    description:
      - One of the pool's C(admin_users), who may give commands on its console.
      - It should be a role of the database server as well, which shows that a new client lands where it should.
    type: str
  pgbouncer_password:
    description:
      - Its password. Off the lab, E(PGPASSWORD) of the task is used where this is not set.
      - Nothing else is taken from libpq's environment variables, its password file or its service file.
    type: str
  pgbouncer_sslmode:
    description: Whether the connection is encrypted, and whether the pool's certificate is checked.
    type: str
    choices: [disable, allow, prefer, require, verify-ca, verify-full]
    default: prefer
  pgbouncer_ca_cert:
    description: File with the certificates that may have signed the pool's, or V(system) for those of the system.
    type: str
requirements:
  - psycopg >= 3.2
"""
