# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The engine with the smallest control that there can be: a register of names in a file, killed at every step."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import http.server
import io
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

from ansible_collections.firebreak.incident.plugins.module_utils import (
    _aws,
    _case,
    _engine,
    _incident,
    _release,
    _status,
    _store,
    _task,
    _verify,
)
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context, Control, Gate
from ansible_collections.firebreak.incident.plugins.module_utils._errors import (
    FirebreakError,
    Refused,
    StoreUnavailable,
)
from ansible_collections.firebreak.incident.plugins.module_utils._plan import Change, Plan
from ansible_collections.firebreak.incident.plugins.module_utils._redact import Secrets
from ansible_collections.firebreak.incident.plugins.modules import case_verify_info, incident, incident_event
from ansible_collections.firebreak.incident.plugins.plugin_utils.control import plain


class Register:
    """A service: a JSON file that maps names to values."""

    SPEC: dict[str, Any] = {"register": {"type": "str"}, "register_password": {"type": "str", "no_log": True}}

    def __init__(self) -> None:
        self.kill_at = 0
        self.calls = 0

    def preload(self) -> None: ...

    def addresses(self, params: dict[str, Any]) -> list[str]:
        return ["127.0.0.1"]

    def connect(self, params: dict[str, Any], context: Context) -> Register:
        self.file = pathlib.Path(params["register"])
        return self

    def close(self) -> None: ...

    def values(self) -> dict[str, str]:
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def put(self, name: str, value: str | None) -> None:
        self.die()
        values = self.values()
        values.pop(name, None)
        if value is not None:
            values[name] = value
        self.file.write_text(json.dumps(values))
        self.die()

    def die(self) -> None:
        self.calls += 1
        if self.calls == self.kill_at:
            os._exit(9)


SERVICE = Register()


def read(client: Register, params: dict[str, Any]) -> dict[str, Any]:
    return {"values": {name: value for name, value in client.values().items() if name in params["names"]}}


def plan(params: dict[str, Any], facts: dict[str, Any]) -> Plan:
    before = facts["values"]
    wanted = dict.fromkeys(params["names"], params["value"]) if params["value"] else {}
    changes = []
    for name in params["names"]:
        if before.get(name) != wanted.get(name):
            undo = {"names": [name], "value": before.get(name) or ""}
            changes.append(Change("set", name, ("values", name), undo=undo))
    return Plan(
        facts,
        {"values": wanted},
        tuple(changes),
        covers={"roles": params["names"]},
        wide=("all_sessions",) * (len(changes) > 5),
    )


def apply(client: Register, params: dict[str, Any], change: Change) -> None:
    client.put(change.target, params["value"] or None)


CONTROL = Control(
    name="register",
    service=SERVICE,
    spec={"argument_spec": {"names": {"type": "list", "elements": "str"}, "value": {"type": "str"}}},
    read=read,
    plan=plan,
    apply=apply,
)


