# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.

from __future__ import annotations


class ModuleDocFragment:
    """Options of every control that talks to Cloudflare."""

    DOCUMENTATION = r"""
options:
  cloudflare_url:
    description:
      - Address of the API.
      - A redirect is refused, because it would take the token along. Proxies of the environment are not used.
    type: str
    default: https://api.cloudflare.com/client/v4
  cloudflare_token:
    description:
      - API token. Off the lab, E(CLOUDFLARE_API_TOKEN) of the task is used where this is not set.
      - Global API keys and the other variables of the SDK are never used.
    type: str
  cloudflare_account_id:
    description:
      - The account, 32 hexadecimal digits. Lists belong to an account.
    type: str
  cloudflare_zone_id:
    description:
      - The zone, 32 hexadecimal digits. Rules belong to a zone.
    type: str
requirements:
  - cloudflare >= 5.7.0
  - httpx >= 0.25.0
"""
