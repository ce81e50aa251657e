# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The shape of a control's row in the tests: its pure plan, and one run against the lab."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from hypothesis import strategies as st

from tests.foreign import Foreign

# What a test brings about on the servers, as JSON has it. ``options`` are the control's own ones for it.
State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table of a control's ``plan``."""

    name: str
    params: dict[str, Any]
    facts: dict[str, Any]
    changes: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    after: dict[str, Any] | None = None
    raises: str | None = None


@dataclasses.dataclass(frozen=True)
class Reach:
    """What the guards must see of a row's run.

    ``covers``: what is protected, in each of these ways, that the run with these more options would hit. ``wide``: by guard,
    options that make it too wide. ``destroys``: whether it destroys evidence, which its row has given break glass for.
    """

    covers: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = ()
    wide: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    destroys: bool = False


@dataclasses.dataclass(frozen=True)
class Spoil:
    """Somebody else's change of an object of ours, and whether it still stands there."""

    make: Callable[[], Any]
    stands: Callable[[], bool]
    # Whether a release has to say so; what was taken away or put back is no conflict.
    conflict: bool = True
    # It is theirs by now: it stays, however much it is forced.
    theirs: bool = False


class Row:
    """One control against the lab. What it reads it reads with the servers' own clients, never through the collection."""

    control: ClassVar[str]
    host: ClassVar[str]
    reversible: ClassVar[bool] = True
    # The parts of the lab, as tests/dumps.py calls them, that it may change.
    touches: ClassVar[tuple[str, ...]] = ()
    # The state that most tests begin with.
    usual: ClassVar[State] = {}

    def params(self, lab: Any) -> dict[str, Any]:
        """The options in the usual state."""
        raise NotImplementedError

    def prepare(self, lab: Any) -> None:
        """Bring the servers into the state before."""
        self.bring(lab, self.usual)

    def begin(self, lab: Any, execute: Any) -> None:
        """Carry out what goes before in the same incident: ``execute(host, control, options)`` does so."""

    def observe(self, lab: Any) -> dict[str, Any]:
        """What matters, and must be back after a release."""
        raise NotImplementedError

    def contained(self, lab: Any, before: dict[str, Any], seen: dict[str, Any]) -> None:
        """Assert the effect in the usual state, as both were observed."""
        raise NotImplementedError

    def secrets(self, lab: Any) -> list[str]:
        return []

    def foreign(self, lab: Any) -> Foreign:
        """Another client who works on what is its own, as near as possible to what this control changes."""
        raise NotImplementedError

    def reach(self, lab: Any) -> Reach:
        """What it covers, destroys, and how it would be too wide. An empty one says: nothing, and in no way."""
        raise NotImplementedError

    def blocking(self, addresses: list[str], countries: list[str]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Options and facts of a plan that blocks these; None where a control blocks no addresses."""
        return None

    # --- any other state

    def states(self) -> st.SearchStrategy[State]:
        """Whatever somebody may have on such a server, and ask of the control there."""
        raise NotImplementedError

    def bring(self, lab: Any, state: State) -> None:
        """Bring the servers into this state, whatever the one before was."""
        raise NotImplementedError

    def asked(self, lab: Any, state: State) -> dict[str, Any]:
        """The options in this state."""
        return {**self.params(lab), **state.get("options", {})}

    def refusal(self, lab: Any, state: State) -> str | None:
        """What the control says where it refuses this state."""
        return None

    def effect(self, lab: Any, state: State, before: dict[str, Any], seen: dict[str, Any]) -> None:
        """Assert that the dumps of what it touches differ in what was asked for, and in nothing else."""
        raise NotImplementedError

    # --- what goes wrong with what is ours

    def spoils(self, lab: Any) -> dict[str, Spoil]:
        """What somebody else may do to the very objects that a reversible control changed, in the usual state."""
        raise NotImplementedError

    def half(self, lab: Any) -> contextlib.AbstractContextManager[None] | None:
        """The service stops in the middle of a change of many elements; None where each change is one element."""
        return None