@pytest.fixture
def params(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("FIREBREAK_SPOOL", str(tmp_path / "spool"))
    SERVICE.kill_at = SERVICE.calls = 0
    common = {name: option.get("default") for name, option in _task.COMMON.items()}
    return {
        **common,
        "case_store": f"file://{tmp_path}/cases",
        "site": "lab",
        "owner": "lab",
        "host": "r1",
        "register": str(tmp_path / "register.json"),
        "names": ["a", "b", "c"],
        "value": "x",
    }


def opened(params: dict[str, Any], **more: Any) -> dict[str, Any]:
    options = {name: option.get("default") for name, option in incident.SPEC["argument_spec"].items()}
    context = Context(run_id=os.urandom(3).hex(), actor="tester")
    return _engine.execute(
        incident.CONTROL, {**params, **options, "type": "data_breach", "affected": ["r1"], **more}, context
    )


def go(params: dict[str, Any], **more: Any) -> dict[str, Any]:
    context = Context(run_id=os.urandom(3).hex(), actor="tester", check_mode=more.pop("check_mode", False))
    return _engine.execute(CONTROL, {**params, **more}, context)


def case_of(params: dict[str, Any]) -> _case.Case:
    return _case.open_case(params, Context(run_id="reader"))


def kinds(params: dict[str, Any]) -> list[str]:
    case = case_of(params)
    names = case.store.names(f"{case.id}/journal/r1")
    return [case.stream("r1").entry(number).kind for number in range(1, len(names) + 1)]


@pytest.fixture
def ready(params: dict[str, Any]) -> dict[str, Any]:
    return {**params, "incident_id": opened(params)["incident_id"]}


def test_check_equals_real_and_again_is_ok(ready: dict[str, Any]) -> None:
    planned = go(ready, check_mode=True)
    assert kinds(ready) == []
    done = go(ready)
    for key in ("changed", "changes", "diff", "state_before", "state_after", "estimate", "mark"):
        assert planned[key] == done[key], key
    assert (planned["outcome"], done["outcome"]) == ("planned", "verified")
    again = go(ready)
    assert not again["changed"] and again["outcome"] == "ok" and again["since"]
    assert kinds(ready) == ["intent", "done"]
    assert SERVICE.values() == {"a": "x", "b": "x", "c": "x"}


def undo(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **more: Any) -> dict[str, Any]:
    """A release; the toy control is not a module of the collection, so its import is handed over."""
    import types

    real = _release.importlib.import_module
    module = types.SimpleNamespace(CONTROL=more.pop("control", CONTROL))
    monkeypatch.setattr(
        _release.importlib, "import_module", lambda name: module if name.endswith(".register") else real(name)
    )
    context = Context(run_id="release", actor="tester", check_mode=more.pop("check_mode", False))
    full = {"turn": None, "controls": None, "force": False, **params, **more}
    case = _case.open_case(full, context)
    return _release.release(case, full, context)


def test_release_puts_back_and_keeps_foreign_changes(ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    SERVICE.connect(ready, Context()).file.write_text(json.dumps({"b": "old", "z": "foreign"}))
    go(ready)
    predicted = undo(ready, monkeypatch, check_mode=True)
    assert [change["target"] for change in predicted["changes"]] == ["c", "b", "a"]
    assert SERVICE.values()["a"] == "x"
    SERVICE.file.write_text(json.dumps({**SERVICE.values(), "a": "somebody else"}))
    with pytest.raises(FirebreakError) as failure:
        undo(ready, monkeypatch)
    assert [conflict["target"] for conflict in failure.value.facts["conflicts"]] == ["a"]
    assert SERVICE.values() == {"a": "somebody else", "b": "old", "z": "foreign"}
    undo(ready, monkeypatch, force=True)
    assert SERVICE.values() == {"b": "old", "z": "foreign"}
    assert case_of(ready).stream("r1").live == []
    again = undo(ready, monkeypatch)
    assert not again["changed"]


STEPS = 60
TODAY = time.strftime("%Y-%m-%d", time.gmtime())


@pytest.mark.parametrize("what", ["store", "service"])
def test_killed_at_every_step_then_run_again(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, what: str
) -> None:
    """kill -9 around every entry and every write, then the same command: the state of an undisturbed run."""
    tried = 0
    for step in range(1, STEPS):
        place = {
            **params,
            "case_store": f"file://{tmp_path}/{what}{step}",
            "register": str(tmp_path / f"{what}{step}.json"),
        }
        place["incident_id"] = opened(place)["incident_id"]
        pathlib.Path(place["register"]).write_text(json.dumps({"b": "old"}))
        if not _killed(place, what, step):
            break
        tried += 1
        result = go(place)
        assert not result.get("failed"), result
        assert SERVICE.values() == {"a": "x", "b": "x", "c": "x"}
        assert not go(place)["changed"]
        case = case_of(place)
        assert _verify.verify(case)["valid"]
        assert all(item["state"] != "open" for item in case.stream("r1").live), kinds(place)
        with monkeypatch.context() as patch:
            undo(place, patch)
        assert SERVICE.values() == {"b": "old"}, (step, kinds(place))
    assert tried >= (4 if what == "store" else 6)


def _killed(params: dict[str, Any], what: str, step: int) -> bool:
    """Run in a child that dies at the n-th call; whether it died."""
    child = os.fork()
    if child == 0:
        try:
            SERVICE.calls, SERVICE.kill_at = 0, step if what == "service" else 0
            if what == "store":
                count = 0
                real = _store.FileStore.create

                def create(store: _store.FileStore, key: str, data: bytes) -> bool:
                    nonlocal count
                    count += 1
                    if count == step:
                        os._exit(9)
                    answer = real(store, key, data)
                    count += 1
                    if count == step:
                        os._exit(9)
                    return answer

                _store.FileStore.create = create  # type: ignore[method-assign]
            go(params)
        finally:
            os._exit(0)
    SERVICE.calls = SERVICE.kill_at = 0
    _pid, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 9


def test_release_killed_at_every_write(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    for step in range(1, STEPS):
        place = {**params, "case_store": f"file://{tmp_path}/{step}", "register": str(tmp_path / f"{step}.json")}
        place["incident_id"] = opened(place)["incident_id"]
        go(place)
        child = os.fork()
        if child == 0:
            SERVICE.calls, SERVICE.kill_at = 0, step
            try:
                undo(place, monkeypatch)
            finally:
                os._exit(0)
        _pid, status = os.waitpid(child, 0)
        SERVICE.calls = SERVICE.kill_at = 0
        with monkeypatch.context() as patch:
            undo(place, patch)
        SERVICE.connect(place, Context())
        assert SERVICE.values() == {}
        assert case_of(place).stream("r1").live == []
        if os.waitstatus_to_exitcode(status) != 9:
            break
    assert step > 4


def test_twenty_at_once_open_one_incident(params: dict[str, Any]) -> None:
    results: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: results.append(opened(params))) for _number in range(20)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len({result["incident_id"] for result in results}) == 1
    assert sum(result["changed"] for result in results) == 1


def test_twenty_different_ones_get_twenty_numbers_without_a_gap(params: dict[str, Any]) -> None:
    results: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda n=n: results.append(opened(params, key=f"alert-{n}"))) for n in range(20)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(int(result["incident_id"][-3:]) for result in results) == list(range(1, 21))


def test_new_opens_another_and_round_two_begins(params: dict[str, Any]) -> None:
    first = opened(params)
    assert opened(params)["incident_id"] == first["incident_id"]
    second = opened(params, new=True)
    assert second["incident_id"] != first["incident_id"]
    again = opened(params, incident_id=first["incident_id"], round=2)
    assert again["changed"] and again["issued_before"] > first["issued_before"]
    assert opened(params, incident_id=first["incident_id"], round=2)["issued_before"] == again["issued_before"]
    assert "the next one is 3" in opened(params, incident_id=first["incident_id"], round=5)["msg"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"site": None}, "site: every inventory sets firebreak_site"),
        ({"site": "production", "owner": None}, "owner:"),
        ({"site": "production"}, "protected:"),
        ({"case_store": None}, "case_store:"),
        ({"case_store": "ftp://x"}, "case_store:"),
        ({"case_store": "s3://bucket?lock_mode=NONE"}, "lock_mode"),
        ({"incident_id": None}, "incident_id:"),
        ({"incident_id": "INC-2020-0101-001"}, "is not in this case store"),
        ({"protected": {"roles": ["b"]}}, "protected: roles b"),
        ({"names": list("abcdefg")}, "break glass for all_sessions"),
        ({"break_glass": [{"guard": "evidence", "reason": "r", "date": "2020-01-01"}]}, "is not today's"),
        ({"break_glass": [{"guard": "wide_blok", "reason": "r", "date": TODAY}]}, "wide_blok is no guard"),
        ({"break_glass": [{"guard": "evidence", "reason": " ", "date": TODAY}]}, "has no reason"),
        ({"round": 0}, "round:"),
        ({"unattended": True}, None),
    ],
)
def test_bad_input_is_refused_before_anything_is_touched(
    ready: dict[str, Any], options: dict[str, Any], told: str | None
) -> None:
    for check_mode in (True, False):
        if check_mode and ("case_store" in options or "incident_id" in options):
            continue
        result = go(ready, check_mode=check_mode, **options)
        assert ("failed" in result) == (told is not None), result
        if told:
            assert told in result["msg"]
            assert not pathlib.Path(ready["register"]).exists()


