# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lowest places that a request to each service goes through in our process."""

from __future__ import annotations

from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils import (
    _cloudflare,
    _pgbouncer,
    _postgresql,
    _redis,
    _vault,
)
from tests.contract.rotation_walk import LocalHost

REQUESTS: dict[Any, list[tuple[Any, str]]] = {
    _cloudflare: [(_cloudflare.Client, "_send")],
    _postgresql: [(_postgresql.Client, "rows"), (_postgresql.Client, "run")],
    _pgbouncer: [(_pgbouncer.Client, "_say"), (LocalHost, "run")],
    _redis: [(_redis, "_ask"), (_redis._Work, "_send")],
    _vault: [(_vault.Client, "_send"), (LocalHost, "run")],
}
