# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab behind bad networks: each system of the inventory behind a proxy of its own, that tests can break."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .client import Lab
from .tcp_proxy import Tap, TcpProxy

PORTS = ("firebreak_postgresql_port", "firebreak_pgbouncer_port", "firebreak_redis_port", "ansible_port")
URLS = ("firebreak_cloudflare_url", "firebreak_vault_url")


@contextlib.contextmanager
def proxied(lab: Lab, inventory: Path) -> Iterator[dict[str, TcpProxy]]:
    """Write an inventory whose systems are reached through a proxy each; gives the proxies by host."""
    copy = json.loads(json.dumps(lab.inventory))
    with contextlib.ExitStack() as stack:
        proxies: dict[str, TcpProxy] = {}
        for group in copy["all"]["children"].values():
            for host, values in group["hosts"].items():
                proxies[host] = stack.enter_context(between(values))
        inventory.write_text(json.dumps(copy, indent=2))
        inventory.chmod(0o600)
        yield proxies


def between(values: dict[str, Any], prefix: str = "firebreak_", tap: Tap | None = None) -> TcpProxy:
    """Put a proxy before the first address that the host has; its Vault, if it has another, stays as it is.

    Without the prefix these are the options of a task instead of a host's variables.
    """
    for name in (name.replace("firebreak_", prefix) for name in PORTS):
        if name in values:
            proxy = TcpProxy(("127.0.0.1", values[name]), tap=tap)
            values[name] = proxy.port
            if name == "ansible_port":  # the host's key is known under the old port
                values["ansible_ssh_common_args"] += " -o HostKeyAlias=lab-app"
            return proxy
    for name in (name.replace("firebreak_", prefix) for name in URLS):
        if name in values:
            parts = urlsplit(values[name])
            proxy = TcpProxy((str(parts.hostname), int(parts.port or 80)), tap=tap)
            values[name] = parts._replace(netloc=f"127.0.0.1:{proxy.port}").geturl()
            return proxy
    raise LookupError("a host without an address")
