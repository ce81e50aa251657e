# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""The engine: read, plan, guard, record the intent, apply, verify, record the outcome, return.

It knows no class of Ansible. It is the only place that knows check mode, the diff, the journal and what failure means.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from . import _case, _guards
from ._case import Case, Entry, Moved, Stream, canonical
from ._control import Context, Control, Host
from ._errors import Busy, FirebreakError, MissingLibrary, Refused, StoreUnavailable, Unproven
from ._evidence import Evidence
from ._plan import Change, Facts, Plan, at
from ._store import attempt

PATIENCE = {"SEV-1": 120.0}
PATIENCE_ELSE = 900.0
UNATTENDED_AN_HOUR = 25
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
    return all(not {*a}.isdisjoint(b) if isinstance(a, list | dict) and a and b else a == b for a, b in pairs)


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


def execute(control: Any, params: dict[str, Any], context: Context) -> dict[str, Any]:
    """The one way in for both front ends: whatever happens comes back as a result, and no secret is in it."""
    context.secrets.add_embedded(params)
    try:
        if hasattr(control, "plan"):
            result = run(control, params, context)
        elif hasattr(control, "probe"):
            result = run_gate(control, params, context)
        elif hasattr(control, "write"):
            result = run_record(control, params, context)
        else:
            result = run_info(control, params, context)
    except FirebreakError as failure:
        result = {"changed": False, **failure.facts, "failed": True, "msg": failure.msg}
    except Exception as failure:
        where = failure.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        line = f" ({where.tb_frame.f_code.co_name}, line {where.tb_lineno})" if where is not None else ""
        result = {"changed": False, "failed": True, "msg": f"{control.name}: {told(failure)}{line}"}
    return context.secrets.censor(result)


def run(control: Control, params: dict[str, Any], context: Context) -> dict[str, Any]:
    """Carry out a control, or predict it."""
    task = prepare(control, params, context)
    with not_begun(task), client_of(task) as client:
        if context.check_mode:
            halted = halt_of(task)
            read = attempt(lambda: control.read(client, task.params))
            halted()
            plan = decide(task, client, read)
            guard(task, plan, None)
            for change in plan.changes if control.dry_run else ():
                control.dry_run(client, task.params, change)  # type: ignore[misc]
            return result_of(task, plan, "planned" if plan.changes else "ok")
        return Action(task, client).run()


def halt_of(task: Task) -> Callable[[], None]:
    """Begin to look for a HALT, for a dry run; what is returned waits for it. A lost store is told by the real run."""
    if task.case is None:
        return lambda: None
    looked = task.case.store.beside(task.case.check_halt)

    def wait() -> None:
        with contextlib.suppress(StoreUnavailable):
            looked()

    return wait


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


@contextlib.contextmanager
def client_of(task: Task) -> Any:
    if isinstance(task.control, Control):
        task.allow(task.seconds)
    client = task.control.service.connect(task.params, task.context)
    try:
        yield client
    finally:
        client.close()


def decide(task: Task, client: Any, read: Callable[[], Facts] | None = None) -> Plan:
    """Read and plan, and hold the plan to what every plan must be."""
    if read is None:
        task.allow(task.seconds)
    facts = read() if read is not None else task.control.read(client, task.params)
    if task.context.check_mode:
        facts = {**facts, **(task.params.get("assumed") or {})}
    plan = task.control.plan(task.params, facts)
    if task.control.plan(task.params, plan.after).changes:
        raise FirebreakError(
            f"internal: the plan of {task.control.name} does not converge; nothing was changed", effect="none"
        )
    if task.context.secrets.found_in([recorded(plan, change) for change in plan.changes]):
        raise FirebreakError(
            f"internal: a change of {task.control.name} holds a secret; nothing was changed", effect="none"
        )
    return plan


def guard(task: Task, plan: Plan, journal: Journal | None) -> list[dict[str, str]]:
    """All guards over a plan; what was overridden is returned, to be recorded."""
    if not plan.changes:
        return []
    params = task.params
    _guards.protected(plan, params.get("protected"), params.get("seen"), task.host)
    overridden = _guards.breadth(plan, task.glass)
    keeps = getattr(task.control, "evidence", False)
    _guards.unattended(plan, bool(params.get("unattended")) and not keeps)
    if plan.destroys:
        overridden += _evidence_first(task, plan)
    if task.case is not None and (journal is None or not journal.lost):
        if params.get("unattended"):
            _unattended_rate(task.case)
        if params.get("two_person") and not keeps and (overridden or _guards.irreversible(plan)):
            _approved(task)
    return overridden


