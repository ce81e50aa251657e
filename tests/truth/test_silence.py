# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""No secret is ever shown: at -vvvv, through success, dry run, diff and failure, by either front end.

Searched are the console, the results, the journal, the blobs, the evidence, what asynchronous tasks and Ansible left in
their folders, and every command line that was to be seen meanwhile.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import socket
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.firebreak.incident.plugins.module_utils._engine import spec_of
from ansible_collections.firebreak.incident.plugins.module_utils._errors import FirebreakError
from lab.client import Lab
from tests import helpers
from tests.helpers_play import Play, task
from tests.helpers_search import CommandLines, Search, spellings
from tests.rows import Row

CANARY = "canary\"7411'/+%\\word&<>"
NUMBER = 74117411741174
INCIDENT = "{{ opened.incident_id }}"
MODULE = {"async": 30, "poll": 0, "connection": "local", "register": "job"}
# Where each service is.
PLACES = {"postgresql_port": int, "redis_port": int, "vault_url": str, "cloudflare_url": str}


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def stopped(params: dict[str, Any]) -> dict[str, Any]:
    """The options of a service that does not run."""
    port = closed_port()
    (place,) = params.keys() & PLACES.keys()
    return {**params, place: port if PLACES[place] is int else f"http://127.0.0.1:{port}/v4"}


def secret_options(control: str) -> dict[str, str]:
    """The options that hold a secret, but for the case store's, with their types."""
    options = spec_of(helpers.module_of(control).CONTROL)["argument_spec"]
    return {name: one["type"] for name, one in options.items() if one.get("no_log") and not name.startswith("case_")}


