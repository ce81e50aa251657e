#!/usr/bin/python
# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: own_access_info
short_description: See how the systems see this run
version_added: 1.0.0
description:
  - Asks the services of a host, and the host over its own connection, from which address, as which role and with which token this run
    comes to them. The option O(seen) of each control protects it.
  - PostgreSQL tells its role and the address of the client, Redis and Valkey the same, Vault the accessor of the token, Cloudflare the
    token's id, and an SSH server the address. No token is returned.
  - A service that does not answer within two seconds is a warning. It is asked in check mode too, and nothing is changed.
  - Off the lab, addresses of loopback and of a link are left out, since others see this run come from elsewhere.
author: The firebreak.incident contributors (@firebreak)
extends_documentation_fragment:
  - firebreak.incident.attributes
  - firebreak.incident.common
  - firebreak.incident.cloudflare
  - firebreak.incident.postgresql
  - firebreak.incident.redis
  - firebreak.incident.vault
seealso:
  - module: firebreak.incident.cloudflare_ip_list
  - module: firebreak.incident.postgresql_login_lock
"""

EXAMPLES = r"""
- name: See how the database sees this run
  firebreak.incident.own_access_info:
    incident_id: INC-2026-1120-001
    postgresql_host: 192.0.2.10
    postgresql_user: firebreak
  register: access

- name: Block the attack, but never where this run comes from
  firebreak.incident.cloudflare_ip_list:
    name: attackers
    items: [198.51.100.0/24]
    seen: ["{{ access.seen }}"]
    incident_id: INC-2026-1120-001
"""

RETURN = r"""
seen:
  description: The host, and what it sees of this run as C(addresses), C(roles) and C(tokens) (ids or accessors).
  returned: always
  type: dict
  sample: {"host": "pg1", "addresses": ["203.0.113.9"], "roles": ["firebreak"], "tokens": []}
incident_id:
  description: The incident.
  returned: always
  type: str
  sample: INC-2026-1120-001
"""

from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils import _access
from ansible_collections.firebreak.incident.plugins.module_utils._control import Info
from ansible_collections.firebreak.incident.plugins.module_utils._module import run_module

SPEC: dict[str, Any] = {"argument_spec": {}}


def read(client: _access.Client, params: dict[str, Any]) -> dict[str, Any]:
    seen, silent = client.identity()
    host = str(params.get("host") or "localhost")
    warnings = [f"{host} does not say how it sees this run, which is not protected there: {why}" for why in silent]
    return {"seen": {"host": host, **seen}, **({"warnings": warnings} if warnings else {})}


CONTROL = Info(name="own_access_info", service=_access, spec=SPEC, read=read)


def main() -> None:
    run_module(CONTROL)


if __name__ == "__main__":
    main()