class Awaited(Exception):
    """What a plan would destroy is being exported: it is waited for, by whoever holds nothing meanwhile."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan


def _evidence_first(task: Task, plan: Plan) -> list[dict[str, str]]:
    """What is evidence is not destroyed before it is exported; but a hanging export does not keep the thief's session alive."""
    references = list(task.params.get("evidence") or [])
    try:
        missing = task.context.evidence.missing(plan.destroys, references)
    except StoreUnavailable:  # who has broken the glass does not wait for the store
        if "evidence" not in task.glass:
            raise
        missing = sorted(plan.destroys)
    if not missing:
        return []
    if "evidence" in task.glass:
        return [{"guard": "evidence", "reason": task.glass["evidence"]}]
    begun = task.context.evidence.begun(references)
    if begun is None or task.case is None:
        raise Refused(
            f"evidence: {', '.join(missing)} would be destroyed before being exported; run the phase preserve first, "
            "or give break glass for evidence",
            guard="evidence",
        )
    since, severity = begun
    patience = task.params.get("evidence_patience")
    patience = PATIENCE.get(severity, PATIENCE_ELSE) if patience is None else float(patience)
    # Another machine's clock said when it began: where that is ahead of ours, nobody waits for longer all the same.
    task.patience_from = min(task.patience_from, since) if task.patience_from else min(task.case.store.now(), since)
    if task.case.store.now() >= task.patience_from + patience or task.context.check_mode:
        return [{"guard": "evidence", "reason": f"by clock: {', '.join(missing)} not exported in time"}]
    raise Awaited(plan)


def _unattended_rate(case: Case) -> None:
    since = case.context.clock() - 3600
    places = [(name, seq) for name, seqs in case.streams().items() for seq in seqs]
    recent = [entry for entry in case.fetch(places) if entry.kind == "intent" and float(entry.body["at"]) > since]
    if len(recent) >= UNATTENDED_AN_HOUR:
        raise Refused(
            f"unattended: {UNATTENDED_AN_HOUR} changes in an hour without a person; a person goes on",
            guard="unattended",
        )


def _approved(task: Task) -> None:
    case = task.case
    if case is None:
        return
    for entry in case.fetch([(_case.RUN, seq) for seq in case.numbers(_case.RUN)]):
        approves = entry.body.get("approves") or []
        if entry.kind == "decision" and task.control.name in approves and entry.doc["actor"] != task.context.actor:
            return
    raise Refused(
        f"two_person: {task.control.name} needs the approval of somebody else: "
        f"incident_event with kind=decision and approves=[{task.control.name}]",
        guard="two_person",
    )


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


