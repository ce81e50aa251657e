# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""However a lab is ended, no process stays; and it never takes over a folder that is not its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lab import ROOT
from lab.client import Lab
from lab.parts.services import request
from lab.process import SHIM, unprivileged_uid
from tests.conftest import end_lab, start_lab


def command(folder: Path, *words: str) -> subprocess.Popen[str]:
    env = {**os.environ, "LAB_DIR": str(folder)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", "lab", *words], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True
    )


def family(folder: Path) -> list[psutil.Process]:
    supervisor = psutil.Process(Lab(folder).state["pid"])
    return [supervisor, *supervisor.children(recursive=True)]


def all_gone(processes: list[psutil.Process]) -> None:
    # A zombie that nobody reaps is not alive; psutil's wait would not end for it.
    def alive() -> list[str]:
        return [each.name() for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]

    end = time.monotonic() + 8
    while alive_now := _quietly(alive):
        assert time.monotonic() < end, f"left behind: {alive_now}"
        time.sleep(0.02)


def _quietly(call: Callable[[], list[str]]) -> list[str]:
    try:
        return call()
    except psutil.NoSuchProcess:
        return ["one that is ending"]


def marked(folder: Path) -> list[psutil.Process]:
    """Every process of a lab that may not be up yet: by its environment or its command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join(process.cmdline()) or process.environ().get("LAB_DIR") == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_stays_after_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    process = start_lab(tmp_path, "--thief")
    processes = family(tmp_path)
    assert len(processes) > 20
    process.send_signal(number)
    process.communicate(timeout=10)
    all_gone(processes)


def test_no_process_stays_when_the_parent_is_killed(tmp_path: Path) -> None:
    """A test run that is killed takes its lab along."""
    script = (
        "import sys; from pathlib import Path; from tests.conftest import start_lab\n"
        "start_lab(Path(sys.argv[1])); print('up', flush=True); input()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout and parent.stdout.readline() == "up\n"
    processes = family(tmp_path)
    parent.kill()
    parent.communicate()
    all_gone(processes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("after", [0.3, 0.8])
def test_no_process_stays_when_up_is_ended_before_the_lab_is_up(
    tmp_path: Path, number: signal.Signals, after: float
) -> None:
    process = command(tmp_path, "up")
    time.sleep(after)
    processes = marked(tmp_path)
    assert processes
    process.send_signal(number)
    process.communicate(timeout=10)
    all_gone(processes)
    assert not [each for each in marked(tmp_path) if each.status() != psutil.STATUS_ZOMBIE]


def test_up_leaves_a_lab_that_down_ends(tmp_path: Path) -> None:
    process = command(tmp_path, "up")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "first login after" in out
    processes = family(tmp_path)
    assert command(tmp_path, "status").wait(10) == 0
    (tmp_path / "cases" / "kept").write_text("a case")
    assert command(tmp_path, "down").wait(10) == 0
    all_gone(processes)
    assert command(tmp_path, "status").wait(10) == 3
    # A fresh lab in the same place, with old cases and new secrets.
    end_lab(start_lab(tmp_path))
    assert (tmp_path / "cases" / "kept").read_text() == "a case"


def test_a_killed_lab_is_followed_by_a_fresh_one_at_once(tmp_path: Path) -> None:
    process = start_lab(tmp_path)
    processes = family(tmp_path)
    process.kill()
    process.communicate()
    end_lab(start_lab(tmp_path))
    all_gone(processes)


def test_an_ordinary_user_has_a_lab_too(tmp_path: Path) -> None:
    """For root: the whole lab under another user number, without any capability. Else the suite's own lab is the proof."""
    uid = unprivileged_uid()
    words = [sys.executable, "-IS", SHIM, str(os.getpid()), str(int(signal.SIGKILL)), str(uid)]
    words += [sys.executable, "-m", "lab", "up", "--foreground", "--tied"]
    env = {**os.environ, "LAB_DIR": str(tmp_path)}
    process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert any("first login after" in line for line in process.stdout), process.communicate()[1]
    processes = family(tmp_path)
    end_lab(process)
    all_gone(processes)


def test_doubles_take_the_place_of_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_DOUBLES", "vault,versitygw")
    process = start_lab(tmp_path)
    try:
        lab = Lab(tmp_path)
        assert {lab.state["parts"][name]["kind"] for name in ("vault", "s3")} == {"double"}
        headers = {"X-Vault-Token": lab.env["VAULT_TOKEN"]}
        url = f"{lab.env['VAULT_ADDR']}/v1/secret/data/app/backend"
        assert request("GET", url, headers=headers)[1]["data"]["data"]["JWT_SECRET"] == lab.stolen["jwt_secret"]
    finally:
        end_lab(process)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("data")
    process = command(tmp_path, "up")
    _unused, err = process.communicate(timeout=10)
    assert process.returncode == 1 and "LAB_DIR" in err
    assert (tmp_path / "run" / "precious").read_text() == "data"
