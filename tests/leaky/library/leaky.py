# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A control that gives its password away, in as many ways as there are places to look: what proves that the search finds it."""

from __future__ import annotations

import base64
import gzip
import os
import subprocess
import tempfile
import urllib.parse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils._control import Control
from ansible_collections.firebreak.incident.plugins.module_utils._errors import FirebreakError
from ansible_collections.firebreak.incident.plugins.module_utils._module import run_module
from ansible_collections.firebreak.incident.plugins.module_utils._plan import Change, Plan

SECONDS = "0.6"
SPEC: dict[str, Any] = {
    "argument_spec": {
        "way": {"type": "str", "required": True},
        "password": {"type": "str", "no_log": True},
        "place": {"type": "path", "required": True},
        "present": {"type": "bool", "default": True},
    }
}


def base64_of(password: str) -> str:
    """The engine cannot know every spelling; it knows the password itself."""
    return base64.b64encode(b"user:" + password.encode()).decode()


def connect(params: dict[str, Any], context: Any) -> Any:
    return SimpleNamespace(evidence=context.evidence, params=params, close=lambda: None)


def _file(params: dict[str, Any]) -> Path:
    return Path(params["place"]) / f"effect of {params['way']}"


def read(client: Any, params: dict[str, Any]) -> dict[str, Any]:
    if params["way"] == "crash":
        try:
            raise ValueError(params["password"])
        except ValueError as failure:
            raise KeyError(params["password"]) from failure
    if params["way"] == "exit":
        raise SystemExit(params["password"])
    if params["way"] == "evidence":
        client.evidence.exists("leak.txt")
    return {"there": _file(params).exists()}


def plan(params: dict[str, Any], facts: dict[str, Any]) -> Plan:
    if facts["there"] == params["present"]:
        return Plan(facts, facts)
    hidden = params["password"] and base64_of(params["password"])
    target = hidden if params["way"] in ("journal", "spool") else "the file"
    data = {"note": hidden * 500} if params["way"] == "blob" else {}
    undo = {"way": params["way"], "place": params["place"], "present": not params["present"]}
    change = Change("create", target, ("there",), undo=undo, data=data)
    estimate = {"note": params["password"].encode().hex()} if params["way"] == "result" else {}
    return Plan(facts, {"there": params["present"]}, (change,), estimate)


def apply(client: Any, params: dict[str, Any], change: Change) -> None:
    way, password = params["way"], params["password"]
    if way == "failure":
        raise FirebreakError(f"it did not work with {base64_of(password)}, nor with {password}")
    if way == "temporary file":
        Path(tempfile.mkstemp()[1]).write_bytes(gzip.compress(password.encode()))
    if way == "command line":
        subprocess.run(["sh", "-c", f"sleep {SECONDS}; :", urllib.parse.quote(password)], check=True)
    if way == "environment of a process":
        subprocess.run(["sleep", SECONDS], env={**os.environ, "GIVEN": password}, check=True)
    if way == "evidence":
        client.evidence.write("leak.txt", [password.encode()], {"covers": []})
    _file(params).touch()


SERVICE = SimpleNamespace(SPEC={}, preload=lambda: None, addresses=lambda params: [], connect=connect)
CONTROL = Control("leaky", SERVICE, SPEC, read, plan, apply)


def main() -> None:
    run_module(CONTROL)


if __name__ == "__main__":
    main()
