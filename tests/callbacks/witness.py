# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Writes down all that Ansible lets a callback see, as a curious one would."""

from __future__ import annotations

import json
import os
from typing import Any

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = r"""
name: witness
type: aggregate
short_description: Write down all that a callback sees
description: Appends one line of JSON for each event to the file that the environment variable TEST_WITNESS names.
"""


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "witness"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._play: Any = None
        self._known: dict[str, set[str]] = {}

    def _write(self, event: str, *seen: Any) -> None:
        with open(os.environ["TEST_WITNESS"], "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "seen": seen}, default=str) + "\n")

    def _variables(self) -> dict[str, dict[str, Any]]:
        manager = self._play.get_variable_manager()
        hosts = manager._inventory.get_hosts()
        return {host.name: dict(manager.get_vars(play=self._play, host=host)) for host in hosts}

    def v2_playbook_on_start(self, playbook: Any) -> None:
        self._write("start", vars(playbook))

    def v2_playbook_on_play_start(self, play: Any) -> None:
        self._play = play
        self._write("play", play.dump_attrs(), vars(play))
        if not self._known:  # the user's own variables
            self._known = {host: set(variables) for host, variables in self._variables().items()}

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        self._write("task", task.dump_attrs())

    def _result(self, event: str, result: Any) -> None:
        self._write(event, result.task.dump_attrs(), vars(result.task), result.result, vars(result))

    def v2_runner_on_ok(self, result: Any) -> None:
        self._result("ok", result)

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        self._result("failed", result)

    def v2_runner_on_unreachable(self, result: Any) -> None:
        self._result("unreachable", result)

    def v2_runner_on_skipped(self, result: Any) -> None:
        self._result("skipped", result)

    def v2_runner_retry(self, result: Any) -> None:
        self._result("retry", result)

    def v2_runner_item_on_ok(self, result: Any) -> None:
        self._result("item ok", result)

    def v2_runner_item_on_failed(self, result: Any) -> None:
        self._result("item failed", result)

    def v2_on_file_diff(self, result: Any) -> None:
        self._result("diff", result)

    def v2_runner_on_async_ok(self, result: Any) -> None:
        self._result("async ok", result)

    def v2_runner_on_async_failed(self, result: Any) -> None:
        self._result("async failed", result)

    def v2_playbook_on_stats(self, stats: Any) -> None:
        new = {
            host: {name: value for name, value in variables.items() if name not in self._known.get(host, ())}
            for host, variables in self._variables().items()
        }
        self._write("end", vars(stats), new)
