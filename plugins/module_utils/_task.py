# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""A task: one control on one system, with its options, its surroundings and its client."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

from . import _case, _guards
from ._case import Case, canonical
from ._control import Context, Control, Host
from ._errors import Busy, FirebreakError, MissingLibrary, Refused
from ._evidence import Evidence

AGAIN = "Once that is repaired, run the same command again: it goes on from there"
COMMON: dict[str, Any] = {
    "case_store": {"type": "str"},
    "incident_id": {"type": "str"},
    "round": {"type": "int", "default": 1},
    "site": {"type": "str"},
    "phase": {"type": "str"},
    "host": {"type": "str"},
    "owner": {"type": "str"},
    "expires": {"type": "str"},
    "on_expiry": {"type": "str", "choices": ["remind", "release"], "default": "remind"},
    "protected": {
        "type": "dict",
        "no_log": False,
        "options": {
            kind: {"type": "list", "elements": "str", "no_log": False}
            for kind in ("addresses", "countries", "roles", "accounts", "tokens", "keys")
        },
    },
    "seen": {
        "type": "list",
        "elements": "dict",
        "options": {
            "host": {"type": "str", "required": True},
            **{kind: {"type": "list", "elements": "str", "no_log": False} for kind in ("addresses", "roles", "tokens")},
        },
    },
    "break_glass": {
        "type": "list",
        "elements": "dict",
        "options": {
            "guard": {"type": "str", "required": True},
            "reason": {"type": "str", "required": True},
            "date": {"type": "str", "required": True},
        },
    },
    "evidence": {"type": "list", "elements": "str"},
    "evidence_patience": {"type": "float"},
    "assumed": {"type": "dict"},
    "unattended": {"type": "bool", "default": False},
    "two_person": {"type": "bool", "default": False},
}


def case_options() -> dict[str, Any]:
    return _case.SPEC


def spec_of(control: Any) -> dict[str, Any]:
    """A control's whole argument spec: common options, the case's, its service's, its own; and its own rules."""
    own = dict(control.spec)
    options = own.pop("argument_spec", {})
    service = control.service.SPEC if control.service is not None else {}
    return {"argument_spec": {**COMMON, **_case.SPEC, **service, **options}, "supports_check_mode": True, **own}


def shown_options(control: Any, params: dict[str, Any]) -> dict[str, Any]:
    """Options as Ansible may show them. Of those that say how to connect it shows none: one could be a secret in a wrong place."""
    options = spec_of(control)["argument_spec"]
    service = control.service.SPEC if control.service is not None else {}
    connection = {*service, *_case.SPEC, *getattr(control, "connection", ())}
    return _open(options, {name: params[name] for name in options if name in params and name not in connection})


def own_options(control: Any, params: dict[str, Any]) -> dict[str, Any]:
    """What the user asked of this control, without secrets, connection and common options."""
    options = control.spec.get("argument_spec", {})
    return _open(options, {name: params.get(name) for name in sorted(options)})


