# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""No secret is ever shown: at -vvvv, through success, dry run, diff, failure, crash and kill, by either front end.

Searched are the console and the log, the results, the journal, the blobs, the evidence, all that a callback can see, what
asynchronous tasks and Ansible left in their folders, and every command line and environment that was to be seen meanwhile.
That the search finds what is there, ``test_silence_leaky.py`` shows.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import html
import io
import json
import logging
import socket
import time
import urllib.parse
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from ansible_collections.firebreak.incident.plugins.module_utils._engine import execute
from ansible_collections.firebreak.incident.plugins.module_utils._errors import FirebreakError
from ansible_collections.firebreak.incident.plugins.module_utils._module import quietly
from ansible_collections.firebreak.incident.plugins.module_utils._task import COMMON, spec_of
from lab.client import Lab
from tests import dumps, helpers
from tests.contract.rotation_walk import LocalHost
from tests.helpers_play import Play, task
from tests.helpers_search import CommandLines, Search, spellings
from tests.rows import Row
from tests.truth import FULL, budget
from tests.truth.hostile import STALLS, WAYS, Hostile
from tests.truth.silence import Variables, found, surroundings, told_apart

CANARY = "canary\"7411'/+%\\word&<>"
IN_ADDRESS = "canary-of-7411-in-an-address"
IN_ENVIRONMENT = "canary-of-7411-in-the-environment"
NUMBER = 74117411741174
INCIDENT = "{{ opened.incident_id }}"
MODULE = {"async": 30, "poll": 0, "connection": "local", "register": "job"}
# Where each service is.
PLACES = {"postgresql_port": int, "pgbouncer_port": int, "redis_port": int, "vault_url": str, "cloudflare_url": str}
# What each service takes from the environment off the lab.
ENVIRONMENT = (
    *("PGPASSWORD", "REDISCLI_AUTH", "VAULT_TOKEN", "CLOUDFLARE_API_TOKEN"),
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
)
WRONG_TYPES = ("int", "float", "bool", "dict")
Tell = Callable[[str, object], None]


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def place_of(params: dict[str, Any]) -> str:
    (place,) = params.keys() & PLACES.keys()
    return place


def aimed(params: dict[str, Any], port: int) -> dict[str, Any]:
    """The options of a service that is elsewhere."""
    place = place_of(params)
    return {**params, place: port if PLACES[place] is int else f"http://127.0.0.1:{port}/v4"}


def options_of(control: str) -> dict[str, Any]:
    options: dict[str, Any] = spec_of(helpers.module_of(control).CONTROL)["argument_spec"]
    return {name: one for name, one in options.items() if not name.startswith("case_")}


def secret_options(control: str) -> dict[str, str]:
    """The options that hold a secret, but for the case store's, with their types."""
    return {name: one["type"] for name, one in options_of(control).items() if one.get("no_log")}