class Action:
    """The real run of one task."""

    def __init__(self, task: Task, client: Any, releases: dict[str, Any] | None = None) -> None:
        self.task = task
        self.client = client
        self.releases = releases
        self.outcomes: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        while True:
            with contextlib.ExitStack() as stack:
                journal = Journal(self.task, stack, releasing=self.releases is not None)
                try:
                    return self._under(journal)
                except Awaited as awaited:
                    plan = awaited.plan
            self._await_evidence(plan)

    def _await_evidence(self, plan: Plan) -> None:
        """Wait for an export, while others may write for this host; then everything is looked at anew."""
        context = self.task.context
        context.tell(f"{self.task.control.name} on {self.task.host} waits for the evidence that it would destroy")
        while True:
            context.sleep(0.5)
            try:
                _evidence_first(self.task, plan)
                return
            except Awaited:
                continue
            except FirebreakError:  # it is told by whoever looks anew
                return

    def _under(self, journal: Journal) -> dict[str, Any]:
        task = self.task
        try:
            read = self._read_beside(journal)
        except Refused as refusal:
            if refusal.guard == "halt":  # the others say that there is no such incident to write to
                self._refused(journal, refusal)
            raise
        for _attempt in range(20):
            try:
                plan = decide(task, self.client, read)
                overridden = [*self._needs_store(journal, plan), *guard(task, plan, journal)]
                if not plan.changes:
                    return self._nothing_to_do(journal, plan)
                of = self._intent(journal, plan, overridden)
                break
            except Moved:
                # Another machine was faster. What it did is read, and planned, again.
                read = None
                journal.stream.reload(task.seconds)
            except Refused as refusal:
                self._refused(journal, refusal)
                raise
        else:
            raise FirebreakError(
                "case_store: too many writers for this host at once; run the same command again", effect="none"
            )
        return self._carry_out(journal, plan, of)

    def _refused(self, journal: Journal, refusal: Refused) -> None:
        task = self.task
        if not journal.lost:
            body = {"control": task.control.name, "guard": refusal.guard, "why": refusal.msg}
            body |= {"what": identity(task.control, task.params), "about": about(task.control, task.params)}
            self._outcome(journal, "refused", body)

    def _read_beside(self, journal: Journal) -> Callable[[], Facts] | None:
        """Read while the journal settles: after the newest entry was listed, so that an entry of anybody else's refuses ours."""
        settled = journal.settling()
        seen = attempt(lambda: self.task.control.read(self.client, self.task.params))
        return seen if settled() else None

    def _needs_store(self, journal: Journal, plan: Plan) -> list[dict[str, str]]:
        """What cannot be undone wants its record; what was overridden for it is returned."""
        if not journal.lost or not _guards.irreversible(plan):
            return []
        if "store" not in self.task.glass:
            raise Refused(
                f"case_store: it cannot be reached, and {self.task.control.name} cannot be undone; "
                "repair the store, or give break glass for store",
                guard="store",
            )
        return [{"guard": "store", "reason": self.task.glass["store"]}]

    def _nothing_to_do(self, journal: Journal, plan: Plan) -> dict[str, Any]:
        left = None if journal.lost else journal.unconfirmed()
        item = None if journal.lost else journal.live_item()
        clears = self._clears(journal)
        if left is not None:
            body = {"of": left.seq, "outcome": "verified", "recovered": True, **self._made(), **clears}
            self._outcome(journal, "done", body)
        elif item is not None and item["state"] in ("applied", "failed") and "releases" not in item:
            self._outcome(journal, "done", {"of": item["seq"], "outcome": "verified", "settled": True, **clears})
        elif clears:
            self._outcome(journal, "note", {"text": f"{self.task.control.name}: there is nothing left to do", **clears})
        result = result_of(self.task, plan, "ok")
        if item is not None and "at" in item:
            result["since"] = _case.stamp(float(item["at"]))
        return self._with_spool(journal, result)

    def _clears(self, journal: Journal) -> dict[str, list[str]]:
        """What was refused before, and is done now."""
        task, head = self.task, journal.stream.head
        if journal.lost or head is None:
            return {}
        what, ours = identity(task.control, task.params), about(task.control, task.params)
        found = [
            refused
            for refused, one in head.doc.get("not_done", {}).items()
            if refused == what or (one["control"] == task.control.name and same_matter(one["about"], ours))
        ]
        return {"clears": found} if found else {}

    def _intent(self, journal: Journal, plan: Plan, overridden: list[dict[str, str]]) -> int | str:
        """Write down what will be done and how to undo it; carry on under an open intent that says the same."""
        task = self.task
        changes = [recorded(plan, change) for change in plan.changes]
        left = None if journal.lost else journal.unconfirmed()
        if left is not None and canonical(left.body["changes"]) == canonical(changes):
            if not journal.stream.resumed:
                self._begin(journal, plan, "resumed", {"of": left.seq, **journal.stream.claim(task.seconds)})
            return left.seq
        for override in overridden:
            self._begin(journal, plan, "override", {"control": task.control.name, **override})
        now = task.context.clock()
        body: dict[str, Any] = {
            "control": task.control.name,
            "what": identity(task.control, task.params),
            "mark": task.params["mark"],
            "options": task.context.secrets.censor(told_options(task.control, task.params)),
            "changes": changes,
            "estimate": plan.estimate,
            "reversible": any(change.undo is not None for change in plan.changes),
            "owner": task.params.get("owner"),
            "expires": task.params.get("expires"),
            "on_expiry": task.params.get("on_expiry"),
            "at": now,
            **journal.stream.claim(task.seconds),
        }
        if left is not None:
            body["continues"] = left.seq
        if self.releases is not None:
            body["releases"] = self.releases
        return self._begin(journal, plan, "intent", body)

    def _begin(self, journal: Journal, plan: Plan, kind: str, body: dict[str, Any]) -> int | str:
        """Write what begins the changes. The store may be lost at this very entry."""
        if not journal.lost:
            try:
                return journal.stream.append(kind, body).seq
            except StoreUnavailable:
                journal.lost = True
            for override in self._needs_store(journal, plan):
                journal.write("override", {"control": self.task.control.name, **override})
        return journal.write(kind, body)

    def _carry_out(self, journal: Journal, plan: Plan, of: int | str) -> dict[str, Any]:
        task = self.task
        deadline = journal.stream.claimed_at + task.seconds
        task.context.deadline = deadline
        self.outcomes = [{**change.summary(), "outcome": "not begun"} for change in plan.changes]
        try:
            for number, change in enumerate(plan.changes):
                if task.context.clock() >= deadline:
                    raise FirebreakError(f"the deadline of {task.seconds:.0f} s is over", effect="none")
                self._one(number, change)
            outcome = self._verify(plan)
        except Exception as failure:
            facts = self._failure(failure)
            self._outcome(
                journal, "failed", {"of": of, "why": facts["msg"], "outcomes": self.outcomes, "outcome": "failed"}
            )
            error = Unproven if isinstance(failure, Unproven) else FirebreakError
            msg = facts.pop("msg")
            raise error(msg, **self._with_spool(journal, {**result_of(task, plan, "failed"), **facts})) from None
        body = {"of": of, "outcome": outcome, "outcomes": self.outcomes, **self._made(), **self._clears(journal)}
        self._outcome(journal, "done", body)
        return self._with_spool(journal, {**result_of(task, plan, outcome), "outcomes": self.outcomes})

    def _made(self) -> dict[str, Any]:
        """The manifests of an export, so that the chain covers them, also when the run that wrote them was killed."""
        return {"manifests": self.task.context.evidence.digests()} if self.task.control.evidence else {}

    def _one(self, number: int, change: Change) -> None:
        task, control = self.task, self.task.control
        self.outcomes[number]["outcome"] = "unconfirmed"
        task.context.effects = 0
        task.context.changing = True
        try:
            control.apply(self.client, task.params, change)
        except Exception as failure:
            if getattr(failure, "effect", "unknown") == "none" and not task.context.effects:
                self.outcomes[number]["outcome"] = "not done"
            raise
        finally:
            task.context.changing = False
        self.outcomes[number]["outcome"] = "applied"
        if control.prove is not None:
            try:
                control.prove(self.client, task.params, change)
            except Exception:
                self.outcomes[number]["outcome"] = "unproven"
                raise
            self.outcomes[number]["outcome"] = "proved"

    def _verify(self, plan: Plan) -> str:
        """Read again, plan again: nothing may be left to do."""
        task, control = self.task, self.task.control
        give_up = task.context.clock() + control.settle
        task.context.deadline = max(task.context.deadline, give_up)
        while True:
            left = control.plan(task.params, control.read(self.client, task.params)).changes
            if not left:
                return "verified"
            if task.context.clock() >= give_up:
                break
            task.context.sleep(0.2)
        if control.slow:
            return "applied"
        targets = ", ".join(f"{change.action} {change.target}" for change in left[:5])
        raise Unproven(f"read again, the service does not show the change: {targets}")

    def _failure(self, failure: Exception) -> dict[str, Any]:
        msg = told(failure)
        groups = {
            "done": [o for o in self.outcomes if o["outcome"] in ("applied", "proved")],
            "unconfirmed": [o for o in self.outcomes if o["outcome"] in ("unconfirmed", "unproven")],
            "not done": [o for o in self.outcomes if o["outcome"] in ("not begun", "not done")],
        }
        listed = "; ".join(
            f"{name}: {', '.join(o['action'] + ' ' + o['target'] for o in members)}"
            for name, members in groups.items()
            if members
        )
        changed = bool(groups["done"] or groups["unconfirmed"])
        return {
            "msg": f"{self.task.control.name} on {self.task.host}: {sentence(msg)} {listed}. {AGAIN}.",
            "changed": changed,
            "outcomes": self.outcomes,
            "effect": "unknown" if groups["unconfirmed"] else "none",
        }

    def _outcome(self, journal: Journal, kind: str, body: dict[str, Any]) -> None:
        """Record what became of it. Where somebody took over, their entries stand."""
        if "why" in body:  # an entry that would hold a secret is refused, and this one has to be written
            body = {**body, "why": self.task.context.secrets.censor(body["why"])}
        try:
            for _attempt in range(20):
                with contextlib.suppress(Moved):
                    journal.write(kind, body)
                    return
                if journal.taken_over():
                    return
            journal.lost = True
            journal.write(kind, body)
        except StoreUnavailable as failure:  # the spool is lost too: this result alone tells what was done
            changed = any(one["outcome"] not in ("not begun", "not done") for one in self.outcomes)
            why = f"{body['why']}; {failure.msg}" if "why" in body else failure.msg
            raise FirebreakError(why, changed=changed, outcomes=self.outcomes) from None

    def _with_spool(self, journal: Journal, result: dict[str, Any]) -> dict[str, Any]:
        if journal.lost:
            result["spooled"] = journal.stream.spooled
        return result


