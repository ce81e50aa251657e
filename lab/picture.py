# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The drill as a picture: doors, controls and users' requests over one line of time, in one HTML file.

No script, no network, no fonts of its own. Every state has a shape as well as a colour, so that it can be read on paper.
"""

from __future__ import annotations

import collections
import datetime
import html
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import files

LEFT, WIDTH, ROW = 190, 1100, 24
SLICE = 0.5  # seconds of users' requests in one column
COLUMN = 60  # height of the highest column
FEWEST_PIXELS = 3
GOOD = ("served", "signed_out")

STYLE = """
:root { --ink: #1d2329; --faint: #8b949e; --grid: #e4e7eb; --paper: #fff; --bad: #b3261e; --good: #1a7f64; --ours: #2457a6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --faint: #98a2ad; --grid: #30363d; --paper: #14181c; --bad: #ff8a80; --good: #5fd0ae; --ours: #8ab4f8; }
}
@media print {
  :root { --ink: #000; --faint: #555; --grid: #ccc; --paper: #fff; --bad: #a11; --good: #064; --ours: #124; }
  @page { size: landscape; margin: 12mm; }
}
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1120px; margin: 24px auto; padding: 0 12px; }
h1 { font-size: 20px; margin: 0 0 4px; } p { margin: 0 0 14px; } small, .faint { color: var(--faint); }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--ink); } svg .faint { fill: var(--faint); }
.grid { stroke: var(--grid); } .moment { stroke: var(--ink); stroke-dasharray: 4 3; }
.taken { stroke: var(--bad); stroke-width: 1.5; } .refused { fill: none; stroke: var(--good); }
.closed { stroke: var(--good); stroke-width: 2; } .control { fill: var(--ours); } .phase { fill: none; stroke: var(--faint); }
.served { fill: var(--good); opacity: .45; } .signed_out { fill: var(--ours); } .failed { fill: var(--bad); }
table { border-collapse: collapse; margin: 10px 0; }
td, th { padding: 2px 14px 2px 0; text-align: right; font-variant-numeric: tabular-nums; }
td:first-child, th:first-child { text-align: left; } th { font-weight: 600; border-bottom: 1px solid var(--grid); }
"""


class Drawing:
    """Elements below each other; ``x`` of a moment in seconds since the command."""

    def __init__(self, first: float, last: float) -> None:
        self.first, self.last = first, last
        self.scale = (WIDTH - LEFT - 20) / (last - first)
        self.y = 20
        self.elements: list[str] = []

    def x(self, moment: float) -> float:
        return round(LEFT + (min(max(moment, self.first), self.last) - self.first) * self.scale, 1)

    def add(self, name: str, text: str = "", **attributes: Any) -> None:
        words = " ".join(
            f'{key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"' for key, value in attributes.items()
        )
        self.elements.append(f"<{name} {words}>{html.escape(text)}</{name}>")

    def text(self, x: float, text: str, class_: str = "", anchor: str = "start", above: float = 4) -> None:
        self.add("text", text, x=x, y=self.y + above, class_=class_, text_anchor=anchor)

    def label(self, text: str) -> None:
        self.text(LEFT - 10, text, anchor="end")

    def span(self, begun: float, ended: float, class_: str, height: float = 10) -> None:
        width = max(self.x(ended) - self.x(begun), FEWEST_PIXELS)
        self.add("rect", x=self.x(begun), y=self.y - height / 2, width=round(width, 1), height=height, class_=class_)

    def heading(self, text: str, key: str = "") -> None:
        self.y += 14
        self.text(0, text)
        self.text(LEFT, key, class_="faint")
        self.y += ROW

    def svg(self) -> str:
        step = max(1, math.ceil((self.last - self.first) / 16))
        behind = Drawing(self.first, self.last)
        for second in range(math.ceil(self.first), math.floor(self.last) + 1):
            if second % step == 0:
                x = behind.x(second)
                behind.add("line", x1=x, x2=x, y1=10, y2=self.y, class_="grid" if second else "moment")
                behind.add("text", f"{second} s", x=x, y=self.y + 14, text_anchor="middle", class_="faint")
        size = f'viewBox="0 0 {WIDTH} {self.y + 22}"'
        return (
            f'<svg {size} role="img" aria-label="The drill over time">{"".join(behind.elements + self.elements)}</svg>'
        )


def draw(card: dict[str, Any], folder: Path) -> str:
    """The whole page; ``folder`` is the lab's."""
    marks = dict(files.read_json(folder / "marks.json"))
    start, end = float(marks["start"]), float(marks["end"])
    thief, crowd = _lines(folder / "thief.jsonl", start), _lines(folder / "crowd.jsonl", start)
    moments = [line["time"] for line in [*thief, *crowd]]
    picture = Drawing(min([*moments, -1.0]), max([*moments, end - start]))
    entries = _entries(Path(card["case"]), start)
    _phases(picture, entries)
    _doors(picture, card, thief)
    _controls(picture, entries)
    _users(picture, crowd)
    return _page(card, picture.svg())


def _phases(picture: Drawing, entries: list[dict[str, Any]]) -> None:
    spans: dict[str, tuple[float, float]] = {}
    for entry in entries:
        for name in {entry["phase"], entry["body"].get("begins")} - {None}:
            first, last = spans.get(name, (entry["at"], entry["at"]))
            begun = entry["at"] if entry["body"].get("begins") == name else min(first, entry["at"])
            spans[name] = (begun, max(last, entry["at"]))
    picture.heading("phases")
    for name, (begun, ended) in sorted(spans.items(), key=lambda item: item[1]):
        picture.label(name)
        picture.span(begun, ended, "phase", 12)
        picture.y += ROW - 6


