# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""What a control hands to the engine, and what the engine hands to a client file."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ._errors import FirebreakError
from ._plan import Change, Facts, Plan
from ._redact import Secrets

SHORTEST_SECONDS = 1.0


class Host(Protocol):
    """A system under protection, reached over Ansible's own connection."""

    @property
    def remote(self) -> bool:
        """Whether it is another machine than this one."""

    def run(self, command: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        """Run a shell command there; returns exit status, output and error output."""


@dataclasses.dataclass
class Context:
    """What a task knows of its surroundings. Clock and sleep are here so that tests do not wait."""

    check_mode: bool = False
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    secrets: Secrets = dataclasses.field(default_factory=Secrets)
    correlation: str = ""
    host: Host | None = None
    evidence: Any = None
    actor: str = "unknown"
    run_id: str = ""
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    deadline: float = 0.0
    tell: Callable[[str], None] = lambda line: None  # a line for the person who waits
    changing: bool = False
    effects: int = 0

    def effective(self) -> None:
        """A client has made a write that surely took effect. A change that fails after it cannot be called "not done"."""
        self.effects += 1

    def still_ours(self) -> None:
        """Asked by a client before each request of a change. After the deadline another run may have taken over, and a run that
        was held up (a stopped process, a laptop that slept) sends nothing more. What is on its way then, nobody calls back."""
        if self.changing and self.clock() >= self.deadline:
            raise FirebreakError("the deadline of the changes is over, and another run may have taken over")

    def at_most(self, seconds: float) -> float:
        """So long, or as long as is left. One more look is granted after the deadline too: what was left unclear is looked up."""
        if not self.deadline:
            return seconds
        return max(min(seconds, self.deadline - self.clock()), SHORTEST_SECONDS)

    def secret(self, value: Any) -> Any:
        return self.secrets.add(value)


class Service(Protocol):
    """A client file."""

    SPEC: dict[str, Any]

    def preload(self) -> None: ...

    def addresses(self, params: dict[str, Any]) -> list[str]: ...

    def connect(self, params: dict[str, Any], context: Context) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Control:
    """One control: its documentation's name, its options and its four functions.

    ``deadline`` (seconds) bounds the changes of one run; ``settle`` (seconds) how long verification waits for a slow truth;
    ``slow`` says that the truth may take longer than that, and is then "applied", settled by a later run of the same task;
    ``evidence`` puts it on a stream of its own, so that a hanging export keeps no other control of its host waiting;
    ``private`` names options that tell of people: the journal holds how many, not who.
    """

    name: str
    service: Any
    spec: dict[str, Any]
    read: Callable[[Any, dict[str, Any]], Facts]
    plan: Callable[[dict[str, Any], Facts], Plan]
    apply: Callable[[Any, dict[str, Any], Change], None]
    prove: Callable[[Any, dict[str, Any], Change], None] | None = None
    dry_run: Callable[[Any, dict[str, Any], Change], None] | None = None
    deadline: float = 30.0
    settle: float = 5.0
    slow: bool = False
    evidence: bool = False
    needs_host: bool = False
    private: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Info:
    """A reader: it changes nothing."""

    name: str
    service: Any
    spec: dict[str, Any]
    read: Callable[[Any, dict[str, Any]], Facts]


@dataclasses.dataclass(frozen=True)
class Record:
    """A control whose entry in the journal is the change. ``opens`` says that it can do without an incident,
    ``needs_host`` that it reaches the host, and so runs in its action only, ``connection`` names options that say how to
    connect to a service."""

    name: str
    service: Any
    spec: dict[str, Any]
    write: Callable[[Any, dict[str, Any], Context], dict[str, Any]]
    opens: bool = False
    needs_host: bool = False
    connection: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Gate:
    """A check that waits until it passes. ``probe`` returns ``passed`` and ``checks``; each check has a name and says why."""

    name: str
    service: Any
    spec: dict[str, Any]
    probe: Callable[[Any, dict[str, Any]], dict[str, Any]]
    deadline: float = 30.0
