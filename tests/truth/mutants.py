# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Products with one mistake each, and the part of the harness that must turn red for it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutant:
    """``old`` stands once in ``file``; with ``new`` in its place the tests ``by`` fail."""

    name: str
    file: str
    old: str
    new: str
    by: tuple[str, ...]


ENGINE = "plugins/module_utils/_engine.py"
CASE = "plugins/module_utils/_case.py"
STORE = "plugins/module_utils/_store.py"
RELEASE = "plugins/module_utils/_release.py"
GUARDS = "plugins/module_utils/_guards.py"
REDACT = "plugins/module_utils/_redact.py"

MUTANTS = [
    Mutant(
        "skip the verify",
        ENGINE,
        "            outcome = self._verify(plan)\n",
        '            outcome = "verified"\n',
        ("tests/unit/test_engine.py::test_what_is_lost_in_a_write_is_noticed",),
    ),
    Mutant(
        "journal after the write",
        ENGINE,
        "                of = self._intent(journal, plan, overridden)\n                break\n",
        "                for change in plan.changes:\n"
        "                    self.task.control.apply(self.client, self.task.params, change)\n"
        "                of = self._intent(journal, plan, overridden)\n                break\n",
        ("tests/truth/test_kill.py::test_killed_then_run_again[postgresql_login_lock]",),
    ),
    Mutant(
        "undo from the after-image",
        ENGINE,
        '        "before": at(plan.before, change.path),\n',
        '        "before": at(plan.after, change.path),\n',
        ("tests/truth/test_kill.py::test_release_killed_then_run_again[postgresql_login_lock]",),
    ),
    Mutant(
        "mark before the effect",
        "plugins/modules/postgresql_write_fence.py",
        'changes.append(Change(action, f"mark',
        'changes.insert(0, Change(action, f"mark',
        ("tests/truth/test_kill.py::test_killed_then_run_again[postgresql_write_fence]",),
    ),
    Mutant(
        "read the wrong stream",
        CASE,
        "        return self._record(Stream(self, stream_name), kind, body)\n",
        "        return self._record(Stream(self, RUN), kind, body)\n",
        ("tests/truth/test_kill.py::test_release_killed_then_run_again[postgresql_login_lock]",),
    ),
    Mutant(
        "censor only the front",
        REDACT,
        "            text = text.replace(value, HIDDEN)\n",
        "            text = HIDDEN + text[len(value) :] if text.startswith(value) else text\n",
        ("tests/truth/test_silence.py::test_a_leaking_control_is_caught[Base64 in a message]",),
    ),
]
