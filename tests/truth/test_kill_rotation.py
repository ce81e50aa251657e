# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A rotation killed twice, at any two of its requests, in any of its states; and a delivery killed on the host.

Each run is a process of its own that knows nothing but Vault, as another machine's would. No secret is lost, and none is in
two states. (``tests/contract`` fails each request once in every other way; ``test_kill`` goes on to the release.)
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.firebreak.incident.plugins.module_utils._errors import FirebreakError
from lab import real
from tests.contract.rotation_walk import Consumer, FaultProxy, carry_out
from tests.contract.test_vault_rotation import DELIVERY, Place, Scene, states
from tests.contract.vault_servers import double, real_vault
from tests.truth import budget
from tests.truth.killing import ALL, walk

KILLED = ("killed before", "killed after")
MOST = budget(6, 150)
MOST_STEPS = budget(3, ALL)
TOOLS = ("readlink", "awk", "mktemp", "chmod", "sync", "mv")
Tell = Callable[[str, object], None]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Scene]]:
    with contextlib.ExitStack() as stack:
        home = tmp_path_factory.mktemp("vault")
        vault = stack.enter_context(real_vault(home) if real.find("vault") else double())
        proxy = stack.enter_context(FaultProxy(vault.port))
        consumer = stack.enter_context(Consumer())
        yield lambda: Scene(vault, proxy, consumer)


@pytest.mark.parametrize("control", ["vault_kv_rotation"])
def test_killed_twice_in_any_states(control: str, scenes: Callable[[], Scene], record_property: Tell) -> None:
    first = scenes()
    first.proxy.arm(0, "")
    assert states(first) == ["ok", "ok"]
    requests = range(1, len(first.proxy.seen) + 1)
    first.check_retired()

    def attempt(moment: tuple[tuple[int, str], tuple[int, str]]) -> bool:
        scene = scenes()
        ends = []
        for one in moment:
            scene.proxy.arm(*one)
            ends.append(states(scene))
        scene.proxy.arm(0, "")
        for _again in range(2):
            if states(scene) == ["ok", "ok"]:
                break
        assert states(scene) == ["ok", "ok"], ends
        scene.check_retired()
        return "killed" in ends[0]

    kills = [(number, how) for number in requests for how in KILLED]
    walk([[(one, other) for one in kills for other in kills]], [MOST], attempt, record_property)


@pytest.mark.parametrize("control", ["secret_delivery"])
def test_killed_on_the_host_at_each_of_its_steps(
    control: str, scenes: Callable[[], Scene], tmp_path: Path, record_property: Tell
) -> None:
    """The host's shell dies: the file is the old or the new one, whole, and the same command ends it and sweeps up."""

    def attempt(moment: tuple[str, str]) -> bool:
        tool, when = moment
        folder = tmp_path / f"{tool} {when}"
        tools = folder / "tools"
        tools.mkdir(parents=True)
        scene = scenes()
        scene.proxy.arm(0, "")
        scene.rotate("current")
        place = Place(scene, folder)
        before = place.file.read_bytes()
        run = f'{shutil.which(tool)} "$@"\n' if when == "after" else ""
        (tools / tool).write_text(f"#!/bin/sh\n{run}kill -9 $PPID\n")
        (tools / tool).chmod(0o755)

        def arm(change: Any) -> None:
            place.host.path = f"{tools}:{os.environ['PATH']}"

        with pytest.raises(FirebreakError) as caught:
            carry_out(DELIVERY, place.params(), place.context(), arm)
        place.host.path = os.environ["PATH"]
        assert caught.value.effect == "unknown"
        renamed = place.file.read_bytes() != before
        assert renamed == (tool == "mv" and when == "after")
        place.deliver()
        assert scene.current()["JWT_SECRET"].encode() in place.file.read_bytes()
        assert sorted(os.listdir(folder)) == ["app.env", "reloaded", "tools"]
        assert place.file.stat().st_mode & 0o7777 == 0o640
        return True

    walk([[(tool, when) for tool in TOOLS for when in ("before", "after")]], [MOST_STEPS], attempt, record_property)
