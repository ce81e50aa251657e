# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""What became of an incident so far: for the last screen and for a release."""

from __future__ import annotations

import datetime
import os
import shlex
from typing import Any

from ._case import RUN, Case, Entry, spool_folder, spooled, spooled_entries
from ._incident import PHASES, TARGETS, entries_of, state_of
from ._verify import turn_of


def status(case: Case, left_out: list[str] | None = None) -> dict[str, Any]:
    """Everything that the last screen and a release need; what a run left out counts as open."""
    run = entries_of(case, RUN)
    state = state_of(case, run)
    streams = case.streams()
    places = [(name, seq) for name, seqs in streams.items() if name != RUN for seq in seqs]
    by_stream: dict[str, list[Entry]] = {}
    for (name, _seq), entry in zip(places, case.fetch(places), strict=True):
        by_stream.setdefault(name, []).append(entry)
    result: dict[str, Any] = {
        "incident": {
            "id": case.id,
            **{key: value for key, value in state.items() if key not in ("key", "seals")},
        },
        "phases": _phases(
            [*run, *(entry for entries in by_stream.values() for entry in entries)], _run_shown(case, run)
        ),
        "done": [],
        "open": [],
        "irreversible": [],
        "overrides": [],
        "turns": [],
        "spooled": spooled(case),
        "seal": state["seals"][-1] if state["seals"] else {},
    }
    turns: set[int] = set()
    for name, entries in sorted(by_stream.items()):
        host = name.removesuffix(".evidence")
        _collect(result, host, entries)
        for item in entries[-1].doc["live"]:
            if item.get("reversible"):
                turns.add(turn_of(state["seals"], name, item["seq"]))
    result["turns"] = sorted(turns, reverse=True)
    for what in left_out or []:
        host, _separator, why = what.partition(": ")
        result["open"].append({"host": host, "control": "-", "state": "left out", "why": why})
    return result


def troubles(case: Case) -> dict[str, list[str]]:
    """The roles that failed and have not succeeded since, by host."""
    result: dict[str, list[str]] = {}
    for one in status(case)["open"]:
        if "role" in one:
            result.setdefault(one["host"], []).append(one["role"])
    return result


def _run_shown(case: Case, run: list[Entry]) -> str:
    """The run that asks, where it wrote something; else the newest one that did."""
    runs = [entry.run for entry in run]
    return case.context.run_id if case.context.run_id in runs else runs[-1]


def _phases(entries: list[Entry], run_id: str) -> list[dict[str, Any]]:
    """The phases of one run, from beginning to last entry; they overlap, so that a slow export delays its own system only."""
    ours = [entry for entry in entries if entry.run == run_id]
    shown = []
    for name in PHASES:
        begins = [seconds_of(entry) for entry in ours if entry.body.get("begins") == name]
        times = [seconds_of(entry) for entry in ours if entry.doc["phase"] == name]
        if times:
            begin = min(begins or times)
            shown.append({"name": name, "seconds": round(max(times) - begin, 3), "target_seconds": TARGETS[name]})
    return shown


def seconds_of(entry: Entry) -> float:
    return datetime.datetime.fromisoformat(entry.doc["time"]).timestamp()


def _collect(result: dict[str, Any], host: str, entries: list[Entry]) -> None:
    """Fold one stream: what was done and still stands, and the last word on everything that was not."""
    released = {seq for entry in entries if entry.kind == "released" for seq in entry.body["released"]}
    intents = {entry.seq: entry.body for entry in entries if entry.kind == "intent"}
    outcomes: dict[int, dict[str, Any]] = {}
    last: dict[str, dict[str, Any]] = {}

    def is_open(what: str, control: str, state: str, why: str, **more: Any) -> None:
        last[what] = {"host": host, "control": control, "state": state, "why": why, **more}

    for entry in entries:
        body = entry.body
        for what in body.get("clears", ()):
            last.pop(f"refused {what}", None)
        intent = intents.get(body.get("of", 0))
        if entry.kind == "intent":
            is_open(body["what"], body["control"], "unconfirmed", "no outcome was recorded")
        elif entry.kind == "done" and intent is not None:
            outcomes[body["of"]] = body
            last.pop(intent["what"], None)
            if body.get("outcome") == "applied":
                is_open(intent["what"], intent["control"], "applied", "not yet verified")
        elif entry.kind == "failed" and intent is not None:
            outcomes[body["of"]] = body
            is_open(intent["what"], intent["control"], "failed", body.get("why", ""))
        elif entry.kind == "failed":
            role = str(body.get("role"))
            is_open(f"role {role}", role, "failed", body.get("why", ""), role=role)
        elif entry.kind == "refused":
            is_open(f"refused {body['what']}", body["control"], "refused", body["why"])
        elif entry.kind == "check":
            last.pop(f"check {body['control']}", None)
            if not body["passed"]:
                is_open(f"check {body['control']}", body["control"], "failed", body["why"])
        elif entry.kind == "note" and "recovered" in body:
            last.pop(f"role {body['recovered']}", None)
        elif entry.kind == "override":
            result["overrides"].append({"host": host, **body})
        elif entry.kind == "released":
            for seq in (seq for seq, one in intents.items() if {seq, _released_by(one)} & set(body["released"])):
                last.pop(intents[seq]["what"], None)
    for seq, body in outcomes.items():
        if "releases" not in intents[seq] and ("outcomes" in body or body.get("outcome") == "verified"):
            _count(result, host, intents[seq], body, seq in released)
    result["open"] += list(last.values())


