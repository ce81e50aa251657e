# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""How a system sees whoever connects to it: from where, as whom, with which token. All services of a host at once.

No answer is a warning and never a failure: nobody waits long for it, and containing goes on.
"""

from __future__ import annotations

import contextlib
import ipaddress
import threading
from collections.abc import Callable
from typing import Any

from . import _cloudflare, _postgresql, _redis, _vault
from ._control import Context, Host
from ._errors import FirebreakError

SECONDS = 2.0
# By service: its client file, and the options that say that the host has it.
SERVICES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "cloudflare": (_cloudflare, ("cloudflare_zone_id", "cloudflare_account_id")),
    "postgresql": (_postgresql, ("postgresql_host",)),
    "redis": (_redis, ("redis_host",)),
    "vault": (_vault, ("vault_url",)),
}
KINDS = ("addresses", "roles", "tokens")
SPEC: dict[str, Any] = {}
for _service, _options in SERVICES.values():
    SPEC.update(_service.SPEC)


def preload() -> None:
    """Import what is there: what is missing is told by the control that needs it."""
    for service, _unused in SERVICES.values():
        with contextlib.suppress(Exception):
            service.preload()


def _had(params: dict[str, Any]) -> dict[str, Any]:
    """The services that this host has."""
    return {
        name: service for name, (service, options) in SERVICES.items() if any(params.get(option) for option in options)
    }


def addresses(params: dict[str, Any]) -> list[str]:
    return [address for service in _had(params).values() for address in service.addresses(params)]


def connect(params: dict[str, Any], context: Context) -> Client:
    return Client(params, context)


class Client:
    """Asks each service, and the host's own connection, beside each other."""

    def __init__(self, params: dict[str, Any], context: Context) -> None:
        self._params = params
        self._context = context

    def close(self) -> None:
        """Each question has closed its own connection."""

    def identity(self) -> tuple[dict[str, list[str]], list[str]]:
        """What is seen, by kind; and who did not answer."""
        questions: dict[str, Callable[[], dict[str, list[str]]]] = {
            name: lambda service=service: self._ask(service)  # type: ignore[misc]
            for name, service in _had(self._params).items()
        }
        host = self._context.host
        if host is not None and host.remote:
            questions["ssh"] = lambda: self._ssh(host)
        answers = {name: _Answer(question) for name, question in questions.items()}
        give_up = self._context.clock() + SECONDS
        found: dict[str, set[str]] = {kind: set() for kind in KINDS}
        silent = []
        for name, answer in answers.items():
            seen = answer.wait(max(0.0, give_up - self._context.clock()))
            if seen is None:
                silent.append(f"{name}: {answer.why}")
            for kind, values in (seen or {}).items():
                found[kind].update(values)
        lab = self._params.get("site") == "lab"
        found["addresses"] = {each for each in found["addresses"] if lab or _tells(each)}
        return {kind: sorted(values) for kind, values in found.items()}, silent

    def _ask(self, service: Any) -> dict[str, list[str]]:
        client = service.connect(self._params, self._context)
        try:
            seen: dict[str, list[str]] = client.identity()
            return seen
        finally:
            client.close()

    def _ssh(self, host: Host) -> dict[str, list[str]]:
        """sshd tells its children where the client is."""
        status, output, _errors = host.run('echo "${SSH_CONNECTION:-}"')
        first = output.decode("ascii", "replace").split()[:1] if status == 0 else []
        return {"addresses": [each for each in first if _is_address(each)]}


class _Answer:
    """One question in a thread of its own, which keeps no worker from ending."""

    def __init__(self, question: Callable[[], dict[str, list[str]]]) -> None:
        self.why = "no answer in time"
        self._question = question
        self._seen: dict[str, list[str]] | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            self._seen = self._question()
        except FirebreakError as failure:
            self.why = failure.msg
        except Exception as failure:
            self.why = f"unexpected {type(failure).__name__}"

    def wait(self, seconds: float) -> dict[str, list[str]] | None:
        self._thread.join(seconds)
        return self._seen


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _tells(address: str) -> bool:
    """Off the lab, a connection through this machine itself or its own link says nothing about where others see it."""
    parsed = ipaddress.ip_address(address)
    return not (parsed.is_loopback or parsed.is_link_local or parsed.is_unspecified)
