# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""The real run of a task: record the intent, apply, verify, record the outcome, return."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from . import _case, _guards
from ._case import Moved, canonical
from ._decision import Awaited, decide, evidence_first, guard
from ._errors import FirebreakError, Refused, StoreUnavailable, Unproven
from ._journal import Journal
from ._plan import Change, Facts, Plan, differing, recorded
from ._store import attempt
from ._task import AGAIN, Task, about, identity, same_matter, sentence, told, told_options


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
                evidence_first(self.task, plan)
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
                overridden = [*self._needs_store(journal, plan), *guard(task, plan, journal.lost)]
                if not plan.changes:
                    if journal.outrun():
                        raise Moved
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