def _released_by(intent: dict[str, Any]) -> int | None:
    """The intent that this one puts back."""
    return intent["releases"]["seq"] if "releases" in intent else None


def _count(result: dict[str, Any], host: str, intent: dict[str, Any], body: dict[str, Any], released: bool) -> None:
    outcomes = body.get("outcomes") or [{"outcome": "applied"} for _change in intent["changes"]]
    for change, outcome in zip(intent["changes"], outcomes, strict=True):
        if outcome["outcome"] not in ("applied", "proved") or (released and change["undo"] is not None):
            continue
        line = {"host": host, "control": intent["control"], "action": change["action"], "target": change["target"]}
        result["done"].append(line)
        if change["irreversible"]:
            result["irreversible"].append({**line, "why": change["irreversible"]})


SECTIONS = (
    ("reversible", "{action} {target}"),
    ("irreversible", "{action} {target} ({why})"),
    ("overrides", "{control}: {guard}, {reason}"),
    ("open", "{control} {state}: {why}"),
)
TITLES = {
    "reversible": "done, and put back by release",
    "irreversible": "done, and final",
    "overrides": "guards that were overridden",
    "open": "NOT CONTAINED, still open",
}
TITLES_RELEASED = {**TITLES, "reversible": "STILL IN FORCE, not put back", "open": "open"}


def lost_screen(case: Case, why: str, known: list[str]) -> list[str]:
    """The last screen while the case store cannot be reached: what this machine alone knows."""
    lines = ["", f"{case.id}  NOT SAFE: {why}", ""]
    for stream, entries in spooled_entries(case).items():
        for entry in entries:
            body = entry["body"]
            if entry["kind"] == "intent":
                lines += [f"  {stream:<8} {change['action']} {change['target']}" for change in body["changes"]]
            elif entry["kind"] in ("done", "failed"):
                lines.append(
                    f"  {stream:<8} {entry['kind']}: {body.get('outcome') or body.get('role')} {body.get('why', '')}".rstrip()
                )
    lines += [f"  NOT CONTAINED, still open: {what}" for what in known]
    folder = os.path.dirname(spool_folder(case, RUN))
    return [
        *lines,
        "",
        f"These entries are on this machine only, in {folder}.",
        "Nothing is known of the rest. Repair the store and run the same command again: it brings them into the case.",
        "",
    ]


def screen(seen: dict[str, Any], inventory: list[str], released: bool = False) -> list[str]:
    """The last screen: what was done, how fast, what is open, and how to undo it."""
    incident = seen["incident"]
    sources = " ".join(f"-i {shlex.quote(source)}" for source in inventory or ["inventory.yml"])
    run = f"ansible-playbook {sources} firebreak.incident.%s -e firebreak_incident_id={incident['id']}"
    lines = [
        "",
        f"{incident['id']}  {incident['severity']} ({incident['priority']}, {incident['alert']})  {incident['title']}",
        f"type {incident['type']}, {incident['status']}, owner {incident['owner'] or '-'}, opened {incident['created'][:19]}Z",
    ]
    if seen["spooled"]:
        streams = ", ".join(seen["spooled"])
        lines += ["", f"NOT SAFE: the case store was lost; entries of {streams} are on this machine only."]
    lines += [] if released else _phase_lines(seen)
    final = [{name: line[name] for name in line if name != "why"} for line in seen["irreversible"]]
    shown = {**seen, "reversible": [line for line in seen["done"] if line not in final]}
    titles = TITLES_RELEASED if released else TITLES
    for key, form in SECTIONS:
        if shown[key]:
            lines += ["", f"{titles[key]}:", *(f"  {line['host']:<8} {form.format(**line)}" for line in shown[key])]
    lines += ["", _verdict(shown, released)]
    if not released:
        lines.append(f"undo:   {run % 'release'}")
    if seen["seal"]:
        lines.append(f"verify: {run % 'verify_case'} -e firebreak_expect={seen['seal']['digest']}")
    return [*lines, ""]


def _phase_lines(seen: dict[str, Any]) -> list[str]:
    lines = ["", "phase         seconds   target"]
    for phase in seen["phases"]:
        late = "  LATE" if phase["seconds"] > phase["target_seconds"] else ""
        lines.append(f"  {phase['name']:<12}{phase['seconds']:>7.1f}{phase['target_seconds']:>9}{late}")
    return lines


def _verdict(shown: dict[str, Any], released: bool) -> str:
    still = len(shown["open"])
    if released:
        left = len(shown["reversible"])
        return f"{left} changes are still in force." if left else "Nothing is left to put back."
    if still:
        return f"{still} not contained: see to what is named, then run the same command again."
    return "Everything is contained."
