# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The smallest control that talks to a server: it reads one setting, writes it, and reads it again."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils._control import Context, Control
from ansible_collections.firebreak.incident.plugins.module_utils._module import run_module
from ansible_collections.firebreak.incident.plugins.module_utils._plan import Change, Facts, Plan

SPEC = {"argument_spec": {"name": {"type": "str", "required": True}, "value": {"type": "str", "required": True}}}


class Client:
    """One connection to the service, kept open."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port)

    def call(self, method: str, name: str, value: str | None = None) -> str | None:
        self._connection.request(method, f"/{name}", json.dumps({"value": value}))
        return json.loads(self._connection.getresponse().read())["value"]

    def close(self) -> None:
        self._connection.close()


class Service:
    """The client file of this control."""

    SPEC = {"bench_url": {"type": "str"}}

    @staticmethod
    def preload() -> None: ...

    @staticmethod
    def addresses(params: dict[str, Any]) -> list[str]:
        return [str(params["bench_url"])]

    @staticmethod
    def connect(params: dict[str, Any], context: Context) -> Client:
        return Client(params["bench_url"])


def read(client: Client, params: dict[str, Any]) -> Facts:
    return {"value": client.call("GET", params["name"])}


def plan(params: dict[str, Any], facts: Facts) -> Plan:
    if facts["value"] == params["value"]:
        return Plan(facts, facts)
    undo = {"name": params["name"], "value": facts["value"]}
    return Plan(facts, {"value": params["value"]}, (Change("update", params["name"], ("value",), undo=undo),))


def apply(client: Client, params: dict[str, Any], change: Change) -> None:
    client.call("PUT", params["name"], params["value"])


CONTROL = Control(name="setting", service=Service, spec=SPEC, read=read, plan=plan, apply=apply)


def main() -> None:
    run_module(CONTROL)


if __name__ == "__main__":
    main()