def told(failure: BaseException) -> str:
    """A foreign exception's text may hold anything; its type is all that is told."""
    return failure.msg if isinstance(failure, FirebreakError) else f"unexpected {type(failure).__name__}"


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


def result_of(task: Task, plan: Plan, outcome: str) -> dict[str, Any]:
    """What every control returns."""
    before, after = differing(plan.before, plan.after)
    result: dict[str, Any] = {
        "changed": bool(plan.changes),
        "changes": [change.summary() for change in plan.changes],
        "estimate": plan.estimate,
        "state_before": plan.before,
        "state_after": plan.after,
        "diff": {"before": before, "after": after},
        "incident_id": task.params["incident_id"],
        "mark": task.params["mark"],
        "outcome": outcome,
    }
    if getattr(task.control, "evidence", False):
        result["evidence"] = task.context.evidence.references()
    return result


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


def run_info(reader: Any, params: dict[str, Any], context: Context) -> dict[str, Any]:
    """A reader: it changes nothing, in check mode or not."""
    task = prepare(reader, params, context)
    with client_of(task) as client:
        return {"changed": False, "incident_id": task.params.get("incident_id"), **reader.read(client, task.params)}


def run_gate(gate: Any, params: dict[str, Any], context: Context) -> dict[str, Any]:
    """Probe until it passes for as long as asked, or the time is over; the verdict is a ``check`` entry."""
    task = prepare(gate, params, context)
    started = context.clock()
    give_up = started + float(task.params.get("timeout") or 0)
    passing_since: float | None = None
    with client_of(task) as client:
        while True:
            seen = gate.probe(client, task.params)
            now = context.clock()
            passing_since = (passing_since or now) if seen["passed"] else None
            held = passing_since is not None and now - passing_since >= float(task.params.get("for_seconds") or 0)
            if held or now >= give_up:
                break
            context.sleep(float(task.params.get("interval") or 1))
    failing = [f"{check['name']}: {check.get('why') or 'failed'}" for check in seen["checks"] if not check["passed"]]
    if not held and not failing:
        failing = [f"every check passed at last, but not for the {task.params['for_seconds']:g} s asked for"]
    body = {
        "control": gate.name,
        "passed": held,
        "why": "; ".join(failing),
        "seconds": round(context.clock() - started, 3),
        "checks": seen["checks"],
    }
    result = {
        "changed": False,
        "incident_id": task.params.get("incident_id"),
        **{k: v for k, v in body.items() if k not in ("control", "why")},
    }
    if not context.check_mode and task.case is not None:
        stream = task.case.stream(task.host)
        if task.case.keep(stream, "check", body) is None:
            result["spooled"] = stream.spooled
    if not held:
        raise FirebreakError(f"{gate.name} on {task.host}: {body['why']}", effect="none", **result)
    return result


def run_record(record: Any, params: dict[str, Any], context: Context) -> dict[str, Any]:
    """A control whose entry in the journal is the change."""
    task = prepare(record, params, context)
    written = record.write(task.case, task.params, context)
    return {
        "changed": False,
        "incident_id": task.params.get("incident_id"),
        "diff": {"before": {}, "after": {}},
        **written,
    }
