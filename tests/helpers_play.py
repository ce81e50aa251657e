# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A play of the real ``ansible-playbook``, held after each task, so that a test can look at the servers in between."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab import ROOT
from lab.client import Lab

SECONDS = 60


def task(name: str, module: str, options: dict[str, Any], **keywords: Any) -> dict[str, Any]:
    """A task of this collection that lets the play go on when it fails."""
    return {"name": name, f"firebreak.incident.{module}": options, "ignore_errors": True, **keywords}


def environment(home: Path) -> dict[str, str]:
    """Every folder that Ansible writes to is under ``home``, so that a test can search it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "FIREBREAK_"))}
    return {
        **kept,
        "ANSIBLE_CONFIG": str(home / "ansible.cfg"),
        "ANSIBLE_HOME": str(home / "ansible"),
        "ANSIBLE_LOCAL_TEMP": str(home / "local"),
        "ANSIBLE_REMOTE_TEMP": str(home / "remote"),
        "ANSIBLE_ASYNC_DIR": str(home / "async"),
        "ANSIBLE_SSH_CONTROL_PATH_DIR": str(home / "cp"),
        "ANSIBLE_SSH_ARGS": "-o ControlMaster=auto -o ControlPersist=5s",
        "ANSIBLE_CALLBACK_PLUGINS": str(ROOT / "tests" / "callbacks"),
        "ANSIBLE_CALLBACKS_ENABLED": "lockstep",
        "ANSIBLE_DEPRECATION_WARNINGS": "true",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_FORCE_COLOR": "0",
        "FIREBREAK_SPOOL": str(home / "spool"),
        "TMPDIR": str(home / "tmp"),
    }


class Play:
    """Use as a context manager; ``next`` lets the play go on to the end of its next task."""

    def __init__(self, lab: Lab, home: Path, host: str, tasks: list[dict[str, Any]], *options: str, **env: str) -> None:
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        (home / "ansible.cfg").write_text("")
        self.playbook = home / "playbook.json"
        self.playbook.write_text(json.dumps([{"hosts": host, "gather_facts": False, "tasks": tasks}]))
        self.console = home / "console.txt"
        self._names = [one["name"] for one in tasks]
        self._ours, theirs = socket.socketpair()
        self._ours.settimeout(SECONDS)
        self._lines = self._ours.makefile("rb")
        self._held = False
        with self.console.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    str(Path(sys.executable).parent / "ansible-playbook"),
                    *("-i", str(lab.inventory_path)),
                    *options,
                    str(self.playbook),
                ],
                cwd=home,
                env={**environment(home), **env, "FIREBREAK_LOCKSTEP": str(theirs.fileno())},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        theirs.close()

    def __enter__(self) -> Play:
        return self

    def __exit__(self, kind: Any, *_more: Any) -> None:
        if kind is None and self.process.returncode is None:
            self._go_on()
            assert not self._lines.readline(), "the play has more tasks than the test looked at"
        else:
            self.process.terminate()
        self.process.wait(SECONDS)
        self._ours.close()

    def kill(self, when: Callable[[], bool]) -> None:
        """kill -9 in the middle of the next task, as soon as this is so."""
        self._go_on()
        give_up = time.monotonic() + SECONDS
        while not when() and self.process.poll() is None:
            assert time.monotonic() < give_up, f"it never came to that:\n{self.console.read_text()[-3000:]}"
            time.sleep(0.01)
        assert self.process.poll() is None, f"it ended before:\n{self.console.read_text()[-3000:]}"
        self.process.kill()
        self.process.wait(SECONDS)

    def _go_on(self) -> None:
        if self._held:
            self._ours.sendall(b".")
        self._held = False

    def next(self, name: str) -> dict[str, Any]:
        """The result of the task of this name, which is the next one."""
        self._go_on()
        line = self._lines.readline()
        assert line, f"the play ended before {name}:\n{self.console.read_text()[-3000:]}"
        self._held = True
        told = json.loads(line)
        assert told["task"] == name, told
        result: dict[str, Any] = {**told["result"], "status": told["status"]}
        return result