def test_halt_stops_everything_but_release(ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    go(ready, names=["a"])
    case_of(ready).store.create("HALT", b"")
    assert "HALT" in go(ready)["msg"]
    assert "HALT" in opened(ready)["msg"]
    undo(ready, monkeypatch)
    assert SERVICE.values() == {}


def test_what_is_lost_in_a_write_is_noticed(ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lost = dataclasses.replace(CONTROL, apply=lambda client, params, change: None, settle=0.1)
    context = Context(run_id="one", actor="tester")
    result = _engine.execute(lost, ready, context)
    assert result["failed"] and "does not show the change" in result["msg"]
    assert kinds(ready) == ["intent", "failed"]


def test_a_failure_tells_what_was_done_and_what_was_not(ready: dict[str, Any]) -> None:
    def broken(client: Register, params: dict[str, Any], change: Change) -> None:
        if change.target == "b":
            raise RuntimeError("hunter22-canary")
        apply(client, params, change)

    result = _engine.execute(dataclasses.replace(CONTROL, apply=broken), ready, Context(run_id="one", actor="tester"))
    assert [one["outcome"] for one in result["outcomes"]] == ["applied", "unconfirmed", "not begun"]
    assert "done: set a; unconfirmed: set b; not done: set c" in result["msg"]
    assert "RuntimeError" in result["msg"] and "hunter22" not in json.dumps(result)
    assert not go(ready).get("failed")


def test_a_plan_that_does_not_converge_or_holds_a_secret_is_never_begun(ready: dict[str, Any]) -> None:
    wobbly = dataclasses.replace(
        CONTROL, plan=lambda params, facts: Plan(facts, facts, (Change("set", "a", irreversible="never ends"),))
    )
    assert "does not converge" in _engine.execute(wobbly, ready, Context(run_id="1"))["msg"]
    context = Context(run_id="1")
    context.secret("canary-secret")
    result = _engine.execute(CONTROL, {**ready, "value": "canary-secret"}, context)
    assert "holds a secret" in result["msg"] and "canary" not in json.dumps(result)
    assert kinds(ready) == []


def test_the_store_is_lost_in_the_middle_and_comes_back(
    ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    def gone(*_args: Any, **_kwargs: Any) -> Any:
        raise StoreUnavailable("case_store: gone")

    with monkeypatch.context() as patch:
        for name in ("names", "get", "create"):
            patch.setattr(_store.FileStore, name, gone)
        result = go(ready)
        assert [entry["kind"] for entry in result["spooled"]] == ["intent", "done"]
        assert SERVICE.values() == {"a": "x", "b": "x", "c": "x"}
        final = dataclasses.replace(
            CONTROL,
            plan=lambda params, facts: Plan(
                facts, {"values": {}}, tuple(Change("set", n, irreversible="gone for good") for n in facts["values"])
            ),
        )
        refused = _engine.execute(final, {**ready, "value": ""}, Context(run_id="2"))
        assert "cannot be undone" in refused["msg"] and SERVICE.values()
    assert not go(ready)["changed"]
    assert kinds(ready) == ["intent", "done"]
    assert _verify.verify(case_of(ready))["valid"]
    undo(ready, monkeypatch)
    assert SERVICE.values() == {}


def test_what_several_tasks_kept_while_the_store_was_lost_stays_together(
    ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_args: Any, **_kwargs: Any) -> Any:
        raise StoreUnavailable("case_store: gone")

    with monkeypatch.context() as patch:
        for name in ("names", "get", "create"):
            patch.setattr(_store.FileStore, name, gone)
        assert go(ready)["changed"] and go(ready, names=["d"])["changed"]
    assert len(_case.spooled_entries(case_of(ready))["r1"]) == 4
    _case.merge_spools(case_of(ready))
    assert _case.spooled(case_of(ready)) == []
    entries = [entry.body for entry in _incident.entries_of(case_of(ready), "r1")]
    assert [(body.get("of"), len(body.get("outcomes") or body.get("changes"))) for body in entries] == [
        (None, 3), (1, 3), (None, 1), (3, 1)]  # fmt: skip
    assert _status.status(case_of(ready))["open"] == []
    undo(ready, monkeypatch)
    assert SERVICE.values() == {}


def event(params: dict[str, Any], kind: str, **more: Any) -> dict[str, Any]:
    options = {name: option.get("default") for name, option in incident_event.SPEC["argument_spec"].items()}
    return _engine.execute(
        incident_event.CONTROL, {**params, **options, "kind": kind, **more}, Context(run_id="e", actor="tester")
    )


def test_the_second_writer_waits_for_the_first(ready: dict[str, Any]) -> None:
    """Twice at the same moment: one changes, the other finds it done."""

    def slow(client: Register, params: dict[str, Any], change: Change) -> None:
        time.sleep(0.1)
        apply(client, params, change)

    results: list[dict[str, Any]] = []
    control = dataclasses.replace(CONTROL, apply=slow)
    threads = [
        threading.Thread(target=lambda n=n: results.append(_engine.execute(control, ready, Context(run_id=str(n)))))
        for n in range(3)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(result["changed"] for result in results) == [False, False, True]
    assert kinds(ready) == ["intent", "done"]


def test_an_expired_incident_is_not_continued_unasked(params: dict[str, Any]) -> None:
    first = opened(params)
    late = Context(run_id="late", clock=lambda: time.time() + 13 * 3600)
    options = {name: option.get("default") for name, option in incident.SPEC["argument_spec"].items()}
    full = {**params, **options, "type": "data_breach", "affected": ["r1"]}
    assert "was left alone for 13 h" in _engine.execute(incident.CONTROL, full, late)["msg"]
    assert not _engine.execute(incident.CONTROL, {**full, "incident_id": first["incident_id"]}, late).get("failed")


def test_severity_has_three_names() -> None:
    assert [_incident.severity_of(name, "ddos") for name in (None, "P0", "PAGE", "SEV-1")] == ["SEV-1"] * 4
    with pytest.raises(Refused):
        _incident.severity_of("SEV-9", "ddos")


@pytest.fixture(params=["one after another", "side by side"])
def lockless(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service is read while the journal is opened. This store has no locks, as S3 has none."""
    monkeypatch.setattr(_store.FileStore, "exclusive", _store.S3Store.exclusive)
    if request.param == "side by side":
        monkeypatch.setattr(_store.FileStore, "beside", _store.S3Store.beside)


def reading(after: Callable[[int], Any]) -> Any:
    """The control, with something that happens right after each time that it reads."""
    count = 0

    def told(client: Register, params: dict[str, Any]) -> dict[str, Any]:
        nonlocal count
        facts = read(client, params)
        count += 1
        after(count)
        return facts

    return dataclasses.replace(CONTROL, read=told)


def run(control: Any, options: dict[str, Any], run_id: str = "ours", **more: Any) -> dict[str, Any]:
    return _engine.execute(control, options, Context(run_id=run_id, actor="tester", **more))


def intents(options: dict[str, Any]) -> list[dict[str, Any]]:
    stream = case_of(options).stream("r1")
    return [stream.entry(number).body for number, kind in enumerate(kinds(options), 1) if kind == "intent"]


@pytest.mark.usefixtures("lockless")
def test_somebody_else_writes_between_our_reading_and_our_intent(ready: dict[str, Any]) -> None:
    def other(count: int) -> None:
        if count == 1:
            assert go(ready, value="theirs")["changed"]

    assert run(reading(other), ready)["changed"]
    theirs, ours = intents(ready)
    assert {change["before"] for change in theirs["changes"]} == {None}
    assert {change["before"] for change in ours["changes"]} == {"theirs"}
    assert kinds(ready) == ["intent", "done", "intent", "done"] and _verify.verify(case_of(ready))["valid"]


@pytest.mark.usefixtures("lockless")
def test_the_last_writer_is_still_at_work_while_we_read(ready: dict[str, Any]) -> None:
    """Its parent was killed; it writes until its claim ends, and what it wrote is in our before-image."""
    stream = case_of(ready).stream("r1")
    stream.append("intent", {"control": "register", "what": "else", "changes": [], "at": 0, "until": time.time() + 0.5})

    def late() -> None:
        time.sleep(0.3)
        SERVICE.put("a", "late")

    writer = threading.Thread(target=late)
    writer.start()
    assert run(reading(lambda _count: None), ready)["changed"]
    writer.join()
    ours = intents(ready)[-1]
    assert [change["before"] for change in ours["changes"]] == ["late", None, None]
    assert kinds(ready) == ["intent", "resumed", "intent", "done"]


@pytest.mark.usefixtures("lockless")
def test_a_halt_and_an_unknown_incident_are_told_though_the_service_is_down(ready: dict[str, Any]) -> None:
    def down(_count: int) -> None:
        raise RuntimeError

    assert "is not in this case store" in run(reading(down), {**ready, "incident_id": "INC-2020-0101-001"})["msg"]
    case_of(ready).store.create("HALT", b"")
    dry = run(reading(down), ready, check_mode=True)
    assert kinds(ready) == []
    assert run(reading(down), ready)["msg"] == dry["msg"] and "HALT" in dry["msg"]
    assert kinds(ready) == ["refused"]


@pytest.mark.usefixtures("lockless")
def test_a_quiet_stream_is_read_once_and_listed_once(ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    go(ready)
    asked: list[str] = []
    for name in ("names", "get", "create"):
        real = getattr(_store.FileStore, name)
        monkeypatch.setattr(
            _store.FileStore,
            name,
            lambda store, key, *more, name=name, real=real: (
                asked.append(f"{name} {key.rsplit('/')[-1]}") or real(store, key, *more)
            ),
        )
    seen: list[int] = []
    assert run(reading(seen.append), {**ready, "value": "y"})["changed"]
    assert sorted(asked) == [
        "create 00000003.json",
        "create 00000004.json",
        "get 00000002.json",
        "get HALT",
        "names r1",
    ]
    assert len(seen) == 2, "before, and to verify"


def test_a_store_that_gives_no_answer_is_waited_for_once_in_a_run(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hanging S3 must not cost every task its timeouts; another run asks again."""
    monkeypatch.setattr(_aws, "READ_SECONDS", 0.3)
    with socket.socket() as stalled:
        stalled.bind(("127.0.0.1", 0))
        stalled.listen(16)
        uri = f"s3://cases?endpoint=http://127.0.0.1:{stalled.getsockname()[1]}&lock_mode=GOVERNANCE&retention_days=1"
        keys = {"case_access_key_id": "key", "case_secret_access_key": "secret"}

        def ask(run_id: str) -> float:
            began = time.monotonic()
            store = _store.open_store({**params, **keys, "case_store": uri}, Context(run_id=run_id))
            with pytest.raises(StoreUnavailable):
                store.get("HALT")
            return time.monotonic() - began

        assert ask("one") > 0.3
        assert ask("one") < 0.3
        assert ask("two") > 0.3


FINAL = dataclasses.replace(
    CONTROL,
    plan=lambda params, facts: Plan(
        facts, {"values": {}}, tuple(Change("set", n, irreversible="gone for good") for n in facts["values"])
    ),
)


def test_the_store_is_lost_at_the_very_intent_of_what_cannot_be_undone(
    ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_args: Any) -> Any:
        raise StoreUnavailable("case_store: gone")

    go(ready)
    with monkeypatch.context() as patch:
        patch.setattr(_store.FileStore, "create", gone)
        refused = run(FINAL, {**ready, "value": ""})
    assert "cannot be undone" in refused["msg"] and not refused["changed"]
    assert SERVICE.values() == {"a": "x", "b": "x", "c": "x"} and _case.spooled(case_of(ready)) == []


def slow_apply(client: Register, params: dict[str, Any], change: Change) -> None:
    time.sleep(0.1)
    apply(client, params, change)


def side_by_side(*calls: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda call=call: results.append(call())) for call in calls]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return results


def died(options: dict[str, Any]) -> None:
    """A run that was killed after its intent; its claim is over."""

    def killed(*_args: Any) -> None:
        raise KeyboardInterrupt

    context = Context(run_id="dead", actor="tester", clock=lambda: time.time() - 60)
    with pytest.raises(KeyboardInterrupt):
        _engine.execute(dataclasses.replace(CONTROL, apply=killed), options, context)


@pytest.mark.usefixtures("lockless")
@pytest.mark.parametrize("hidden", [False, True])
def test_of_two_that_take_over_at_once_one_does(
    ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch, hidden: bool
) -> None:
    died(ready)
    if hidden:
        case_of(ready).record("r1", "note", {"text": "the intent is not the newest entry"})
    real, both = _store.FileStore.create, threading.Barrier(2, timeout=2)

    def create(store: _store.FileStore, key: str, data: bytes) -> bool:
        if key.endswith(f"{2 + hidden:08d}.json"):
            both.wait()
        return real(store, key, data)

    monkeypatch.setattr(_store.FileStore, "create", create)
    control = dataclasses.replace(CONTROL, apply=slow_apply)
    results = side_by_side(*(lambda n=n: run(control, ready, n) for n in ("one", "two")))
    assert sorted(result["changed"] for result in results) == [False, True], results
    assert kinds(ready) == ["intent", *["note"] * hidden, "resumed", "done"]


@pytest.mark.usefixtures("lockless")
def test_an_entry_beside_a_writer_does_not_hide_it(ready: dict[str, Any]) -> None:
    def later() -> dict[str, Any]:
        time.sleep(0.1)
        case_of(ready).record("r1", "note", {"text": "from another run"})
        return go(ready)

    control = dataclasses.replace(CONTROL, apply=slow_apply)
    results = side_by_side(lambda: run(control, ready), later)
    assert sorted(result["changed"] for result in results) == [False, True], results
    assert kinds(ready) == ["intent", "done", "note"]


def test_a_release_that_fails_half_way_tells_what_it_changed_and_undoes_the_rest(
    ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    go(ready)

    def failing(client: Register, params: dict[str, Any], change: Change) -> None:
        apply(client, params, change)
        raise RuntimeError

    with monkeypatch.context() as patch, pytest.raises(FirebreakError) as failure:
        undo(ready, patch, control=dataclasses.replace(CONTROL, apply=failing))
    assert failure.value.facts["changed"] and SERVICE.values() == {}

    def unreadable(client: Register, params: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("hunter22")

    with monkeypatch.context() as patch, pytest.raises(FirebreakError) as failure:
        undo(ready, patch, control=dataclasses.replace(CONTROL, read=unreadable))
    assert "unexpected RuntimeError" in failure.value.msg and "hunter22" not in failure.value.msg
    assert not failure.value.facts["changed"]


def test_a_dry_release_refuses_what_the_release_refuses(ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    go(ready)
    told = []
    for check_mode in (True, False):
        with monkeypatch.context() as patch, pytest.raises(FirebreakError) as failure:
            undo({**ready, "protected": {"roles": ["b"]}}, patch, check_mode=check_mode)
        told.append([one["why"] for one in failure.value.facts["failures"]])
    assert told[0] == told[1] and len(told[0]) == 1


def test_what_was_put_back_is_no_longer_open(ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a containment that failed, nor an undoing that died before it could say what became of it."""

    def failing(client: Register, params: dict[str, Any], change: Change) -> None:
        apply(client, params, change)
        raise RuntimeError

    run(dataclasses.replace(CONTROL, apply=failing), ready)
    with monkeypatch.context() as patch, pytest.raises(FirebreakError):
        undo(ready, patch, control=dataclasses.replace(CONTROL, apply=failing))
    assert _status.status(case_of(ready))["open"]
    with monkeypatch.context() as patch:
        undo(ready, patch)
    assert SERVICE.values() == {} and _status.status(case_of(ready))["open"] == []


def test_what_was_settled_later_is_listed_once(ready: dict[str, Any]) -> None:
    lazy = dataclasses.replace(CONTROL, slow=True, settle=0.0, apply=lambda client, params, change: None)
    assert run(lazy, ready)["outcome"] == "applied"
    SERVICE.file.write_text(json.dumps(dict.fromkeys("abc", "x")))
    assert go(ready)["outcome"] == "ok"
    seen = _status.status(case_of(ready))
    assert [line["target"] for line in seen["done"]] == ["a", "b", "c"] and seen["open"] == []


def test_troubles_are_roles_only(ready: dict[str, Any]) -> None:
    """A control's failure is over when the control succeeds; nobody has to say so."""
    run(dataclasses.replace(CONTROL, prove=lambda *_args: 1 / 0), ready)
    event(ready, "failed", role="shield_edge")
    assert _status.troubles(case_of(ready)) == {"r1": ["shield_edge"]}
    assert [one["control"] for one in _status.status(case_of(ready))["open"]] == ["register", "shield_edge"]


def test_the_store_is_lost_after_somebody_else_wrote_beside_us(
    ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done is told, and kept."""

    def gone(*_args: Any) -> Any:
        raise StoreUnavailable("case_store: gone")

    def proved(*_args: Any) -> None:
        monkeypatch.setattr(_store.FileStore, "create", lambda *_args: False)
        monkeypatch.setattr(_store.FileStore, "names", gone)

    with monkeypatch.context() as monkeypatch:
        result = run(dataclasses.replace(CONTROL, prove=proved), ready)
    assert result["changed"] and not result.get("failed"), result
    assert [entry["kind"] for entry in result["spooled"]] == ["done"]
    assert not go(ready)["changed"] and kinds(ready) == ["intent", "resumed", "done"][::2]


def test_neither_the_store_nor_the_spool_takes_the_outcome(
    ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    def gone(*_args: Any) -> Any:
        raise StoreUnavailable("case_store: gone")

    def proved(*_args: Any) -> None:
        monkeypatch.setattr(_store.FileStore, "create", gone)
        (tmp_path / "spool").write_text("no folder")

    with monkeypatch.context() as monkeypatch:
        result = run(dataclasses.replace(CONTROL, prove=proved), ready)
    assert result["failed"] and result["changed"], result
    assert [one["outcome"] for one in result["outcomes"]] == ["proved"] * 3
    assert "spool" in result["msg"]


@pytest.mark.usefixtures("lockless")
def test_a_refusal_is_recorded_though_somebody_else_writes(ready: dict[str, Any]) -> None:
    refusing = {**ready, "protected": {"roles": ["b"]}}

    def other(count: int) -> None:
        case_of(ready).record("r1", "note", {"text": "from another run"})

    assert "protected" in run(reading(other), refusing)["msg"]
    assert kinds(ready) == ["note", "refused"]


def test_a_secret_that_holds_another_one_is_hidden_whole() -> None:
    for number in range(20):
        known = Secrets()
        for value in (f"hunter22-{number}", f"hunter22-{number}-and-more"):
            known.add(value)
        assert known.censor({"msg": f"it is hunter22-{number}-and-more."}) == {"msg": "it is ********."}


@pytest.mark.parametrize("content", ["null", "[]", '{"body": "x"}', "{}"])
def test_an_entry_that_is_no_entry_is_named(ready: dict[str, Any], content: str) -> None:
    go(ready)
    folder = pathlib.Path(ready["case_store"].removeprefix("file://")) / ready["incident_id"] / "journal/r1"
    (folder / "00000002.json").write_text(content)
    assert _verify.verify(case_of(ready))["first_bad"]["entry"] == "r1/2"
    result = go(ready)
    assert [entry["kind"] for entry in result["spooled"]] == [], result


class Bucket(http.server.BaseHTTPRequestHandler):
    """As much of S3 as two calls need: a version for each put that is not refused, and a GET that breaks off in the middle."""

    protocol_version = "HTTP/1.1"
    versions: ClassVar[list[str]] = []

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        exists = self.path in self.versions and self.headers.get("If-None-Match") == "*"
        body = b"<Error><Code>PreconditionFailed</Code></Error>" if exists else b""
        if not exists:
            self.versions.append(self.path)
        self.send_response(412 if exists else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"{")
        self.close_connection = True

    def log_message(self, *_args: Any) -> None: ...


@pytest.fixture
def bucket(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(Bucket, "versions", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        uri = f"s3://cases?endpoint=http://127.0.0.1:{server.server_port}&lock_mode=GOVERNANCE&retention_days=1"
        keys = {"case_access_key_id": "key", "case_secret_access_key": "secret"}
        yield _store.open_store({**params, **keys, "case_store": uri}, Context(run_id=os.urandom(3).hex()))
        server.shutdown()
        thread.join()


def test_the_same_artefact_again_is_no_second_version(bucket: Any) -> None:
    """An export that was killed before its manifest is exported again; verify_case takes a second version for a forgery."""
    for _time in range(2):
        bucket.put_file("evidence/r1/1/abc/sessions.csv", io.BytesIO(b"a,b"))
    assert len(Bucket.versions) == 1


def test_an_answer_that_breaks_off_is_a_lost_store(bucket: Any) -> None:
    with pytest.raises(StoreUnavailable):
        bucket.get("journal/r1/00000001.json")


def waited_for_evidence(params: dict[str, Any], severity: str) -> float:
    """How long a destroying control waits for an export that hangs, by a clock that only its own sleep moves."""
    own = {**params, "evidence": ["r1/1/sessions.csv"], "value": severity}
    own["incident_id"] = opened(params, severity=severity, key=severity)["incident_id"]
    event(own, "seal", begins="preserve")
    began = time.time()
    slept: list[float] = []

    def destroying(params: dict[str, Any], facts: dict[str, Any]) -> Plan:
        return dataclasses.replace(plan(params, facts), destroys=("sessions",))

    context = Context(run_id="p", clock=lambda: began + 10 * len(slept), sleep=slept.append)
    assert _engine.execute(dataclasses.replace(CONTROL, plan=destroying), own, context)["changed"]
    return 10.0 * len(slept)


def test_patience_with_the_evidence_is_by_severity(params: dict[str, Any]) -> None:
    """Two minutes where it is worst: what the thief holds is not kept alive by a hanging export."""
    waited = {severity: waited_for_evidence(params, severity) for severity in ("SEV-1", "SEV-2")}
    assert {severity: round(seconds, -1) for severity, seconds in waited.items()} == {"SEV-1": 120, "SEV-2": 900}


def test_what_a_task_is_given_is_plain() -> None:
    """YAML reads an unquoted date as a date; the guard wants its text."""
    given = {"break_glass": [{"guard": "evidence", "date": datetime.date(2026, 1, 2)}]}
    assert plain(given) == {"break_glass": [{"guard": "evidence", "date": "2026-01-02"}]}


def test_async_over_a_connection_that_is_not_local_is_refused(tmp_path: pathlib.Path) -> None:
    """It would copy the module, with its secrets, to the system under protection."""
    arguments = {"type": "data_breach", "affected": ["far"], "site": "lab", "case_store": f"file://{tmp_path}/cases"}
    task = {"firebreak.incident.incident": arguments, "async": 30, "poll": 1, "connection": "ssh"}
    play = tmp_path / "play.yml"
    play.write_text(json.dumps([{"hosts": "far", "gather_facts": False, "tasks": [task]}]))
    program = str(pathlib.Path(sys.executable).with_name("ansible-playbook"))
    command = [program, "-i", "far,", "-e", "ansible_host=127.0.0.1 ansible_port=9", str(play)]
    env = {**os.environ, "HOME": str(tmp_path), "ANSIBLE_NOCOLOR": "1"}
    told = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False).stdout
    assert "connection: local" in told and "UNREACHABLE" not in told, told


def playbook(folder: pathlib.Path, **variables: Any) -> tuple[int, str]:
    """A whole data_breach on two systems that have no service, so that all it does is to keep the case."""
    common = {"firebreak_site": "lab", "firebreak_owner": "lab", "firebreak_case_store": f"file://{folder}/cases"}
    hosts = {"firebreak_communication": {"hosts": {"desk": {}, "far": {}}}}
    (folder / "hosts.json").write_text(json.dumps({"all": {"vars": common, "children": hosts}}))
    program = str(pathlib.Path(sys.executable).with_name("ansible-playbook"))
    command = [program, "-i", str(folder / "hosts.json"), "firebreak.incident.data_breach", "-e", json.dumps(variables)]
    env = {**os.environ, "HOME": str(folder), "ANSIBLE_NOCOLOR": "1"}
    told = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    return told.returncode, told.stdout


def test_who_is_not_told_and_who_is_not_looked_at_stays_open(params: dict[str, Any], tmp_path: pathlib.Path) -> None:
    code, told = playbook(tmp_path, firebreak_affected=["desk", "far"], firebreak_audiences=[{"name": "board"}])
    assert code != 0 and "communicate failed" in told, told
    case = {**params, "incident_id": case_in(tmp_path), "host": "far"}
    event(case, "failed", role="shield_edge")
    again = {"firebreak_incident_id": case["incident_id"]}
    code, told = playbook(tmp_path, firebreak_affected=["desk"], **again)
    assert code != 0 and "shield_edge failed" in told and "communicate failed" not in told, told
    code, told = playbook(tmp_path, firebreak_affected=["desk", "far"], **again)
    assert code == 0 and "Everything is contained" in told, told


def case_in(folder: pathlib.Path) -> str:
    return next(entry.name for entry in (folder / "cases").iterdir() if entry.name.startswith("INC-"))


# --- what was refused stays open until the same is done


NAMED = dataclasses.replace(
    CONTROL,
    spec={
        "argument_spec": {
            "names": {"type": "list", "elements": "str", "required": True},
            "value": {"type": "str"},
        }
    },
)


def still_open(options: dict[str, Any]) -> list[str]:
    return [one["state"] for one in _status.status(case_of(options))["open"]]


@pytest.mark.parametrize(
    ("later", "left"),
    [
        ({}, []),  # the same command, once it is allowed
        ({"names": ["a"]}, []),  # what may not be covered was taken out of the list
        ({"names": ["d"]}, ["refused"]),  # something else of the same control
    ],
)
@pytest.mark.parametrize("already", [False, True])
def test_a_refusal_is_over_when_the_same_is_done(
    ready: dict[str, Any], later: dict[str, Any], left: list[str], already: bool
) -> None:
    assert "protected" in run(NAMED, {**ready, "protected": {"roles": ["b"]}})["msg"]
    assert still_open(ready) == ["refused"]
    if already:  # somebody else did it: there is nothing left to do
        SERVICE.file.write_text(json.dumps(dict.fromkeys("abcd", "x")))
    assert run(NAMED, {**ready, **later})["outcome"] == ("ok" if already else "verified")
    assert still_open(ready) == left
    assert not run(NAMED, {**ready, **later})["changed"]
    assert kinds(ready).count("note") == int(already and not left)


def test_waiting_for_the_evidence_keeps_nobody_else_of_the_host_waiting(ready: dict[str, Any]) -> None:
    event(ready, "seal", begins="preserve")
    waiting = threading.Event()

    def sleep(seconds: float) -> None:
        if not waiting.is_set():
            waiting.set()
            other.append(go(ready, names=["other"], value="y"))
        time.sleep(0.01)

    def destroying(params: dict[str, Any], facts: dict[str, Any]) -> Plan:
        return dataclasses.replace(plan(params, facts), destroys=("sessions",))

    other: list[dict[str, Any]] = []
    own = {**ready, "evidence": ["r1/1/sessions.csv"], "evidence_patience": 0.5}
    context = Context(run_id="waits", sleep=sleep)
    assert _engine.execute(dataclasses.replace(CONTROL, plan=destroying), own, context)["changed"]
    assert other[0].get("changed"), other
    assert kinds(ready) == ["intent", "done", "override", "intent", "done"]


# --- who is waited for


@pytest.mark.usefixtures("lockless")
def test_another_task_of_the_same_run_is_waited_for(ready: dict[str, Any]) -> None:
    """Two hosts of one run hand a secret to the same consumer."""
    control = dataclasses.replace(CONTROL, apply=slow_apply)
    results = side_by_side(*(lambda n=n: run(control, {**ready, "value": n}, "one") for n in ("x", "y")))
    assert [result["changed"] for result in results] == [True, True], results
    assert kinds(ready) == ["intent", "done", "intent", "done"]


@pytest.mark.usefixtures("lockless")
def test_who_died_on_this_machine_is_not_waited_for(ready: dict[str, Any]) -> None:
    child = os.fork()
    if child == 0:
        go_on = dataclasses.replace(CONTROL, apply=lambda *_args: os._exit(9))
        run(go_on, ready)
        os._exit(0)
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT) is None:
        time.sleep(0.01)
    began = time.monotonic()
    assert go(ready)["changed"]  # though nobody has taken note of the end yet
    os.waitpid(child, 0)
    assert go(ready)["outcome"] == "ok" and time.monotonic() - began < 5
    assert kinds(ready) == ["intent", "resumed", "done"]


@pytest.mark.usefixtures("lockless")
def test_who_waits_for_another_machine_is_told_for_how_long(ready: dict[str, Any]) -> None:
    stream = case_of(ready).stream("r1")
    writer = {"machine": "another", "pid": 1, "began": "1"}
    until = time.time() + 60
    body = {"control": "register", "what": "else", "changes": [], "at": 0, "until": until, "writer": writer}
    stream.append("intent", body)
    told: list[str] = []
    slept: list[float] = []
    context = Context(run_id="w", tell=told.append, sleep=slept.append, clock=lambda: time.time() + 10 * len(slept))
    assert _engine.execute(CONTROL, ready, context)["changed"]
    assert len(told) == 1 and "r1" in told[0] and "run reader" in told[0] and " 60 s" in told[0], told
    assert 5 <= len(slept) <= 7


def test_a_dead_runs_claim_by_a_clock_that_is_ahead_keeps_nobody_waiting(ready: dict[str, Any]) -> None:
    """The lock proves that nobody is at work, whatever the claim says."""
    stream = case_of(ready).stream("r1")
    stream.append(
        "intent", {"control": "register", "what": "else", "changes": [], "at": 0, "until": time.time() + 3600}
    )
    began = time.monotonic()
    case_of(ready).record("r1", "note", {"text": "x"})
    assert go(ready)["changed"] and time.monotonic() - began < 5


@pytest.mark.parametrize("how", ["with locks", "without"])
def test_no_two_seals_have_one_turn(ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "without":
        monkeypatch.setattr(_store.FileStore, "exclusive", _store.S3Store.exclusive)
    real, both = _verify.entries_of, threading.Barrier(2)

    def entries_of(case: _case.Case, stream: str) -> list[Any]:
        seen = real(case, stream)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.3)
        return seen

    monkeypatch.setattr(_verify, "entries_of", entries_of)
    side_by_side(*(lambda: event(ready, "seal") for _number in range(2)))
    turns = [seal["turn"] for seal in _incident.fold(_incident.entries_of(case_of(ready), "_run"))["seals"]]
    assert turns == [1, 2]


@pytest.mark.parametrize("host", ["db/1", "::1", "x.evidence", "a%b"])
def test_a_release_is_recorded_in_the_stream_of_its_host(
    ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    options = {**ready, "host": host}
    go(options)
    undo(options, monkeypatch)
    assert case_of(options).streams().keys() == {"_run", _case.encode_host(host)}
    assert not undo(options, monkeypatch)["changed"]


# --- the store is gone, and the spool


def test_a_file_system_that_is_not_mounted_is_a_lost_store(ready: dict[str, Any], tmp_path: pathlib.Path) -> None:
    """Nothing is written into the folder below, where it would be hidden afterwards."""
    os.rename(tmp_path / "cases", tmp_path / "unmounted")
    (tmp_path / "cases").mkdir()
    assert [entry["kind"] for entry in go(ready)["spooled"]] == ["intent", "done"]
    assert list((tmp_path / "cases").iterdir()) == []
    assert "holds no case" in event(ready, "note", text="x")["msg"]
    (tmp_path / "cases").rmdir()
    os.rename(tmp_path / "unmounted", tmp_path / "cases")
    assert not go(ready)["changed"] and kinds(ready) == ["intent", "done"]


def gone(*_args: Any, **_kwargs: Any) -> Any:
    raise StoreUnavailable("case_store: gone")


@pytest.mark.parametrize("lost", [1, 2])
def test_an_entry_whose_answer_was_lost_is_not_written_again(
    ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    real = _store.FileStore.create
    count = 0

    def create(store: _store.FileStore, key: str, data: bytes) -> bool:
        nonlocal count
        count += 1
        if count > lost:
            gone()
        answer = real(store, key, data)
        return answer if count < lost else gone()

    with monkeypatch.context() as patch:
        patch.setattr(_store.FileStore, "create", create)
        result = go(ready)
    assert result["changed"] and len(result["spooled"]) == 3 - lost
    assert not go(ready)["changed"]
    assert kinds(ready) == ["intent", "done"] and _verify.verify(case_of(ready))["valid"]
    assert [item["state"] for item in head_of(ready).doc["live"]] == ["verified"]


def head_of(options: dict[str, Any]) -> _case.Entry:
    stream = case_of(options).stream("r1")
    stream.load()
    assert stream.head is not None
    return stream.head


def without_store(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **more: Any) -> dict[str, Any]:
    with monkeypatch.context() as patch:
        for name in ("names", "get", "create"):
            patch.setattr(_store.FileStore, name, gone)
        return go(options, **more)


@pytest.mark.usefixtures("lockless")
def test_of_two_that_bring_in_one_spool_none_doubles_an_entry(
    ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("x", "y"):
        without_store(ready, monkeypatch, value=value)
    side_by_side(*(lambda: _case.merge_spools(case_of(ready)) for _number in range(4)))
    _case.merge_spools(case_of(ready))
    assert kinds(ready) == ["intent", "done"] * 2 and _case.spooled(case_of(ready)) == []


def test_a_merge_that_was_cut_off_doubles_nothing(ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry was brought in, its file was not removed yet, and others wrote since."""
    without_store(ready, monkeypatch)
    folder = pathlib.Path(_case.spool_folder(case_of(ready), "r1"))
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    _case.merge_spools(case_of(ready))
    case_of(ready).record("r1", "note", {"text": "since"})
    for name, data in kept.items():
        (folder / name).write_bytes(data)
    _case.merge_spools(case_of(ready))
    assert kinds(ready) == ["intent", "done", "note"] and _case.spooled(case_of(ready)) == []


def test_twenty_keep_an_entry_at_once(ready: dict[str, Any]) -> None:
    def keep(number: int) -> dict[str, Any]:
        stream = case_of(ready).stream("r1")
        return {"nonce": _case.spool(stream, "note", {"text": str(number)})}

    results = side_by_side(*(lambda n=n: keep(n) for n in range(20)))
    assert len(results) == len(_case.spooled_entries(case_of(ready))["r1"]) == 20


def test_what_was_kept_says_when_and_by_whom(ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the round and the phase of whoever brings it in."""
    without_store({**ready, "phase": "fence"}, monkeypatch)
    _case.merge_spools(case_of({**ready, "round": 2, "phase": "identify"}))
    entry = case_of(ready).stream("r1").entry(1)
    assert (entry.doc["round"], entry.doc["phase"], entry.doc["actor"]) == (1, "fence", "tester")
    assert "until" not in entry.body, "it was counted by another clock"


def test_whoever_lost_the_store_is_waited_for_when_it_is_back(
    ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no lock and no claim any more, and is still at work on the same machine."""
    started, goes_on = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:

        def slow(client: Register, params: dict[str, Any], change: Change) -> None:
            os.write(started[1], b".")
            os.read(goes_on[0], 1)
            apply(client, params, change)

        try:
            for name in ("names", "get", "create"):
                setattr(_store.FileStore, name, gone)
            run(dataclasses.replace(CONTROL, apply=slow), {**ready, "names": ["a"]})
        finally:
            os._exit(0)
    os.read(started[0], 1)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        if not waited:
            os.write(goes_on[1], b".")
        waited.append(seconds)
        time.sleep(seconds)

    result = _engine.execute(CONTROL, {**ready, "names": ["a"]}, Context(run_id="next", sleep=sleep))
    os.waitpid(child, 0)
    assert waited and not result["changed"], result
    assert kinds(ready) == ["intent", "done"]


# --- a gate's verdict


def gate(checks: list[bool]) -> Any:
    def probe(client: Any, params: dict[str, Any]) -> dict[str, Any]:
        passed = checks.pop(0) if len(checks) > 1 else checks[0]
        return {"passed": passed, "checks": [{"name": "door", "passed": passed, "why": None if passed else "is open"}]}

    return Gate(name="gate", service=SERVICE, spec={"argument_spec": {}}, probe=probe)


def test_a_gate_that_passed_too_late_says_so(ready: dict[str, Any]) -> None:
    options = {**ready, "timeout": 0.2, "for_seconds": 0.15, "interval": 0.05}
    result = run(gate([False, False, False, True]), options)
    assert result["failed"] and "not for the 0.15 s asked for" in result["msg"], result
    assert [one["why"] for one in _status.status(case_of(ready))["open"]] == [result["msg"].partition(": ")[2]]


def test_the_verdict_of_a_gate_is_kept_while_the_store_is_lost(
    ready: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        for name in ("names", "get", "create"):
            patch.setattr(_store.FileStore, name, gone)
        result = run(gate([True]), {**ready, "timeout": 1})
    assert result["passed"] and [entry["kind"] for entry in result["spooled"]] == ["check"]
    _case.merge_spools(case_of(ready))
    assert kinds(ready) == ["check"]


def test_clocks_that_differ_are_told_and_alter_nothing(ready: dict[str, Any]) -> None:
    assert _verify.verify(case_of(ready))["skew"] < 1
    for ahead in (0.0, 3600.0, -1800.0):
        case = _case.open_case(ready, Context(run_id="x", clock=lambda ahead=ahead: time.time() + ahead))
        case.record("_run", "note", {"text": "x"})
    seen = case_verify_info.CONTROL.read(case_of(ready), {"expect": None})
    assert seen["valid"] and 5399 < seen["skew"] < 5401 and "differ by 5400 s" in seen["screen"][-1], seen


def test_options_that_list_mappings_are_about_the_same_where_they_share_one() -> None:
    one, more, other = ([{"database": name} for name in names] for names in ("a", "ab", "b"))
    assert _task.same_matter({"routes": one}, {"routes": more})
    assert not _task.same_matter({"routes": one}, {"routes": other})
