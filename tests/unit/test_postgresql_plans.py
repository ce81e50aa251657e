# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the PostgreSQL controls decide, without a server."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from ansible_collections.firebreak.incident.plugins.module_utils._errors import Refused
from ansible_collections.firebreak.incident.plugins.module_utils._plan import at
from ansible_collections.firebreak.incident.plugins.modules import (
    postgresql_export,
    postgresql_login_lock,
    postgresql_write_fence,
)
from tests.controls import postgresql_export as export_row
from tests.controls import postgresql_login_lock as lock_row
from tests.controls import postgresql_write_fence as fence_row
from tests.rows import Case

TABLES: list[tuple[ModuleType, list[Case]]] = [
    (postgresql_write_fence, fence_row.PLANS),
    (postgresql_login_lock, lock_row.PLANS),
    (postgresql_export, export_row.PLANS),
]
CASES = [
    pytest.param(module, case, id=f"{module.__name__.rpartition('.')[2]}: {case.name}")
    for module, cases in TABLES
    for case in cases
]


@pytest.mark.parametrize(("module", "case"), CASES)
def test_plan(module: Any, case: Case) -> None:
    if case.raises:
        with pytest.raises(Refused, match=case.raises):
            module.plan(case.params, case.facts)
        return
    plan = module.plan(case.params, case.facts)
    assert [(change.action, change.target) for change in plan.changes] == case.changes
    assert case.after is None or plan.after == case.after
    assert module.plan(case.params, plan.after).changes == ()


@pytest.mark.parametrize(
    ("module", "case"), [param for param in CASES if param.values[1].params.get("state") == "enabled"]
)
def test_undo_of_every_change_restores_what_stood_there(module: Any, case: Case) -> None:
    """Also where the run was cut off after any number of changes."""
    if case.raises:
        return
    plan = module.plan(case.params, case.facts)
    for done in range(len(plan.changes) + 1):
        facts = _reached(plan, done)
        for change in reversed(plan.changes[:done]):
            undone = module.plan({**case.params, **change.undo}, facts)
            facts = {**facts, **undone.after}
        assert all(at(facts, change.path) == at(plan.before, change.path) for change in plan.changes)


def _reached(plan: Any, done: int) -> dict[str, Any]:
    """The facts after the first changes: an element is reached with the last change that has it as its own."""
    import copy

    facts = copy.deepcopy(plan.before)
    for change in plan.changes[:done]:
        if change.action == "terminate":
            continue
        *parents, last = change.path
        at(facts, tuple(parents))[last] = at(plan.after, change.path)
    return facts


def test_the_lock_names_what_it_covers_so_that_protected_roles_are_refused() -> None:
    case = lock_row.PLANS[0]
    assert postgresql_login_lock.plan(case.params, case.facts).covers == {"roles": ["reporting"]}


def test_locking_the_last_role_that_can_log_in_is_wide() -> None:
    case = lock_row.PLANS[0]
    facts = {**case.facts, "estimate": {"own_role": "firebreak", "other_login_roles": 0}}
    assert postgresql_login_lock.plan(case.params, facts).wide == ("all_login_roles",)
    assert postgresql_login_lock.plan(case.params, case.facts).wide == ()


def test_no_plan_of_an_export_names_a_user() -> None:
    plan = postgresql_export.plan({**export_row.PLANS[0].params, "user_ids": ["canary-4711"]}, export_row.NONE)
    assert "canary" not in repr(plan)
