# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""The engine: read, plan, guard, record the intent, apply, verify, record the outcome, return.

It knows no class of Ansible. It and its parts (the task, the decision, the journal, the action) are the only place that knows
check mode, the diff, the journal and what failure means. ``execute`` is the one way in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from ._action import Action, result_of
from ._control import Context, Control
from ._decision import decide, guard
from ._errors import FirebreakError, StoreUnavailable
from ._store import attempt
from ._task import Task, client_of, not_begun, prepare, told


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
            guard(task, plan)
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
