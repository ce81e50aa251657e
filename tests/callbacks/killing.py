# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Kills its own run at the n-th boundary of a task, or only counts them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = r"""
name: killing
type: aggregate
short_description: Kill the run at a task's boundary
description:
  - A boundary is the start of a task, and the result of a host. At the one that TEST_KILL_AT names, the whole process group is killed.
  - The number of boundaries so far stands in the file that TEST_BOUNDARIES names.
"""


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "killing"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._victim = int(os.environ.get("TEST_KILL_AT", "0"))
        self._file = Path(os.environ["TEST_BOUNDARIES"])
        self._seen = 0

    def _boundary(self, *_unused: Any, **_more: Any) -> None:
        self._seen += 1
        self._file.write_text(str(self._seen))
        if self._seen == self._victim:
            os.killpg(os.getpgrp(), signal.SIGKILL)

    v2_playbook_on_task_start = _boundary
    v2_runner_on_ok = _boundary
    v2_runner_on_failed = _boundary
    v2_runner_on_skipped = _boundary
    v2_runner_on_unreachable = _boundary
