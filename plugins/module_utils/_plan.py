# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""What a control's pure ``plan`` returns."""

from __future__ import annotations

import dataclasses
from typing import Any

Facts = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Change:
    """One call, or one bulk call, to a service.

    ``path`` leads from the facts to the element that changes: what stands there in ``Plan.before`` and ``Plan.after`` is
    the change's before and after. With ``bulk`` the element is a mapping whose keys are the entries of that option of
    ``undo``, so that a release can put back each entry by itself.
    """

    action: str
    target: str
    path: tuple[str, ...] = ()
    undo: dict[str, Any] | None = None
    irreversible: str | None = None
    bulk: str | None = None
    data: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.undo is None) == (self.irreversible is None):
            raise ValueError(f"a change needs either undo or irreversible: {self.action} {self.target}")
        if self.bulk and self.bulk not in (self.undo or {}):
            raise ValueError(f"bulk names no option of undo: {self.bulk}")

    def summary(self) -> dict[str, Any]:
        """What a person and a test see of it; no payload."""
        shown: dict[str, Any] = {"action": self.action, "target": self.target, "reversible": self.undo is not None}
        if self.irreversible:
            shown["irreversible"] = self.irreversible
        return shown


@dataclasses.dataclass(frozen=True)
class Plan:
    """The whole effect of a control on one target, decided without touching it."""

    before: Facts
    after: Facts
    changes: tuple[Change, ...] = ()
    estimate: Facts = dataclasses.field(default_factory=dict)
    covers: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    destroys: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()


def at(facts: Any, path: tuple[str, ...]) -> Any:
    """What stands at ``path``; None where nothing does."""
    for key in path:
        if not isinstance(facts, dict) or key not in facts:
            return None
        facts = facts[key]
    return facts


def recorded(plan: Plan, change: Change) -> dict[str, Any]:
    """A change as it stands in the journal: with what was there before, and how to put it back."""
    return {
        "action": change.action,
        "target": change.target,
        "path": list(change.path),
        "before": at(plan.before, change.path),
        "after": at(plan.after, change.path),
        "undo": change.undo,
        "irreversible": change.irreversible,
        "bulk": change.bulk,
        "data": change.data,
    }


def differing(before: Any, after: Any) -> tuple[Any, Any]:
    """Only what differs: at night five lines are read, not a document."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return before, after
    left: Facts = {}
    right: Facts = {}
    for key in sorted({*before, *after}):
        one, other = before.get(key), after.get(key)
        if one == other:
            continue
        one, other = differing(one, other)
        if key in before:
            left[key] = one
        if key in after:
            right[key] = other
    return left, right
