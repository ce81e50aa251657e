# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The drill: a thief is let into a fresh lab, the playbook that a user would run contains it, and a scorecard tells how well.

It leaves the lab running for a look around, unless DRILL_KEEP=0.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import ROOT, directory, files, picture
from .client import Lab

BEFORE = 3.0  # seconds that the thief steals undisturbed
AFTER = 4.0  # seconds that are watched afterwards
PATIENCE = 600
UNDO = ".venv/bin/ansible-playbook -i .lab/inventory.yml firebreak.incident.release"


def say(text: str) -> None:
    print(text, flush=True)


def lab(*words: str) -> int:
    return subprocess.run([sys.executable, "-m", "lab", *words], cwd=ROOT, check=False).returncode


def playbook(name: str, folder: Path, *extra: str) -> int:
    """The very command that a user runs, with readable output and colour only on a terminal."""
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", str(folder / "inventory.yml"), name, *extra]
    shown = " ".join(
        [
            "ansible-playbook",
            "-i",
            ".lab/inventory.yml",
            name,
            *(f"'{word}'" if " " in word else word for word in extra),
        ]
    )
    say(f"\n$ {shown}\n")
    env = {
        **os.environ,
        "ANSIBLE_DISPLAY_SKIPPED_HOSTS": "0",
        "ANSIBLE_DISPLAY_OK_HOSTS": "0",
        "ANSIBLE_LOCALHOST_WARNING": "0",
    }
    if sys.stdout.isatty():
        env["ANSIBLE_FORCE_COLOR"] = "1"
    else:
        env["ANSIBLE_NOCOLOR"] = "1"
    return subprocess.run(
        command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, timeout=PATIENCE, check=False
    ).returncode


def main() -> int:
    folder = directory()
    incident = os.environ.get("INCIDENT", "data_breach")
    say(f"firebreak drill: {incident}")
    lab("down")
    _forget(folder)
    if lab("up", "--thief"):
        return 1
    running = Lab(folder)
    running.until(
        lambda: bool(running.thief.summary()) and bool(running.crowd.summary()), "thief and users do not begin"
    )
    say(f"\nThe thief is in. It steals for {BEFORE:.0f} seconds through {len(running.thief.summary()['doors'])} doors.")
    time.sleep(BEFORE)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    glass = {"firebreak_break_glass": [{"guard": "all_sessions", "reason": "drill: sign everybody out", "date": today}]}
    running.mark("start")
    begun = time.time()
    status = playbook(
        f"firebreak.incident.{incident}",
        folder,
        "-e",
        json.dumps({**glass, "firebreak_incident_key": f"drill-{int(begun)}"}),
    )
    running.mark("end")
    seconds = time.time() - begun
    time.sleep(AFTER)
    card = scorecard(running, incident, seconds)
    files.write_json(folder / "scorecard.json", card)
    page = Path(card["case"]) / "report" / "drill.html"
    page.parent.mkdir(mode=0o700, exist_ok=True)
    files.write(page, picture.draw(card, folder))
    for line in table(card):
        say(line)
    keep = os.environ.get("DRILL_KEEP", "1") != "0"
    if not keep:
        lab("down")
    elif status == 0:
        say(
            "The lab is still running. Look around:  . .lab/env    Undo:  "
            + card["undo"]
            + "    End it:  make lab-down"
        )
    contained = status == 0 and all(door["closed_after_seconds"] is not None for door in card["doors"])
    return 0 if contained else 1


def _forget(folder: Path) -> None:
    """Everything of the lab before but its cases."""
    for name in ("thief.json", "thief.jsonl", "crowd.json", "crowd.jsonl", "marks.json", "scorecard.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "report", ignore_errors=True)


def scorecard(running: Lab, incident: str, seconds: float) -> dict[str, Any]:
    """The drill in numbers: what the thief and the users saw, and what the case says."""
    running.until(lambda: bool(running.crowd.summary()) and bool(running.thief.summary()), "the thief's account")
    seen = _case(running)
    doors = running.thief.summary()["doors"]
    return {
        "incident_id": seen["incident"]["id"],
        "playbook": f"firebreak.incident.{incident}",
        "seconds": round(seconds, 2),
        "phases": seen["phases"],
        "doors": [
            {"name": name, **{key: door[key] for key in ("taken_before", "taken_after_start", "closed_after_seconds")}}
            for name, door in doors.items()
        ],
        "users": running.crowd.summary()["phases"],
        "open": seen["open"],
        "irreversible": seen["irreversible"],
        "seal": seen["seal"].get("digest"),
        "case": str(running.dir / "cases" / seen["incident"]["id"]),
        "undo": f"{UNDO} -e firebreak_incident_id={seen['incident']['id']}",
    }


def _case(running: Lab) -> dict[str, Any]:
    """The newest incident, as incident_info shows it to everybody."""
    newest = sorted(path.name for path in (running.dir / "cases").glob("INC-*"))[-1]
    options = {
        "incident_id": newest,
        "case_store": running.hostvars("cf")["firebreak_case_store"],
        "site": "lab",
    }
    command = [str(Path(sys.executable).parent / "ansible"), "localhost", "-m", "firebreak.incident.incident_info"]
    env = {
        **os.environ,
        "ANSIBLE_LOAD_CALLBACK_PLUGINS": "1",
        "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.minimal",
        "ANSIBLE_NOCOLOR": "1",
    }
    answer = subprocess.run(
        [*command, "-a", json.dumps(options)], capture_output=True, text=True, env=env, cwd=ROOT, check=True
    )
    return dict(json.loads(answer.stdout.split("=>", 1)[1]))


def table(card: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"scorecard  {card['incident_id']}  {card['playbook']}  {card['seconds']:.1f} s from command to screen",
        "",
    ]
    lines += ["  door         stolen before   stolen since   closed after"]
    for door in card["doors"]:
        after = door["closed_after_seconds"]
        closed = "STILL OPEN" if after is None else f"{after:.1f} s"
        lines.append(f"  {door['name']:<12}{door['taken_before']:>14}{door['taken_after_start']:>15}{closed:>15}")
    lines += ["", "  users' requests   served   signed out   refused   errors"]
    for phase, numbers in card["users"].items():
        cells = (numbers["served"], numbers["signed_out"], numbers["refused"], numbers["errors"])
        lines.append(f"  {phase:<16}{cells[0]:>8}{cells[1]:>13}{cells[2]:>10}{cells[3]:>9}")
    lines += [
        "",
        f"  open: {len(card['open'])}   irreversible: {len(card['irreversible'])}   all of it in .lab/scorecard.json",
        f"  drawn: .lab/cases/{card['incident_id']}/report/drill.html",
        "",
    ]
    return lines