def _doors(picture: Drawing, card: dict[str, Any], thief: list[dict[str, Any]]) -> None:
    picture.heading("the thief's doors", "| something was taken     o refused     — closed on every way")
    for door in card["doors"]:
        picture.label(door["name"])
        after = door["closed_after_seconds"]
        for line in thief:
            if line["door"] != door["name"]:
                continue
            x = picture.x(line["time"])
            if line["outcome"] == "taken":
                picture.add("line", x1=x, x2=x, y1=picture.y - 8, y2=picture.y + 8, class_="taken")
            elif line["outcome"] == "refused":
                picture.add("circle", cx=x, cy=picture.y, r=2.5, class_="refused")
        if after is None:
            picture.text(WIDTH - 10, "STILL OPEN", anchor="end", above=-8)
        else:
            picture.add(
                "line", x1=picture.x(after), x2=picture.x(picture.last), y1=picture.y, y2=picture.y, class_="closed"
            )
            picture.text(picture.x(after) + 4, f"{after:.1f} s", above=-5)
        picture.y += ROW + 4


def _controls(picture: Drawing, entries: list[dict[str, Any]]) -> None:
    """Each control on each system, from its intent to what became of it."""
    begun = {(entry["stream"], entry["seq"]): entry for entry in entries if entry["kind"] == "intent"}
    picture.heading("controls")
    for entry in sorted(entries, key=lambda one: one["at"]):
        intent = begun.get((entry["stream"], entry["body"].get("of"))) if entry["kind"] in ("done", "failed") else None
        if intent is None:
            continue
        picture.label(entry["stream"].removesuffix(".evidence"))
        picture.span(intent["at"], entry["at"], "control")
        told = f"{intent['body']['control']}: {entry['body'].get('outcome', entry['kind'])}"
        right = picture.x(entry["at"]) < WIDTH * 0.7
        picture.text(
            max(picture.x(entry["at"]), picture.x(intent["at"]) + FEWEST_PIXELS) + 5
            if right
            else picture.x(intent["at"]) - 5,
            told,
            anchor="start" if right else "end",
        )
        picture.y += ROW - 6


def _users(picture: Drawing, crowd: list[dict[str, Any]]) -> None:
    picture.heading(
        "users' requests", f"per {SLICE} s: served, signed out (logs in again), failed; the column grows from below"
    )
    slices: dict[int, collections.Counter[str]] = {}
    for line in crowd:
        outcome = line["outcome"] if line["outcome"] in GOOD else "failed"
        slices.setdefault(math.floor(line["time"] / SLICE), collections.Counter())[outcome] += 1
    most = max((sum(counter.values()) for counter in slices.values()), default=1)
    foot = picture.y + COLUMN
    for number, counter in sorted(slices.items()):
        y = float(foot)
        for outcome in ("failed", "signed_out", "served"):
            height = round(counter[outcome] * COLUMN / most, 1)
            y -= height
            if height:
                x = picture.x(number * SLICE)
                width = max(round(picture.x((number + 1) * SLICE) - x - 1, 1), 1)
                picture.add("rect", x=x, y=round(y, 1), width=width, height=height, class_=outcome)
    picture.y = foot
    picture.label(f"0 to {most}")
    picture.y += 8


def _page(card: dict[str, Any], svg: str) -> str:
    def cells(tag: str, values: Iterable[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values) + "</tr>"

    doors = [cells("th", ("door", "stolen before", "stolen since", "closed after"))]
    for door in card["doors"]:
        after = door["closed_after_seconds"]
        closed = "STILL OPEN" if after is None else f"{after:.1f} s"
        doors.append(cells("td", (door["name"], door["taken_before"], door["taken_after_start"], closed)))
    users = [cells("th", ("users' requests", "served", "signed out", "refused", "errors"))]
    for phase, seen in card["users"].items():
        users.append(cells("td", (phase, seen["served"], seen["signed_out"], seen["refused"], seen["errors"])))
    title = html.escape(f"{card['incident_id']}: {card['playbook']}")
    told = f"{card['seconds']:.1f} s from the command to its last screen; open: {len(card['open'])}; "
    told += f"irreversible: {len(card['irreversible'])}; seal {card['seal']}"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            f'<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>',
            f"<h1>{title}</h1>",
            f"<p>{html.escape(told)}<br><small>Zero is the moment of the command. The lab's servers are on loopback.</small></p>",
            svg,
            f"<table>{''.join(doors)}</table>",
            f"<table>{''.join(users)}</table>",
            f"<p>Undo: <code>{html.escape(card['undo'])}</code></p></html>",
            "",
        ]
    )


def _lines(path: Path, start: float) -> list[dict[str, Any]]:
    """What an actor saw, in seconds since the command."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{**line, "time": line["time"] - start} for line in found]


def _entries(case: Path, start: float) -> list[dict[str, Any]]:
    """The case's entries, in seconds since the command. A large body lies elsewhere, and is not shown."""
    found = [json.loads(path.read_text()) for path in sorted(case.glob("journal/*/*.json"))]
    return [{**entry, "at": datetime.datetime.fromisoformat(entry["time"]).timestamp() - start} for entry in found]
