# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every line of every control's table: what its plan decides, that nothing else reaches it, and that its undo is exact."""

from __future__ import annotations

import builtins
import copy
import os
import random
import secrets
import socket
import time
from typing import Any, NoReturn

import pytest

from ansible_collections.firebreak.incident.plugins.module_utils._errors import Refused
from ansible_collections.firebreak.incident.plugins.module_utils._plan import Plan, at, recorded
from ansible_collections.firebreak.incident.plugins.module_utils._release import compare
from ansible_collections.firebreak.incident.plugins.module_utils._task import COMMON, spec_of
from tests.helpers import complete, controls, module_of, table_of
from tests.rows import Case, Row

CONTROLS = controls()
CASES = [pytest.param(name, case, id=f"{name}: {case.name}") for name in CONTROLS for case in table_of(name).PLANS]
PLANNED = [param for param in CASES if not param.values[1].raises]


class FrozenDict(dict[str, Any]):
    """A mapping that nobody can write to."""

    def _refuse(self, *_args: Any, **_more: Any) -> NoReturn:
        raise TypeError("a plan changes its input")

    __setitem__ = __delitem__ = __ior__ = _refuse  # type: ignore[assignment]
    clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]


class FrozenList(list[Any]):
    """A list that nobody can write to."""

    _refuse = FrozenDict._refuse
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse  # type: ignore[assignment]
    append = clear = extend = insert = pop = remove = reverse = sort = _refuse  # type: ignore[assignment]


def frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return FrozenDict({key: frozen(element) for key, element in value.items()})
    if isinstance(value, list):
        return FrozenList(frozen(element) for element in value)
    return value


def planned(control: str, params: dict[str, Any], facts: dict[str, Any]) -> Plan:
    plan: Plan = module_of(control).plan(params, facts)
    return plan


@pytest.mark.parametrize("control", CONTROLS)
def test_every_control_has_a_table_and_a_row(control: str) -> None:
    assert len(table_of(control).PLANS) >= 5
    assert issubclass(table_of(control).Lab, Row)
    assert table_of(control).Lab.control == control == module_of(control).CONTROL.name
    names = [case.name for case in table_of(control).PLANS]
    assert len(set(names)) == len(names)


def test_controls_are_found() -> None:
    assert {"postgresql_write_fence", "vault_kv_rotation"} <= set(CONTROLS)
    assert not {"incident", "incident_info", "health_gate"} & set(CONTROLS)


@pytest.mark.parametrize(("control", "case"), CASES)
def test_the_table(control: str, case: Case) -> None:
    if case.raises:
        with pytest.raises(Refused) as refusal:
            planned(control, case.params, case.facts)
        assert case.raises in refusal.value.msg and refusal.value.effect == "none"
        return
    plan = planned(control, case.params, case.facts)
    assert [(change.action, change.target) for change in plan.changes] == case.changes
    assert case.after is None or plan.after == case.after


@pytest.mark.parametrize(("control", "case"), PLANNED)
def test_a_plan_is_whole_and_converges(control: str, case: Case) -> None:
    plan = planned(control, case.params, case.facts)
    assert plan.before == {name: value for name, value in case.facts.items() if name != "estimate"}
    assert plan.before.keys() == plan.after.keys()
    assert bool(plan.changes) == (plan.before != plan.after)
    again = planned(control, case.params, plan.after)
    assert again.changes == () and again.before == again.after == plan.after
    # The end of sessions has no element of its own, nor has a reload that a kill left to do; never all of a plan is so.
    assert not plan.changes or any(at(plan.before, one.path) != at(plan.after, one.path) for one in plan.changes)


@pytest.mark.parametrize(("control", "case"), CASES)
def test_a_plan_is_pure(control: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same twice, from input that cannot be written to, without a clock, a file, a socket or chance."""
    if case.raises:
        with pytest.raises(Refused):
            planned(control, frozen(case.params), frozen(case.facts))
        return
    params, facts = copy.deepcopy(case.params), copy.deepcopy(case.facts)

    def impure(*_args: Any, **_more: Any) -> NoReturn:
        raise AssertionError("a plan looks at something that it was not given")

    with monkeypatch.context() as patch:
        for place, name in (
            (builtins, "open"),
            (os, "urandom"),
            (random, "random"),
            (secrets, "token_bytes"),
            (socket, "socket"),
            (time, "time"),
            (time, "monotonic"),
        ):
            patch.setattr(place, name, impure)
        first = planned(control, frozen(params), frozen(facts))
        second = planned(control, frozen(params), frozen(facts))
    assert first == second == planned(control, params, facts)
    assert (params, facts) == (case.params, case.facts)


@pytest.mark.parametrize(("control", "case"), PLANNED)
def test_undo_is_exact(control: str, case: Case) -> None:
    """As a release goes: newest first, each element compared, with the recorded options and the defaults alone."""
    plan = planned(control, case.params, case.facts)
    changes = [change for change in plan.changes if change.undo is not None]
    facts = plan.after
    for change in reversed(changes):
        needed = compare(facts, recorded(plan, change))
        assert needed["conflict"] == []
        if needed["needed"]:
            facts = planned(control, _undoing(control, case, change), facts).after
        assert at(facts, change.path) == at(plan.before, change.path), change.target
    for change in changes:
        assert at(facts, change.path) == at(plan.before, change.path), change.target


def _undoing(control: str, case: Case, change: Any) -> dict[str, Any]:
    """The options of an undo: valid, and free of anything that the host's variables or the engine give."""
    own = module_of(control).SPEC["argument_spec"]
    assert change.undo.keys() <= own.keys()
    assert not any(own[name].get("no_log") for name in change.undo)
    shared = spec_of(module_of(control).CONTROL)["argument_spec"].keys() - own.keys()
    given = {name: value for name, value in case.params.items() if name in shared}
    return {**complete(module_of(control).CONTROL, {**given, **change.undo}), "mark": case.params["mark"]}


def test_the_harness_notices_an_impure_plan() -> None:
    with pytest.raises(TypeError, match="changes its input"):
        frozen({"a": [{}]})["a"][0].update(b=1)
    with pytest.raises(TypeError, match="changes its input"):
        frozen({"a": []})["a"].append(1)
    assert COMMON.keys().isdisjoint(set().union(*(module_of(name).SPEC["argument_spec"] for name in CONTROLS)))
