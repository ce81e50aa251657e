# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``python -m lab up|down|status|start|stop|kill|pause|resume|mark|drill``"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import ROOT, LabError, directory
from .lock import Lock

PR_SET_PDEATHSIG = 1


def up(options: argparse.Namespace) -> int:
    if options.tied:
        _die_with_parent()
    if options.foreground:
        from . import supervisor

        return supervisor.run(directory(), options.thief, _tell)
    if _holder():
        return _again(options)
    return _detach(options)


def _again(options: argparse.Namespace) -> int:
    """A lab runs here already: that is what was asked for."""
    from .client import Lab

    lab = Lab()
    for name in ("thief", "crowd") if options.thief else ():
        lab.start(name)
    for line in _table(lab.state):
        print(line)
    print("The lab was up already.")
    return 0


def _die_with_parent() -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)


def _detach(options: argparse.Namespace) -> int:
    """Start the supervisor apart from this terminal, wait for its word, and let go of it only then."""
    ours, theirs = socket.socketpair()
    words = [sys.executable, "-m", "lab", "supervise", "--notify", str(theirs.fileno())] + (
        ["--thief"] if options.thief else []
    )
    subprocess.Popen(  # it outlives us on purpose
        words,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "LAB_DIR": str(directory()), "PYTHONPATH": str(ROOT)},
    )
    theirs.close()
    line = ours.makefile().readline()
    answer = json.loads(line) if line else {"ok": False, "why": "the lab's supervisor ended before the lab was up"}
    if answer["ok"]:
        ours.sendall(b"k")
    _tell(answer)
    return 0 if answer["ok"] else 1


def supervise(options: argparse.Namespace) -> int:
    from . import supervisor

    guard = socket.socket(fileno=options.notify)

    def notify(answer: dict[str, Any]) -> None:
        guard.setblocking(True)
        guard.sendall(json.dumps(answer).encode() + b"\n")
        guard.setblocking(False)

    return supervisor.run(directory(), options.thief, notify, guard)


def _tell(answer: dict[str, Any]) -> None:
    if not answer["ok"]:
        print(f"The lab did not start: {answer['why']}", file=sys.stderr)
        return
    from .client import Lab

    state = Lab().state
    for line in _table(state):
        print(line)
    print(
        f"The lab is up after {state['ready_after']:.1f} s, the first login after {state['first_login_after']:.1f} s."
    )
    print(f"Look around: . {_short(Path(state['dir']) / 'env')}    End it: python -m lab down", flush=True)


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _table(state: dict[str, Any]) -> list[str]:
    lines = []
    for name, part in sorted(state["parts"].items()):
        what = part.get("why") or f"{part.get('version', '')}  {part.get('endpoint', '')}".strip()
        lines.append(f"  {name:8} {part['kind']:9} {part['status']:9} {what}")
    return lines


def _holder() -> int | None:
    return Lock(directory()).holder()


def down(options: argparse.Namespace) -> int:
    pid = _holder()
    if pid is None:
        print("No lab runs here.")
        return 0
    os.kill(pid, signal.SIGTERM)
    for step in range(1500):
        if _holder() != pid:
            print("The lab is down.")
            return 0
        if step == 1000:  # its children die with it
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    print("The lab did not end.", file=sys.stderr)
    return 1


def status(options: argparse.Namespace) -> int:
    if _holder() is None or not (directory() / "state.json").exists():
        print("No lab runs here.")
        return 3
    from .client import Lab

    for line in _table(Lab().state):
        print(line)
    return 0


def ask(options: argparse.Namespace) -> int:
    from .client import Lab

    lab = Lab()
    if options.verb == "mark":
        lab.mark(options.part)
    else:
        lab.ask(options.verb, options.part)
    return 0


def drill(options: argparse.Namespace) -> int:
    return int(importlib.import_module("lab.drill").main())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lab", description="Real servers on loopback, for drills and tests."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, call, text in (
        ("up", up, "start the lab, and return when it is healthy"),
        ("down", down, "end the lab"),
        ("status", status, "what runs"),
        ("drill", drill, "an incident from breach to proof"),
        ("supervise", supervise, argparse.SUPPRESS),
    ):
        verb = verbs.add_parser(name, help=text) if text != argparse.SUPPRESS else verbs.add_parser(name)
        verb.set_defaults(call=call)
        if name in ("up", "supervise"):
            verb.add_argument("--thief", action="store_true", help="let the thief in, and good users too")
        if name == "up":
            verb.add_argument("--foreground", action="store_true", help="stay; Ctrl-C ends the lab")
            verb.add_argument("--tied", action="store_true", help="end when the process that started this one ends")
        if name == "supervise":
            verb.add_argument("--notify", type=int, required=True)
    for name, text in (
        ("start", "start a part, the thief or the crowd"),
        ("stop", "end a part"),
        ("kill", "end a part with SIGKILL"),
        ("pause", "let a part hang"),
        ("resume", "let it go on"),
        ("mark", "note the start or end of the response"),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("part", choices=("start", "end") if name == "mark" else None)
        verb.set_defaults(call=ask)
    options = parser.parse_args()
    try:
        return int(options.call(options))
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
