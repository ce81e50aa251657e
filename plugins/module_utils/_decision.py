# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""What is decided before anything is changed: the plan, and whether every guard lets it pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import _case, _guards
from ._case import Case
from ._errors import FirebreakError, Refused, StoreUnavailable
from ._plan import Facts, Plan, recorded
from ._task import Task

PATIENCE = {"SEV-1": 120.0}
PATIENCE_ELSE = 900.0
UNATTENDED_AN_HOUR = 25


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


def guard(task: Task, plan: Plan, lost: bool = False) -> list[dict[str, str]]:
    """All guards over a plan; what was overridden is returned, to be recorded. ``lost`` is the store, for now."""
    if not plan.changes:
        return []
    params = task.params
    _guards.protected(plan, params.get("protected"), params.get("seen"), task.host)
    overridden = _guards.breadth(plan, task.glass)
    keeps = getattr(task.control, "evidence", False)
    _guards.unattended(plan, bool(params.get("unattended")) and not keeps)
    if plan.destroys:
        overridden += evidence_first(task, plan)
    if task.case is not None and not lost:
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


def evidence_first(task: Task, plan: Plan) -> list[dict[str, str]]:
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
