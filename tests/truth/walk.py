# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One control in one state of the lab: told by a dry run, done, done again, and released."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from ansible_collections.firebreak.incident.plugins.module_utils._control import Control
from lab.client import Lab
from tests import dumps, helpers
from tests.contract.rotation_walk import LocalHost
from tests.rows import Row, State
from tests.truth import FULL

# What both runs say, each in the same words.
SAID = ("changed", "changes", "diff", "state_before", "state_after", "incident_id", "mark")


Example = TypeVar("Example")


def for_examples(
    examples: st.SearchStrategy[Example], number: int, attempt: Callable[[Example], None], *first: Example
) -> int:
    """Try that many examples, given ones first; returns how many there were."""
    tried = 0

    def each(one: Example) -> None:
        nonlocal tried
        tried += 1
        attempt(one)

    test = given(examples)(each)
    for one in first:
        test = example(one)(test)
    settings(
        max_examples=number,
        derandomize=not FULL,
        database=None,
        deadline=None,
        print_blob=False,
        # An example is short enough, and each attempt at a shorter one is a run.
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(test)()
    return tried


def for_states(row: Row, number: int, attempt: Callable[[State], None]) -> int:
    """The usual state, and that many others."""
    return for_examples(row.states(), number, lambda state: attempt(copy.deepcopy(state)), row.usual)


class Writes:
    """What this process does to the disk while it is looked at."""

    _now: Writes | None = None
    _hooked = False
    EVENTS = (
        "os.chmod",
        "os.chown",
        "os.link",
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.symlink",
        "os.truncate",
    )

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __enter__(self) -> Writes:
        if not Writes._hooked:
            sys.addaudithook(Writes._hear)  # it cannot be taken away again
            Writes._hooked = True
        Writes._now = self
        return self

    def __exit__(self, *_exception: object) -> None:
        Writes._now = None

    @classmethod
    def _hear(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if cls._now is None or not arguments or isinstance(arguments[0], int):  # a pipe's end has a number only
            return
        writes = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if (writes or event in cls.EVENTS) and os.devnull != arguments[0] and "__pycache__" not in str(arguments[0]):
            cls._now.seen.append(f"{event} {arguments[0]}")


class Walk:
    """An incident of its own over one state."""

    def __init__(self, lab: Lab, row: Row, state: State, home: Path) -> None:
        self.lab = lab
        self.row = row
        self.state = state
        self.home = home
        row.bring(lab, state)
        self.store = helpers.store_of(lab)
        self.incident = helpers.open_incident(lab, self.store, row.host)
        helpers.begin(lab, row, self.store, self.incident)
        around = helpers.surroundings(lab, self.store, row.host, self.incident)
        self.params = {**row.asked(lab, state), **around, "host": row.host}

    @property
    def control(self) -> Control:
        control: Control = helpers.module_of(self.row.control).CONTROL
        return control

    def run(self, **more: Any) -> dict[str, Any]:
        return helpers.execute(self.control, self.params, host=LocalHost(), **more)

    def release(self, **more: Any) -> dict[str, Any]:
        return helpers.release(
            self.lab, self.store, self.row.control, self.params, self.incident, host=LocalHost(), **more
        )

    def checked(self, work: Callable[..., dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A dry run, which writes nothing to any disk."""
        with Writes() as writes:
            result = work(check_mode=True, **more)
        assert writes.seen == []
        return result

    def everything(self, *parts: str) -> dict[str, Any]:
        """What the servers hold, and what this process could have written beside them."""
        return {**dumps.everything(self.lab, *parts), "observed": self.row.observe(self.lab), "beside": self.files()}

    def files(self) -> dict[str, bytes]:
        places = (Path(self.store.removeprefix("file://")), self.home)
        return {f"{place}/{name}": data for place in places for name, data in helpers.files_below(place).items()}

    def touched(self) -> dict[str, Any]:
        return dumps.everything(self.lab, *self.row.touches) if self.row.touches else {}

    # --- the properties

    def tells_the_truth(self) -> None:
        """Check, real, again, check again, check the release, release."""
        before, touched = self.everything(), self.touched()
        checked = succeeded(self.checked(self.run))
        assert self.everything() == before
        assert checked["outcome"] == ("planned" if checked["changed"] else "ok")

        real = succeeded(self.run())
        assert said(real) == said(checked)
        seen, after = self.everything(), self.touched()
        assert {name for name in dumps.PARTS if seen[name] != before[name]} <= {*self.row.touches}
        assert self.control.evidence or real["changed"] == (touched != after)
        self.row.effect(self.lab, self.state, touched, copy.deepcopy(after))

        again = succeeded(self.run())
        assert (again["outcome"], again["changed"], again["changes"]) == ("ok", False, [])
        assert again["state_before"] == again["state_after"] == real["state_after"]
        files = self.files()
        assert said(succeeded(self.checked(self.run))) == said(again)
        planned = succeeded(self.checked(self.release))
        assert self.touched() == after and self.files() == files

        released = succeeded(self.release())
        assert {**released, "screen": 0} == {**planned, "screen": 0}

    def goes_back(self) -> None:
        """Done and released: the servers hold what they held, or tests/irreversible.yml says why not."""
        before, observed = self.touched(), self.row.observe(self.lab)
        real = succeeded(self.run())
        after = self.touched()
        final = [{"control": self.row.control, **change} for change in real["changes"] if not change["reversible"]]
        assert helpers.unlisted(final) == [] and (not final or not self.row.reversible)
        released = succeeded(self.release())
        if self.row.reversible:
            assert (self.touched(), self.row.observe(self.lab)) == (before, observed)
            assert released["irreversible"] == [] and released["changed"] == real["changed"]
        else:
            assert self.touched() == after and not released["changed"]
            if not self.control.evidence:  # what lies in the case changed no system
                assert helpers.unlisted(released["irreversible"]) == []
                assert {change["target"] for change in final} <= {one["target"] for one in released["irreversible"]}
        assert not succeeded(self.release())["changed"]

    def is_refused(self, words: str) -> None:
        """In the same words by a dry run and by the real one, and nothing is touched."""
        before = self.everything()
        checked = self.checked(self.run)
        assert checked.get("failed") and words in checked["msg"], checked
        assert self.everything() == before
        real = self.run()
        assert refused_alike(checked, real), real
        assert not real["changed"] and not checked["changed"]
        assert {**self.everything(), "beside": 0} == {**before, "beside": 0}


def succeeded(result: dict[str, Any]) -> dict[str, Any]:
    assert not result.get("failed"), result["msg"]
    return result


def refused_alike(checked: dict[str, Any], real: dict[str, Any]) -> bool:
    """In the same words. Where the service itself refuses, the real run also says which changes were not made."""
    reason = str(checked.get("msg")).partition(" Nothing was changed.")[0]
    return bool(checked.get("failed") and real.get("failed") and reason in real["msg"])


def said(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in SAID}
