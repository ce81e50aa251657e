# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The shape of a control's row in the tests: its pure plan, and one run against the lab."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from tests.foreign import Foreign


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


class Row:
    """One control against the lab. ``observe`` reads the servers with their own clients, never through the collection."""

    control: ClassVar[str]
    host: ClassVar[str]
    reversible: ClassVar[bool] = True

    def params(self, lab: Any) -> dict[str, Any]:
        raise NotImplementedError

    def prepare(self, lab: Any) -> None:
        """Bring the servers into the state before."""

    def begin(self, lab: Any, execute: Any) -> None:
        """Carry out what goes before in the same incident: ``execute(host, control, options)`` does so."""

    def observe(self, lab: Any) -> dict[str, Any]:
        raise NotImplementedError

    def contained(self, lab: Any, before: dict[str, Any], seen: dict[str, Any]) -> None:
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