def wrong(control: str, params: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Options with a wrong secret, of the right type and of every wrong one; by a name for the task."""
    variants: dict[str, dict[str, Any]] = {}
    for option, kind in secret_options(control).items():
        values = [CANARY, {"nested": CANARY}, {CANARY: 1}, [CANARY], [[CANARY]], NUMBER, True]
        if kind == "dict":
            values += [{"JWT_SECRET": {"nested": CANARY}}, {"JWT_SECRET": NUMBER}]
        variants |= {f"{option} {number}": {**params, option: value} for number, value in enumerate(values)}
    return variants


def finished(lab: Lab, home: Path, begun: dict[str, Any]) -> dict[str, Any]:
    """The result of an asynchronous task, as the file says that ``async_status`` reads."""
    file = home / "async" / begun["ansible_job_id"]
    lab.until(lambda: file.exists() and "started" not in json.loads(file.read_text() or '{"started": 1}'), "no end", 40)
    result: dict[str, Any] = json.loads(file.read_text())
    return {**result, "status": "failed" if result.get("failed") else "ok"}


@pytest.mark.parametrize("row", helpers.every_row(), ids=helpers.name_of)
def test_no_secret_is_shown(lab: Lab, row: Row, tmp_path: Path) -> None:
    control = row.control
    row.prepare(lab)
    store = helpers.store_of(lab)
    around = helpers.surroundings(lab, store, row.host, INCIDENT)
    params = {**row.params(lab), **around}
    secrets = {*lab.secrets(), *row.secrets(lab), CANARY, str(NUMBER)}
    undo = {**helpers.connection_options(control, params), **around}
    opening = {**helpers.surroundings(lab, store, row.host), "type": "data_breach", "affected": [row.host], "new": True}
    bad = wrong(control, params)
    tasks = [
        task("open", "incident", opening, register="opened"),
        task("check", control, params, check_mode=True, diff=True),
        task("real", control, params, diff=True),
        task("again", control, params, diff=True),
        task("release stopped", "control_release", stopped(undo), diff=True),
        task("release", "control_release", undo, diff=True),
        task("stopped", control, stopped(params), diff=True),
        *(task(name, control, options, diff=True) for name, options in bad.items()),
        task("module", control, params, **MODULE),
        task("module stopped", control, stopped(params), **MODULE),
        *(task(f"module {name}", control, options, **MODULE) for name, options in list(bad.items())[:3]),
    ]
    results = {}
    with CommandLines() as lines, Play(lab, tmp_path, row.host, tasks, "-vvvv") as play:
        for one in tasks:
            name = one["name"]
            results[name] = play.next(name)
            if name == "open":
                helpers.begin(lab, row, store, str(results[name]["incident_id"]))
            if "ansible_job_id" in results[name]:  # what needs its host refuses before anything begins
                results[name] = finished(lab, tmp_path, results[name])
    status = {name: result["status"] for name, result in results.items()}
    assert all(status[name] == "ok" for name in ("open", "check", "real", "again", "release")), results
    first = next(iter(bad))
    assert status["stopped"] == status[first] == status["module stopped"] == status[f"module {first}"] == "failed"
    assert status["module"] == ("failed" if helpers.module_of(control).CONTROL.needs_host else "ok")
    assert status["release stopped"] == ("failed" if row.reversible else "ok")
    # Ansible's own wrapper of an asynchronous module removes its file after it has written the result: it must vanish.
    lab.until(lambda: not list((tmp_path / "remote").glob("*/AnsiballZ*")), "a module's file stays", 20)
    told = (play.console.read_bytes(), json.dumps(results).encode())
    assert all(b"unexpected" not in text for text in told)

    def search(secrets: set[str]) -> list[str]:
        one = Search(secrets)
        for where, text in zip(("console", "results"), told, strict=True):
            one.look(where, text)
        for line in lines.seen:
            one.look("command line", line)
        one.look_below(tmp_path, [play.playbook, play.console])
        one.look_below(Path(store.removeprefix("file://")))
        return one.hits

    assert search({*secrets, *lab.secrets(), *row.secrets(lab)}) == []
    # What is no secret is found by the same search: at each place, and in the command of a part of the lab.
    places = " ".join(search({str(results["open"]["incident_id"]), "--foreground"}))
    wanted = {"console:", "results:", "command line:", "/journal/", "/async/j"}
    if helpers.module_of(control).CONTROL.needs_host:  # its module knows no incident, since it refuses
        wanted.remove("/async/j")
    assert all(place in places for place in wanted), places


LEAKS = {
    "Base64 in a message": lambda word: base64.b64encode(b"user:" + word.encode()).decode(),
    "hexadecimal digits in a message": lambda word: word.encode().hex(),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leaking_control_is_caught(lab: Lab, leak: str, tmp_path: Path) -> None:
    """What the engine cannot know, since the control has spelled it otherwise, the search finds."""
    control = helpers.module_of("postgresql_login_lock").CONTROL
    row = helpers.row_of(control.name)
    row.prepare(lab)
    store = helpers.store_of(lab)
    incident_id = helpers.open_incident(lab, store, row.host)
    params = {**row.params(lab), **helpers.surroundings(lab, store, row.host, incident_id), "host": row.host}
    word = params["postgresql_password"]

    def leaking(*_args: Any) -> None:
        (tmp_path / "copy").write_text(LEAKS[leak](word))
        raise FirebreakError(f"it did not work with {LEAKS[leak](word)}, nor with {word}")

    result = helpers.execute(dataclasses.replace(control, apply=leaking), params)
    assert result["failed"] and word not in json.dumps(result)
    search = Search([word])
    search.look("result", json.dumps(result).encode())
    search.look_below(tmp_path)
    search.look_below(Path(store.removeprefix("file://")) / incident_id)
    places = " ".join(hit.partition(":")[0] for hit in search.hits)
    assert all(place in places for place in ("result", "copy", f"{incident_id}/journal/{row.host}/")), places


@pytest.mark.parametrize("secret", [CANARY, "plain-and-simple", "with space and ü"])
def test_the_search_knows_every_spelling(secret: str) -> None:
    texts = [f"x{secret}y", json.dumps({"a": secret}), json.dumps(json.dumps([secret])), repr([secret])]
    texts += [urllib.parse.quote(secret), urllib.parse.urlencode({"a": secret}), f"{{'a': {secret!r}}}"]
    encoded = [
        base64.b64encode(b"-" * before + secret.encode() + b"-" * after) for before in range(4) for after in range(3)
    ]
    encoded += [base64.urlsafe_b64encode(b"-" * before + secret.encode()) for before in range(4)]
    for data in [*(text.encode() for text in texts), *encoded]:
        search = Search([secret])
        search.look("it", data)
        assert search.hits, data
    search = Search([secret])
    search.look("it", b"nothing of it " + secret.encode()[:-1])
    assert search.hits == []
    assert all(len(form) >= 7 for form in spellings(secret))


def test_command_lines_are_seen() -> None:
    import subprocess

    with CommandLines() as lines:
        subprocess.run(["sleep", "0.3", "0.0074117411"], check=True)
    assert any(b"0.0074117411" in line for line in lines.seen)
