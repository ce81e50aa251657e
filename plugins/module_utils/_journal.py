# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""The journal of a task: its stream in the case, and the spool behind it while the store is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from . import _case
from ._case import Entry, Stream
from ._errors import FirebreakError, StoreUnavailable
from ._task import Task, identity


class Journal:
    """A stream to write to, and the spool behind it while the store is lost."""

    def __init__(self, task: Task, stack: contextlib.ExitStack, releasing: bool) -> None:
        if task.case is None:
            raise FirebreakError("internal: no case", effect="none")
        self.task = task
        self.lost = False
        self.stream: Stream = task.case.stream(task.host, getattr(task.control, "evidence", False))
        self._case = task.case
        self._patience = task.seconds + task.control.settle
        self._halt = None if releasing else self._case.store.beside(self._case.check_halt)
        try:
            stack.enter_context(self.stream.writer(self._patience))
        except StoreUnavailable:
            self.lost = True

    def settling(self) -> Callable[[], bool]:
        """Begin to ``settle``; what is returned waits for it."""
        return self._case.store.beside(self.settle)

    def settle(self) -> bool:
        """Nobody else is at work, the incident is there and under no HALT. False where somebody was at work until now."""
        quiet = True
        try:
            if not self.lost:
                quiet = self.stream.settle(self._patience)
                if self._halt is not None:
                    self._case.check_open(self.stream)
                    self._halt()
                    if not quiet:
                        self._case.check_halt()
        except StoreUnavailable:
            self.lost = True
        return quiet

    def write(self, kind: str, body: dict[str, Any]) -> int | str:
        """Returns the entry's number in the stream, or (a text) its name in the spool."""
        if not self.lost:
            try:
                return self.stream.append(kind, body).seq
            except StoreUnavailable:
                self.lost = True
        return _case.spool(self.stream, kind, body)

    def taken_over(self) -> bool:
        """Somebody else wrote: find the newest entry again. True where another run has begun since our own newest one."""
        ours = self.stream.head.seq if self.stream.head else 0
        try:
            self.stream.load()
            since = [self.stream.entry(seq) for seq in range(ours + 1, self.stream.newest + 1)]
        except StoreUnavailable:
            self.lost = True
            return False
        return any(entry.kind in ("intent", "resumed") and entry.run != self._case.context.run_id for entry in since)

    def outrun(self) -> bool:
        """Whether somebody else has written since. Without a lock, what is not left for us to do may be what they just did."""
        if self.lost or self.stream.locked or self.live_item() is not None:
            return False
        try:
            self.stream.find()
        except StoreUnavailable:
            self.lost = True
            return False
        return self.stream.newest != (self.stream.head.seq if self.stream.head else 0)

    def unconfirmed(self) -> Entry | None:
        """The open intent of this very task, left by a run that died or failed."""
        what = identity(self.task.control, self.task.params)
        for item in reversed(self.stream.live):
            if item.get("what") == what and item["state"] == "open" and "releases" not in item:
                return self.stream.entry(item["seq"])
        return None

    def live_item(self) -> dict[str, Any] | None:
        what = identity(self.task.control, self.task.params)
        return next((item for item in reversed(self.stream.live) if item.get("what") == what), None)