def _open(options: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What was given, without the secret options and suboptions."""
    shown: dict[str, Any] = {}
    for name, value in given.items():
        option = options.get(name, {})
        if option.get("no_log") or value is None:
            continue
        below = option.get("options")
        if below and isinstance(value, dict):
            value = _open(below, value)
        elif below and isinstance(value, list):
            value = [_open(below, one) if isinstance(one, dict) else one for one in value]
        shown[name] = value
    return shown


def told_options(control: Any, params: dict[str, Any]) -> dict[str, Any]:
    """The same for the journal, which names no data subject."""
    private = getattr(control, "private", ())
    options = own_options(control, params)
    return {name: f"{len(value)} in number" if name in private else value for name, value in options.items()}


def about(control: Any, params: dict[str, Any]) -> dict[str, Any]:
    """What a task is about, however the rest of it is corrected: what it cannot do without, and the state that it brings about."""
    options = control.spec.get("argument_spec", {})
    private = getattr(control, "private", ())
    needed = [name for name in own_options(control, params) if options[name].get("required") and name not in private]
    return {name: params[name] for name in [*needed, *(["state"] if "state" in options else [])]}


def same_matter(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two tasks of a control are about the same: a list of which one entry was taken out still is."""
    if one.keys() != other.keys():
        return False
    pairs = [(one[name], other[name]) for name in one]
    return all(bool(entries(a) & entries(b)) if isinstance(a, list | dict) and a and b else a == b for a, b in pairs)


def entries(listed: Any) -> set[bytes]:
    """What an option lists, each entry whatever its type is."""
    return {canonical(entry) for entry in listed}


def identity(control: Any, params: dict[str, Any]) -> str:
    """The same task of the same control, whichever run it is in."""
    return hashlib.sha256(canonical([control.name, own_options(control, params)])).hexdigest()[:16]


@dataclasses.dataclass
class Task:
    """One control on one system, prepared."""

    control: Any
    params: dict[str, Any]
    context: Context
    glass: dict[str, str]
    case: Case | None = None
    patience_from: float = 0.0

    @property
    def host(self) -> str:
        return str(self.params.get("host") or "localhost")

    @property
    def seconds(self) -> float:
        """How long the changes of this task may take: a sweep over millions says so itself."""
        return max(float(self.control.deadline), float(self.params.get("deadline") or 0))

    def allow(self, seconds: float) -> None:
        """From now on what is asked of the service has so long: reading, changing and looking again each have their own time."""
        self.context.deadline = self.context.clock() + seconds


@dataclasses.dataclass
class HeldHost:
    """A host that is asked for nothing more when a change's deadline is over."""

    host: Host
    context: Context

    @property
    def remote(self) -> bool:
        return self.host.remote

    def run(self, command: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        self.context.still_ours()
        return self.host.run(command, stdin)


def prepare(control: Any, params: dict[str, Any], context: Context) -> Task:
    """Guards that need no plan, and the surroundings of the task."""
    params = dict(params)
    for name in getattr(control.service, "REQUIRED", ()):
        if not params.get(name):
            raise Refused(f"{name}: say where the service is and as whom to connect (firebreak_{name} of this host)")
    service = [] if control.service is None else control.service.addresses(params)
    _guards.site(params, [*service, *_case.addresses(params)], context.env)
    if params["site"] == "lab":
        context.env = {}
    if int(params.get("round") or 0) < 1:
        raise Refused("round: it is a number from 1 on (firebreak_round)")
    if not params.get("incident_id") and context.check_mode:
        params["incident_id"] = _case.NO_INCIDENT
    params["mark"] = f"{params.get('incident_id')}/{params.get('round') or 1}"
    context.correlation = str(params.get("incident_id") or "")
    task = Task(control, params, context, _guards.break_glass(params.get("break_glass"), context.clock()))
    if params.get("case_store") and params.get("incident_id"):
        task.case = _case.open_case(params, context)
    elif not context.check_mode and not getattr(control, "opens", False):
        _case.open_case(params, context)
    context.evidence = Evidence(task.case, task.host, params)
    if context.host is not None:
        context.host = HeldHost(context.host, context)
    return task


@contextlib.contextmanager
def client_of(task: Task) -> Any:
    if isinstance(task.control, Control):
        task.allow(task.seconds)
    client = task.control.service.connect(task.params, task.context)
    try:
        yield client
    finally:
        client.close()


@contextlib.contextmanager
def not_begun(task: Task) -> Iterator[None]:
    """What fails before the first change says so. A refusal is one by its nature, and so is a library that is missing."""
    try:
        yield
    except (Refused, MissingLibrary, Busy):
        raise
    except FirebreakError as failure:
        if "outcomes" in failure.facts:
            raise
        msg = f"{task.control.name} on {task.host}: {sentence(failure.msg)} Nothing was changed. {AGAIN}."
        raise FirebreakError(msg, effect="none", **failure.facts) from None


def sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def told(failure: BaseException) -> str:
    """A foreign exception's text may hold anything; its type is all that is told."""
    return failure.msg if isinstance(failure, FirebreakError) else f"unexpected {type(failure).__name__}"