def wrong(control: str, params: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Options with a wrong secret, of the right type and of every wrong one; by a name for the task."""
    variants: dict[str, dict[str, Any]] = {}
    for option, kind in secret_options(control).items():
        values = [CANARY, {"nested": CANARY}, {CANARY: 1}, [CANARY], [[CANARY]], NUMBER, True]
        if kind == "dict":
            values += [{"JWT_SECRET": {"nested": CANARY}}, {"JWT_SECRET": NUMBER}]
        variants |= {f"{option} {number}": {**params, option: value} for number, value in enumerate(values)}
    return variants


def misplaced(control: str, params: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A secret in an option that is for something else: in a connection option, in a wrong type, in an address, in a name."""
    options = options_of(control)
    secrets = secret_options(control)
    used = str(next(params[name] for name in secrets if isinstance(params.get(name), str)))
    service = [name for name in helpers.module_of(control).CONTROL.service.SPEC if name not in secrets]
    variants = {}
    for number, option in enumerate(service):
        address = f"http://user:{IN_ADDRESS}@127.0.0.1:9/" if option.endswith("url") else f"user:{CANARY}@127.0.0.1"
        places = {"that is a secret": CANARY, "that is the secret in use": used, "with a secret": address}
        short = list(places)[number % len(places)]
        for words, value in places.items():
            if FULL or words == short:
                variants[f"{option} {words}"] = {**params, option: value}
    typed = [name for name, one in options.items() if name not in secrets and name not in service]
    typed = [name for name in typed if options[name]["type"] in WRONG_TYPES or options[name].get("choices")]
    own = [name for name in typed if name not in COMMON]
    for option in typed if FULL else [*own[:2], "round"]:
        variants[f"{option} of a wrong type"] = {**params, option: CANARY}
    variants["an option that is none"] = {**params, f"{next(iter(secrets))}_": CANARY}
    return variants


def finished(lab: Lab, home: Path, begun: dict[str, Any]) -> dict[str, Any]:
    """The result of an asynchronous task, as the file says that ``async_status`` reads."""
    file = home / "async" / begun["ansible_job_id"]
    lab.until(lambda: file.exists() and "started" not in json.loads(file.read_text() or '{"started": 1}'), "no end", 40)
    result: dict[str, Any] = json.loads(file.read_text())
    return {**result, "status": "failed" if result.get("failed") else "ok"}


def known_secrets(lab: Lab, row: Row | None = None) -> set[str]:
    with dumps.session(lab) as database:
        hashes = {
            str(one) for (one,) in database.execute("SELECT password_hash FROM users ORDER BY id LIMIT 5").fetchall()
        }
    return {
        *lab.secrets(),
        *hashes,
        *(row.secrets(lab) if row else ()),
        CANARY,
        IN_ADDRESS,
        IN_ENVIRONMENT,
        str(NUMBER),
    }


@pytest.mark.parametrize("row", helpers.every_row(), ids=helpers.name_of)
def test_no_secret_is_shown(lab: Lab, row: Row, tmp_path: Path, record_property: Tell) -> None:
    control = row.control
    needs_host = helpers.module_of(control).CONTROL.needs_host
    row.prepare(lab)
    store = helpers.store_of(lab)
    around = helpers.surroundings(lab, store, row.host, INCIDENT)
    params = {**row.params(lab), **around}
    secrets = known_secrets(lab, row)
    undo = {**helpers.connection_options(control, params), **around}
    opening = {**helpers.surroundings(lab, store, row.host), "type": "data_breach", "affected": [row.host], "new": True}
    bad = wrong(control, params)
    elsewhere = misplaced(control, params)
    bare = {name: value for name, value in params.items() if name not in secret_options(control)}
    production = {**bare, "site": "production"}
    crash = {**params, "control": control, "secret": CANARY}
    given = Variables(tmp_path / "given")
    home = tmp_path / "home"
    environment = {"environment": [{name: given.variable(IN_ENVIRONMENT) for name in ENVIRONMENT}]}

    def ask(name: str, module: str, options: dict[str, Any], **keywords: Any) -> dict[str, Any]:
        return task(name, module, given.hidden(options), diff=True, **keywords)

    def broken(raises: str) -> dict[str, Any]:
        options = given.hidden({**crash, "raises": raises})
        return {"name": f"crash {raises}", "broken": options, "ignore_errors": True, "diff": True}

    modules = [
        ask("module stopped", control, stopped_of(params), **MODULE),
        ask("module environment", control, production, **MODULE, **environment),
        ask(f"module {next(iter(bad))}", control, next(iter(bad.values())), **MODULE),
        ask("module an option that is none", control, elsewhere["an option that is none"], **MODULE),
    ]
    number = [helpers.name_of(one) for one in helpers.every_row()].index(helpers.name_of(row))
    with CommandLines() as lines, Hostile(CANARY) as deaf:
        tasks = [
            task("open", "incident", opening, register="opened"),
            ask("check", control, params, check_mode=True),
            ask("real", control, params),
            ask("again", control, params),
            ask("release stopped", "control_release", stopped_of(undo)),
            ask("release", "control_release", undo),
            ask("stopped", control, stopped_of(params), retries=1, delay=0, register="tried", until=False),
            *(ask(name, control, options) for name, options in {**bad, **elsewhere}.items()),
            ask("environment", control, production, **environment),
            broken("KeyError"),
            broken("SystemExit"),
            ask("module", control, params, **MODULE),
            *modules[0 if FULL else number % 4 :][: budget(1, 4)],
            ask("stalled", control, aimed(params, deaf.port)),
        ]
        results = {}
        with Play(lab, home, row.host, tasks, "-vvvv", *given.words(), **surroundings(home)) as play:
            for one in tasks[:-1]:
                name = one["name"]
                results[name] = play.next(name)
                if name == "open":
                    helpers.begin(lab, row, store, str(results[name]["incident_id"]))
            for name, begun in results.items():
                if "ansible_job_id" in begun:  # what needs its host refuses before anything begins
                    results[name] = finished(lab, home, begun)
            play.kill(deaf.asked.is_set)
    status = {name: result["status"] for name, result in results.items()}
    assert all(status[name] == "ok" for name in ("open", "check", "real", "again", "release")), results
    first = next(iter(bad))
    failed = ["stopped", first, "environment", *(name for name in elsewhere if name.endswith("of a wrong type"))]
    failed += [name for name in status if name.startswith(("crash", "an option", "module "))]
    assert {name for name in failed if status[name] != "failed"} == set()
    assert status["module"] == ("failed" if needs_host else "ok")
    assert status["release stopped"] == ("failed" if row.reversible else "ok")
    # Ansible's own wrapper of an asynchronous module removes its file after it has written the result: it must vanish.
    lab.until(lambda: not list((home / "remote").glob("*/AnsiballZ*")), "a module's file stays", 20)
    calm = {name: result for name, result in results.items() if not name.startswith("crash")}
    assert "unexpected" not in json.dumps(calm)
    assert {status[name] for name in results if name.startswith("crash")} == {"failed"}

    def search(secrets: set[str]) -> Search:
        # Where the user has put a secret, it stays: in the environment of a local process of his own, or as the name of a
        # role or a database, by which PostgreSQL calls its processes.
        lines.seen = {line for line in lines.seen if not line.startswith(b"postgres: ")}
        lines.environments = {seen.replace(IN_ENVIRONMENT.encode(), b"") for seen in lines.environments}
        return found(secrets, play.console, results, lines, store)

    # What is no secret is found by the same search: at each place, and in the command of a part of the lab.
    places, hits = told_apart(search, {*secrets, *known_secrets(lab, row)}, {str(results["open"]["incident_id"])})
    assert not hits, "\n".join(hits)
    wanted = {"console:", "results:", "command line:", "/journal/", "/async/j", "/witness.jsonl:", "/ansible.log:"}
    if needs_host:  # its module knows no incident, since it refuses
        wanted.remove("/async/j")
    assert {place for place in wanted if place not in places} == set()
    record_property("tried", len(tasks))


def stopped_of(params: dict[str, Any]) -> dict[str, Any]:
    """The options of a service that does not run."""
    return aimed(params, closed_port())


@pytest.fixture
def caught() -> Iterator[Callable[[], bytes]]:
    """What goes to this process's outputs, Python's and the system's, and to its log."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    logging.root.addHandler(handler)
    level = logging.root.level
    logging.root.setLevel(logging.DEBUG)
    yield lambda: written.getvalue().encode()
    logging.root.setLevel(level)
    logging.root.removeHandler(handler)


def sooner(monkeypatch: pytest.MonkeyPatch, control: str) -> None:
    """Time limits of a second instead of many."""
    service = helpers.module_of(control).CONTROL.service
    for name in vars(service):
        if name.endswith("_SECONDS"):
            monkeypatch.setattr(service, name, 1)


class Trial:
    """A control in this process, as its front ends call it, and all that it may have left."""

    def __init__(self, lab: Lab, row: Row, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.row = row
        self.home = home
        self.control = helpers.module_of(row.control).CONTROL
        self.store = f"file://{home}/cases"
        monkeypatch.setenv("FIREBREAK_SPOOL", str(home / "spool"))
        monkeypatch.setattr("tempfile.tempdir", str(home))
        row.prepare(lab)
        incident = helpers.open_incident(lab, self.store, row.host)
        around = helpers.surroundings(lab, self.store, row.host, incident)
        self.params = {**row.params(lab), **around, "host": row.host}
        self.slept = 0.0

    def sleep(self, seconds: float) -> None:
        self.slept += max(seconds, 0.1)

    def run(self, params: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Waiting costs nothing here: only the clock goes on."""
        full = helpers.complete(self.control, params)
        clock: dict[str, Any] = {"clock": lambda: time.time() + self.slept, "sleep": self.sleep}
        context = helpers.context_for(self.control, full, host=LocalHost(), **clock, **more)
        return quietly(self.control, lambda: execute(self.control, full, context))


@pytest.mark.parametrize("row", helpers.every_row(), ids=helpers.name_of)
def test_what_a_server_says_is_not_shown(
    lab: Lab,
    row: Row,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caught: Callable[[], bytes],
    capfd: pytest.CaptureFixture[str],
    record_property: Tell,
) -> None:
    """Error texts, reason phrases, headers, redirects, DETAIL, CONTEXT and what else an answer can hold."""
    trial = Trial(lab, row, tmp_path, monkeypatch)
    sooner(monkeypatch, row.control)
    search = Search([CANARY])
    place = place_of(trial.params)
    stalls = FULL or row.control == next(one for one in helpers.controls() if one.startswith(place.split("_")[0]))
    ways = [*WAYS[place], *([STALLS] if stalls else [])]
    told = []
    for way in ways:
        with Hostile(CANARY, way) as server:
            for check_mode in (False, True):
                result = trial.run(aimed(trial.params, server.port), check_mode=check_mode)
                assert result["failed"], (way, result)
                assert server.asked.is_set(), (way, result)
                told.append(result)
    search.look("results", json.dumps(told).encode())
    outputs = capfd.readouterr()
    search.look("outputs", (outputs.out + outputs.err).encode() + caught())
    search.look_below(tmp_path)
    assert search.hits == []
    record_property("tried", 2 * len(ways))


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
    encoded += [secret.encode().hex().upper().encode(), base64.b32encode(secret.encode()), html.escape(secret).encode()]
    packed = [b"text " + gzip.compress(secret.encode()), zstandard.compress(secret.encode()), zipped(secret)]
    encoded += [*packed, base64.encodebytes(gzip.compress(b"-" * 40 + secret.encode() + bytes(range(256))))]
    encoded += [secret[:9].encode() + b"\n    " + secret[9:].encode()]
    for data in [*(text.encode() for text in texts), *encoded]:
        search = Search([secret])
        search.look("it", data)
        assert search.hits, data
    search = Search([secret])
    search.look("it", b"nothing of it " + secret.encode()[:-1])
    assert search.hits == []
    assert all(len(form) >= 7 for form in spellings(secret))


def zipped(secret: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("options", secret)
    return file.getvalue()


def test_command_lines_are_seen() -> None:
    import subprocess

    with CommandLines() as lines:
        subprocess.run(["sleep", "0.3", "0.0074117411"], check=True)
    assert any(b"0.0074117411" in line for line in lines.seen)
