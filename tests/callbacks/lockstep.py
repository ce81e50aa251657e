# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hands each result of a play to the test that runs it, and holds the play until the test has looked."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: lockstep
type: aggregate
short_description: Holds a play after each task
description: Used by the tests of this collection only.
"""


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "lockstep"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._line = socket.socket(fileno=int(os.environ["FIREBREAK_LOCKSTEP"]))

    def _tell(self, result: Any, status: str) -> None:
        told = {"task": result.task_name, "host": result.host.name, "status": status, "result": result.result}
        self._line.sendall(json.dumps(told, default=str).encode() + b"\n")
        self._line.recv(1)

    def v2_runner_on_ok(self, result: Any) -> None:
        self._tell(result, "ok")

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        self._tell(result, "failed")

    def v2_runner_on_unreachable(self, result: Any) -> None:
        self._tell(result, "unreachable")
