# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""Undoing: every recorded change of a host, newest first, through the control that made it."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from ansible.module_utils.common.arg_spec import ModuleArgumentSpecValidator

from ._action import Action, result_of
from ._case import Case, Entry, canonical
from ._control import Context, Control
from ._decision import decide, guard
from ._errors import FirebreakError, Refused
from ._incident import state_of
from ._plan import at
from ._task import COMMON, Task, case_options, client_of, not_begun, prepare, spec_of, told
from ._verify import turn_of

MODULES = "ansible_collections.firebreak.incident.plugins.modules"


def release(case: Case | None, params: dict[str, Any], context: Context) -> dict[str, Any]:
    """Undo what is live on this host; conflicts and failures keep nothing else from being undone."""
    if case is None:
        raise Refused("incident_id: name the incident to release (firebreak_incident_id)")
    seals = state_of(case)["seals"]
    stream = case.stream(str(params["host"]))
    stream.load()
    report = Report(str(params["host"]), context.check_mode)
    for item in reversed(stream.live):
        wanted = not params["controls"] or item["control"] in params["controls"]
        if "releases" in item or not wanted:
            continue
        if params["turn"] is not None and turn_of(seals, stream.name, item["seq"]) != params["turn"]:
            continue
        Undo(case, params, context, stream.entry(item["seq"]), report).run()
    return report.result()


@dataclasses.dataclass
class Report:
    """What a release did and could not do."""

    host: str
    planned: bool
    changes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    conflicts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failures: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    half_done: bool = False
    irreversible: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    # By task: what a dry run has put back so far, so that it goes on from there as the real run does.
    back: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    before: dict[str, Any] = dataclasses.field(default_factory=dict)
    after: dict[str, Any] = dataclasses.field(default_factory=dict)

    def took(self, control: str, result: dict[str, Any]) -> None:
        self.changes += [{"control": control, **change} for change in result["changes"]]
        self.before.setdefault(control, result["diff"]["before"])
        self.after[control] = result["diff"]["after"]

    def failed(self, line: dict[str, Any], failure: Exception) -> None:
        self.failures.append({**line, "why": told(failure)})
        self.half_done |= isinstance(failure, FirebreakError) and bool(failure.facts.get("changed"))

    def result(self) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "changed": bool(self.changes) or self.half_done,
            "changes": self.changes,
            "conflicts": self.conflicts,
            "failures": self.failures,
            "irreversible": self.irreversible,
            "diff": {"before": self.before, "after": self.after},
        }
        if self.changes:
            targets = ", ".join(f"{change['action']} {change['target']}" for change in self.changes)
            shown["screen"] = [f"{self.host}: {'would be put back' if self.planned else 'put back'}: {targets}"]
        if self.conflicts or self.failures:
            told = [f"{one['control']}: {one['target']}: {one['why']}" for one in [*self.conflicts, *self.failures]]
            raise FirebreakError(
                f"not everything was released: {'; '.join(told)}"
                + ("; -e release_controls_force=true puts back what somebody else changed" if self.conflicts else ""),
                **shown,
            )
        return shown


class Undo:
    """One intent, undone."""

    def __init__(self, case: Case, params: dict[str, Any], context: Context, intent: Entry, report: Report) -> None:
        self.case = case
        self.params = params
        self.context = context
        self.intent = intent
        self.report = report
        self.name = str(intent.body["control"])

    def run(self) -> None:
        changes = list(reversed(self.intent.body["changes"]))
        for change in changes:
            if change["undo"] is None:
                self.report.irreversible.append({**self._line(change), "why": change["irreversible"]})
        groups = _grouped([change for change in changes if change["undo"] is not None])
        if not groups:
            return
        clean = True
        for group in groups:
            try:
                clean = self._group(importlib.import_module(f"{MODULES}.{self.name}").CONTROL, group) and clean
            except Exception as failure:
                clean = False
                self.report.failed(self._line(group[0]), failure)
        if clean and not self.context.check_mode:
            self.case.record(self.case.stream(self._host).name, "released", {"released": [self.intent.seq]})

    def _group(self, control: Control, group: list[dict[str, Any]]) -> bool:
        """Undo changes that share one set of arguments. False where somebody else's change is in the way."""
        # One context for the whole of it: the client has to know the deadline of the changes.
        context = dataclasses.replace(self.context)
        task = self._task(control, group[0]["undo"], context)
        with not_begun(task), client_of(task) as client:
            back = self.report.back.setdefault(self.intent.body["what"], [])
            facts = control.read(client, task.params)
            for diff in back:
                facts = foreseen(facts, diff["before"], diff["after"])
            needed: list[str] = []
            conflicts: list[dict[str, Any]] = []
            undo = dict(group[0]["undo"])
            for change in group:
                verdict = compare(facts, change)
                needed += verdict["needed"]
                line = {**self._line(change), "why": "changed by somebody else since"}
                conflicts += [{**line, "element": one} for one in verdict["conflict"]]
            if conflicts and not self.params["force"]:
                self.report.conflicts += conflicts
                if group[0]["bulk"] is None:
                    return False
            elif conflicts:
                needed += [conflict["element"] for conflict in conflicts]
            if not needed:
                return not conflicts
            if group[0]["bulk"] is not None:
                undo[group[0]["bulk"]] = [one for one in undo[group[0]["bulk"]] if _element(one) in needed]
            task = self._task(control, undo, context)
            self._exact(control.plan(task.params, facts).after, group, needed)
            if self.context.check_mode:
                task.params["assumed"] = facts if back else {}
                plan = decide(task, client)
                guard(task, plan)
                result = result_of(task, plan, "planned")
                back.append(result["diff"])
            else:
                result = Action(task, client, releases={"seq": self.intent.seq}).run()
            self.report.took(self.name, result)
        return not conflicts or bool(self.params["force"])

    @staticmethod
    def _exact(after: dict[str, Any], group: list[dict[str, Any]], needed: list[str]) -> None:
        """An undo that would leave something else than what stood there is not begun."""
        for change in group:
            verdict = compare(after, change)
            if {*verdict["needed"], *verdict["conflict"]} & set(needed):
                raise FirebreakError(
                    "the recorded undo does not put it back; nothing was changed, release it by hand", effect="none"
                )

    @property
    def _host(self) -> str:
        return str(self.params["host"])

    def _line(self, change: dict[str, Any]) -> dict[str, Any]:
        return {"host": self._host, "control": self.name, "action": change["action"], "target": change["target"]}

    def _task(self, control: Control, undo: dict[str, Any], context: Context) -> Task:
        """The control with the arguments of its undo; where and as whom to connect comes from the host's variables."""
        spec = spec_of(control)
        options = spec.pop("argument_spec")
        spec.pop("supports_check_mode")
        shared = {*COMMON, *case_options(), *control.service.SPEC}
        given = {name: value for name, value in self.params.items() if name in shared and value is not None}
        given |= {"round": self.intent.doc["round"], "unattended": False, "two_person": False, **undo}
        checked = ModuleArgumentSpecValidator(options, **spec).validate(given)
        if checked.error_messages:
            raise FirebreakError(
                "the recorded undo does not fit this version's options; release it by hand", effect="none"
            )
        return prepare(control, checked.validated_parameters, context)


def _grouped(changes: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: list[list[dict[str, Any]]] = []
    for change in changes:
        if groups and canonical(groups[-1][0]["undo"]) == canonical(change["undo"]):
            groups[-1].append(change)
        else:
            groups.append([change])
    return groups


def _element(option: Any) -> str:
    """The name of an element in the option that lists the elements of a bulk change."""
    return str(option["value"] if isinstance(option, dict) else option)


def foreseen(facts: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The facts with what differs between before and after. What these facts do not hold is another target's."""
    facts = dict(facts)
    for key in {*before, *after}:
        if key not in after:
            facts.pop(key, None)
        elif key not in before:
            facts[key] = after[key]
        elif key in facts:
            deeper = all(isinstance(value, dict) for value in (facts[key], before[key], after[key]))
            facts[key] = foreseen(facts[key], before[key], after[key]) if deeper else after[key]
    return facts


def compare(facts: dict[str, Any], change: dict[str, Any]) -> dict[str, list[str]]:
    """Element by element: equal to after means undo, equal to before means nothing to do, else somebody else was here."""
    now, before, after = at(facts, tuple(change["path"])), change["before"], change["after"]
    if change["bulk"] is None:
        elements = {change["target"]: (now, before, after)}
    else:
        names = sorted({*(before or {}), *(after or {})})
        elements = {name: ((now or {}).get(name), (before or {}).get(name), (after or {}).get(name)) for name in names}
    verdict: dict[str, list[str]] = {"needed": [], "conflict": []}
    for name, (current, old, new) in elements.items():
        if canonical(old) == canonical(new) or canonical(current) == canonical(old):
            continue
        verdict["needed" if canonical(current) == canonical(new) else "conflict"].append(name)
    return verdict
