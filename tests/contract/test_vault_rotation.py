# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A rotation and its delivery, on the double and on the real Vault, with every request failing in every way once."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import multiprocessing.connection
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.firebreak.incident.plugins.module_utils import _delivery
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context
from ansible_collections.firebreak.incident.plugins.module_utils._errors import FirebreakError, Refused, Unproven
from ansible_collections.firebreak.incident.plugins.modules import secret_delivery, vault_kv_rotation
from tests.contract.rotation_walk import FAULTS, Consumer, FaultProxy, LocalHost, carry_out, predict
from tests.contract.vault_servers import Server, double, real_vault

ROTATION, DELIVERY = vault_kv_rotation.CONTROL, secret_delivery.CONTROL
FIELDS = ["JWT_SECRET", "WEBHOOK_SECRET"]
SIBLINGS = {"BOT_TOKEN": "b" * 20, "LIMIT": 1.10, "NESTED": {"b": [1, None], "a": "x"}, "EMPTY": ""}
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload([__name__])
ROTATION.service.preload()


@pytest.fixture(scope="module", params=["double", "real"])
def vault(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with double() if request.param == "double" else real_vault(tmp_path_factory.mktemp("vault")) as server:
        yield server


@pytest.fixture(scope="module")
def proxy(vault: Server) -> Iterator[FaultProxy]:
    with FaultProxy(vault.port) as running:
        yield running


@pytest.fixture(scope="module")
def consumer() -> Iterator[Consumer]:
    with Consumer() as running:
        yield running


class Scene:
    """One secret of its own, what it held, and the options to rotate it."""

    number = 0

    def __init__(self, vault: Server, proxy: FaultProxy, consumer: Consumer) -> None:
        Scene.number += 1
        self.vault, self.proxy, self.consumer = vault, proxy, consumer
        self.path = f"app/{Scene.number}"
        self.incident = f"INC-2026-1120-{Scene.number:03}"
        for _version in range(3):
            self.old = {name: secrets.token_hex(16) for name in FIELDS}
            self.write({**SIBLINGS, **self.old})
        self.consumer.values = dict(self.old)
        self.base = 3

    def write(self, data: dict[str, Any]) -> None:
        assert self.vault.ask("POST", f"/v1/secret/data/{self.path}", {"data": data}).status == 200

    def options(self, state: str, round: int = 1, **changed: Any) -> dict[str, Any]:
        proof = [
            {"field": "JWT_SECRET", "kind": "jwt", "url": f"{self.consumer.url}/api/me"},
            {"field": "WEBHOOK_SECRET", "kind": "webhook", "url": f"{self.consumer.url}/hooks/payment"},
            {"field": "JWT_SECRET", "kind": "challenge", "url": f"{self.consumer.url}/internal/secret-proof"},
        ]
        return {
            **self.service(round),
            **dict.fromkeys(("new_values",)),
            "state": state,
            "fields": FIELDS,
            "format": "urlsafe",
            "bytes": 32,
            "proof": proof,
            **changed,
        }

    def service(self, round: int = 1) -> dict[str, Any]:
        return {
            "vault_url": self.proxy.url,
            "vault_token": self.vault.token,
            "vault_namespace": None,
            "vault_ca_cert": None,
            "engine_mount_point": "secret",
            "path": self.path,
            "incident_id": self.incident,
            "mark": f"{self.incident}/{round}",
        }

    def context(self, **more: Any) -> Context:
        return Context(correlation=self.incident, sleep=lambda _seconds: None, **more)

    def rotate(self, state: str, **changed: Any) -> Any:
        return carry_out(ROTATION, self.options(state, **changed), self.context())

    def deliver(self) -> None:
        """What a delivery does, without our code."""
        self.consumer.values = {name: self.current()[name] for name in FIELDS}

    def retire(self, **changed: Any) -> None:
        self.rotate("current", **changed)
        self.deliver()
        self.rotate("retired", **changed)

    def current(self) -> dict[str, Any]:
        data: dict[str, Any] = self.vault.ask("GET", f"/v1/secret/data/{self.path}").body["data"]["data"]
        return data

    def siblings(self) -> dict[str, Any]:
        """With the digits as the server writes them."""
        where = f"/v1/secret/data/{self.path}"
        content = self.proxy.ask("GET", where, b"", {"X-Vault-Token": self.vault.token})[2]
        data = json.loads(content, parse_float=str, parse_int=str)["data"]["data"]
        return {name: value for name, value in data.items() if name not in FIELDS}

    def versions(self, path: str | None = None) -> dict[int, bool]:
        """Version -> destroyed."""
        answer = self.vault.ask("GET", f"/v1/secret/metadata/{path or self.path}")
        return {int(number): entry["destroyed"] for number, entry in answer.body["data"]["versions"].items()}

    def pending(self, round: int = 1) -> str:
        return f"_pending/{self.incident}/{round}/{self.path}/{','.join(FIELDS)}"

    def check_retired(self) -> None:
        now = self.current()
        assert {name: value for name, value in now.items() if name not in FIELDS} == SIBLINGS
        assert all(now[name] != self.old[name] and len(now[name]) >= 43 for name in FIELDS)
        assert now["JWT_SECRET"] != now["WEBHOOK_SECRET"]
        assert self.versions() == {1: True, 2: True, 3: True, 4: False}
        entries = self.versions(self.pending())
        assert list(entries.values()) == [True] * (len(entries) - 1) + [False]
        record = self.vault.ask("GET", f"/v1/secret/data/{self.pending()}").body["data"]["data"]
        assert len(record.pop("salt")) >= 32 and len(record.pop("digest")) >= 64
        assert record == {"mark": f"{self.incident}/1", "base": 3, "fields": FIELDS, "done": True}
        assert self.consumer.values == {name: now[name] for name in FIELDS}


@pytest.fixture
def scene(vault: Server, proxy: FaultProxy, consumer: Consumer) -> Scene:
    proxy.arm(0, "")
    return Scene(vault, proxy, consumer)


def test_three_steps(scene: Scene) -> None:
    assert [change.action for change in scene.rotate("staged").changes] == ["create"]
    assert scene.current() == {**SIBLINGS, **scene.old}
    assert [change.action for change in scene.rotate("current").changes] == ["update"]
    assert scene.versions() == {1: False, 2: False, 3: False, 4: False}
    scene.deliver()
    assert [change.action for change in scene.rotate("retired").changes] == ["run", "delete", "delete"]
    scene.check_retired()


def test_a_step_includes_those_before_it_and_none_goes_back(scene: Scene) -> None:
    assert [change.action for change in scene.rotate("current").changes] == ["create", "update"]
    assert not scene.rotate("staged").changes
    scene.deliver()
    scene.rotate("retired")
    for state in ("staged", "current", "retired"):
        scene.proxy.arm(0, "")
        assert not scene.rotate(state).changes
        assert {method for method, _path in scene.proxy.seen} == {"GET"}
    scene.check_retired()


def test_check_mode_predicts_the_real_run(scene: Scene) -> None:
    for state in ("staged", "current", "retired"):
        before = (scene.current(), scene.versions())
        scene.proxy.arm(0, "")
        predicted = predict(ROTATION, scene.options(state), scene.context())
        assert {method for method, path in scene.proxy.seen if "capabilities-self" not in path} == {"GET"}
        assert (scene.current(), scene.versions()) == before
        if state == "retired":
            scene.deliver()
        assert scene.rotate(state) == predicted


def test_siblings_stay_to_the_digit(scene: Scene) -> None:
    """Read and written again by us, these numbers would come back as others."""
    text = '"BIG":12345678901234567890.12345,"ONE":1.10,"HUGE":12345678901234567890123,"TEXT":"\\u0000<&>\\u2028"'
    content = ('{"data":{"JWT_SECRET":"old old old","WEBHOOK_SECRET":"o l d",' + text + "}}").encode()
    assert scene.vault.ask("POST", f"/v1/secret/data/{scene.path}", content).status == 200
    before = scene.siblings()
    scene.rotate("current")
    assert len(before) == 4 and scene.siblings() == before


def test_a_second_round_rotates_again(scene: Scene) -> None:
    for round in (1, 2):
        scene.rotate("current", round=round)
        scene.deliver()
        scene.rotate("retired", round=round)
    assert scene.versions() == {1: True, 2: True, 3: True, 4: True, 5: False}


def test_nothing_is_destroyed_while_a_consumer_uses_the_old_value(scene: Scene) -> None:
    scene.rotate("current")
    with pytest.raises(Unproven, match="does not accept a token of the new JWT_SECRET") as caught:
        scene.rotate("retired")
    assert caught.value.effect == "none"
    assert scene.versions() == {1: False, 2: False, 3: False, 4: False}
    scene.deliver()
    scene.rotate("retired")
    scene.check_retired()


def test_a_door_that_accepts_everything_is_no_proof(scene: Scene) -> None:
    scene.rotate("current")
    scene.deliver()
    url = f"{scene.consumer.url}/internal/secret-proof?name=JWT_SECRET&nonce=00"  # 200 whatever the token
    proof = [{"field": name, "kind": "jwt", "url": url} for name in FIELDS]
    with pytest.raises(Unproven, match=r"does not refuse a token of the old JWT_SECRET with 401 \(status 200"):
        scene.rotate("retired", proof=proof)
    assert not any(scene.versions().values())


def test_a_consumer_that_has_only_just_come_back_is_waited_for(scene: Scene) -> None:
    scene.rotate("current")
    scene.deliver()
    scene.consumer.unavailable = 3
    scene.rotate("retired")
    assert scene.consumer.unavailable == 0
    scene.check_retired()


def test_a_redirect_is_no_proof(scene: Scene) -> None:
    scene.rotate("current")
    scene.deliver()
    proof = [{"field": name, "kind": "challenge", "url": f"{scene.consumer.url}/elsewhere"} for name in FIELDS]
    with pytest.raises(Unproven, match="status 307"):
        scene.rotate("retired", proof=proof)


def test_without_the_old_value_it_is_unproven(scene: Scene) -> None:
    scene.rotate("current")
    scene.deliver()
    assert scene.vault.ask("PUT", f"/v1/secret/destroy/{scene.path}", {"versions": [3]}).status == 204
    with pytest.raises(Unproven, match="the old JWT_SECRET, WEBHOOK_SECRET cannot be read any more"):
        scene.rotate("retired")
    assert scene.versions() == {1: False, 2: False, 3: True, 4: False}


@pytest.mark.parametrize("when", ["staged", "current"])
def test_somebody_else_in_between_is_a_conflict(scene: Scene, when: str) -> None:
    scene.rotate(when)
    scene.write({**SIBLINGS, **scene.old, **({"JWT_SECRET": "x" * 43} if when == "staged" else {})})
    version = 4 if when == "staged" else 5
    with pytest.raises(Refused, match=f"version {version} was written by (root|token) in between") as caught:
        scene.rotate("retired")
    assert caught.value.guard == "conflict"
    assert not any(scene.versions().values())


@pytest.mark.parametrize("when", ["before the new one is current", "while it is made current"])
def test_a_sibling_that_somebody_writes_after_the_staging_is_kept(scene: Scene, when: str) -> None:
    """Whoever edits another field of the secret does not stop the rotation; the copy of the stolen value goes as well."""
    scene.rotate("staged")
    edited = {**SIBLINGS, next(iter(SIBLINGS)): "by somebody else"}
    if when == "while it is made current":
        with pytest.raises(FirebreakError, match="in between"):
            carry_out(
                ROTATION,
                scene.options("current"),
                scene.context(),
                lambda change: scene.write({**edited, **scene.old}) if change.data["step"] == "promote" else None,
            )
    else:
        scene.write({**edited, **scene.old})
    scene.rotate("current")
    assert {name: scene.current()[name] for name in SIBLINGS} == edited
    scene.deliver()
    scene.rotate("retired")
    assert scene.versions() == {1: True, 2: True, 3: True, 4: True, 5: False}
    assert {name: scene.current()[name] for name in SIBLINGS} == edited


def test_a_foreign_write_inside_the_run_is_a_conflict(scene: Scene) -> None:
    def intrude(change: Any) -> None:
        if change.data["step"] == "promote":
            scene.write({**SIBLINGS, **scene.old})

    with pytest.raises(
        FirebreakError, match=r"was written by .* in between \(version 4 where 3 was expected"
    ) as caught:
        carry_out(ROTATION, scene.options("current"), scene.context(), intrude)
    assert caught.value.effect == "none"
    assert scene.current() == {**SIBLINGS, **scene.old}


def test_of_two_runs_one_makes_the_value(scene: Scene) -> None:
    def overtake(change: Any) -> None:
        if change.data["step"] == "stage":
            scene.rotate("staged")

    with pytest.raises(FirebreakError, match="in between"):
        carry_out(ROTATION, scene.options("current"), scene.context(), overtake)
    scene.rotate("current")
    assert len(scene.versions()) == 4


@pytest.mark.parametrize("how", ["old", "another", "removed", "begun anew"])
def test_a_value_that_somebody_writes_after_the_end_is_a_conflict(scene: Scene, how: str) -> None:
    """A reconciler, or `kv rollback`, which knows the stolen value still."""
    scene.retire()
    values = scene.current() | {"JWT_SECRET": "x" * 43 if how == "another" else scene.old["JWT_SECRET"]}
    if how == "removed":
        del values["JWT_SECRET"]
    if how == "begun anew":
        assert scene.vault.ask("DELETE", f"/v1/secret/metadata/{scene.path}").status == 204
    scene.write(values)
    version = 1 if how == "begun anew" else 5
    for state in ("staged", "current", "retired"):
        wanted = f"version {version} was written by (root|token) after the end of this rotation"
        with pytest.raises(Refused, match=wanted) as caught:
            scene.rotate(state)
        assert caught.value.guard == "conflict"
    if how != "removed":
        scene.retire(round=2)
        assert not scene.rotate("retired", round=2).changes


def test_what_is_no_conflict_after_the_end(scene: Scene) -> None:
    scene.retire()
    for _version in range(2):
        scene.write({**scene.current(), "BOT_TOKEN": secrets.token_hex(8)})
        assert not scene.rotate("retired").changes
    assert scene.vault.ask("DELETE", f"/v1/secret/data/{scene.path}").status == 204
    assert not scene.rotate("retired").changes


@pytest.fixture
def mount(vault: Server) -> Iterator[Server]:
    yield vault
    assert vault.ask("POST", "/v1/secret/config", {"max_versions": 0}).status == 204


@pytest.mark.parametrize(
    ("of_secret", "of_mount", "kept"), [(1, 0, 1), (0, 1, 1), (1, 1, 1), (0, 0, 10), (1, 2, 2), (2, 1, 2)]
)
def test_the_old_version_must_be_kept(scene: Scene, mount: Server, of_secret: int, of_mount: int, kept: int) -> None:
    """Where Vault keeps one version only, nobody can try the old value once the new one is written."""
    assert mount.ask("POST", "/v1/secret/config", {"max_versions": of_mount}).status == 204
    assert mount.ask("POST", f"/v1/secret/metadata/{scene.path}", {"max_versions": of_secret}).status == 204
    if kept > 1:
        scene.retire()
        return
    for state in ("staged", "current", "retired"):
        with pytest.raises(Refused, match=f"max_versions of secret/{scene.path} is 1.* set it to 2 or more"):
            scene.rotate(state)
    assert mount.ask("GET", f"/v1/secret/metadata/{scene.pending()}").status == 404


def test_values_from_a_provider(scene: Scene) -> None:
    issued = {"JWT_SECRET": "issued-by-the-provider"}
    with pytest.raises(Refused, match="JWT_SECRET is the value in use"):
        scene.rotate("staged", new_values={"JWT_SECRET": scene.old["JWT_SECRET"]})
    scene.rotate("staged", new_values=issued)
    with pytest.raises(Refused, match="another value for JWT_SECRET is pending"):
        scene.rotate("current", new_values={"JWT_SECRET": "another-by-the-provider"})
    scene.rotate("current", new_values=issued)
    assert scene.current()["JWT_SECRET"] == "issued-by-the-provider"
    assert len(scene.current()["WEBHOOK_SECRET"]) == 43


@pytest.mark.parametrize(("format", "length"), [("hex", 96), ("base64", 64), ("urlsafe", 64)])
def test_formats(scene: Scene, format: str, length: int) -> None:
    scene.rotate("current", format=format, bytes=48)
    assert len(scene.current()["JWT_SECRET"]) == length


def test_every_request_carries_the_incident(scene: Scene) -> None:
    scene.rotate("current")
    assert {headers.get("X-Correlation-Id") for headers in scene.proxy.headers} == {scene.incident}


def test_what_the_token_may_do_is_asked_first(scene: Scene) -> None:
    rules = f'path "secret/data/{scene.path}" {{ capabilities = ["read"] }}\n'
    rules += 'path "secret/metadata/*" { capabilities = ["read"] }\n'
    rules += 'path "secret/data/_pending/*" { capabilities = ["create", "read", "update"] }'
    assert scene.vault.ask("PUT", "/v1/sys/policies/acl/reader", {"policy": rules}).status == 204
    token = scene.vault.ask("POST", "/v1/auth/token/create", {"policies": ["reader"]}).body["auth"]["client_token"]
    wanted = f"lack read on secret/config; patch on secret/data/{scene.path}; update on secret/destroy/_pending/.*"
    wanted += f"; update on secret/destroy/{scene.path}$"
    with pytest.raises(Refused, match=wanted) as caught:
        scene.rotate("retired", vault_token=token)
    assert caught.value.guard == "capabilities"
    assert not any("_pending" in path and method != "GET" for method, path in scene.proxy.seen)


def test_bad_tokens_mounts_and_namespaces(scene: Scene) -> None:
    with pytest.raises(FirebreakError, match="Vault answered 403") as caught:
        scene.rotate("staged", vault_token="wrong")
    assert "wrong" not in caught.value.msg and caught.value.effect == "none"
    with pytest.raises(FirebreakError, match="engine_mount_point"):
        scene.rotate("staged", engine_mount_point="nowhere")
    with pytest.raises(Refused, match="vault_namespace"):
        scene.rotate("staged", vault_namespace="team")
    with pytest.raises(Refused, match="has no readable ABSENT"):
        scene.rotate("staged", fields=["ABSENT"], proof=[])
    with pytest.raises(Refused, match="vault_token is missing"):
        scene.rotate("staged", vault_token=None)
    for option in ("vault_url", "proof_url"):
        with pytest.raises(Refused, match=f"^{option} must be a URL"):
            ROTATION.service.addresses({**scene.service(), option: "http://[::1"})
    with pytest.raises(Refused, match=r"^proof: url must be a URL"):
        ROTATION.service.addresses(scene.options("retired", proof=[{"url": "https://"}]))


def test_the_environment_is_not_asked(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "VAULT_ADDR", "VAULT_HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("VAULT_NAMESPACE", "elsewhere")
    monkeypatch.setenv("VAULT_TOKEN", "elsewhere")
    scene.rotate("current")


# Every request fails once


def _child(gate: multiprocessing.connection.Connection, params: dict[str, Any], incident: str) -> None:
    gate.recv()
    try:
        carry_out(ROTATION, params, Context(correlation=incident, sleep=lambda _seconds: None))
        gate.send("ok")
    except FirebreakError as error:
        gate.send(error.msg)


def run_killed(scene: Scene, state: str) -> str:
    """One run in a process of its own, which the proxy may kill."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_child, args=(theirs, scene.options(state), scene.incident))
    process.start()
    theirs.close()
    scene.proxy.victim = process.pid
    ours.send("go")
    try:
        return str(ours.recv())
    except EOFError:
        return "killed"
    finally:
        process.join(10)
        scene.proxy.victim = None


def states(scene: Scene) -> list[str]:
    """Through all states of a rotation; how each run ended."""
    ends = [run_killed(scene, "current")]
    if ends == ["ok"]:
        scene.deliver()
        ends.append(run_killed(scene, "retired"))
    return ends


@pytest.mark.parametrize("fault", FAULTS)
def test_every_request_fails_once(vault: Server, proxy: FaultProxy, consumer: Consumer, fault: str) -> None:
    proxy.arm(0, "")
    assert states(Scene(vault, proxy, consumer)) == ["ok", "ok"]
    requests = list(proxy.seen)
    assert len(requests) > 15
    for number in range(1, len(requests) + 1):
        scene = Scene(vault, proxy, consumer)
        proxy.arm(number, fault)
        ends = states(scene)
        if fault.startswith("killed"):
            assert "killed" in ends, (number, requests[number - 1], ends)
        proxy.arm(0, "")
        while ends != ["ok", "ok"]:
            again = states(scene)
            assert again == ["ok", "ok"] or len(ends) < len(again), (number, requests[number - 1], ends, again)
            ends = again
        scene.check_retired()


# The delivery


class Place:
    """An env file, and the reload that makes the consumer read it."""

    def __init__(self, scene: Scene, folder: Path) -> None:
        self.scene, self.host = scene, LocalHost()
        self.file, self.flag = folder / "app.env", folder / "reloaded"
        self.others = b"# keys\r\nexport A=1\n\nJWT_SECRET_OLD=x\n  WEIRD = 'y'\xff\n"
        self.file.write_bytes(
            self.others + f"export JWT_SECRET='{scene.old['JWT_SECRET']}'\nHOOK={scene.old['WEBHOOK_SECRET']}".encode()
        )
        self.file.chmod(0o640)
        scene.consumer.values = {**scene.old, "HOOK": scene.old["WEBHOOK_SECRET"]}

    def params(self, **changed: Any) -> dict[str, Any]:
        return {
            **self.scene.service(),
            "fields": {"JWT_SECRET": "JWT_SECRET", "WEBHOOK_SECRET": "HOOK"},
            "version": None,
            "destination": "env_file",
            "env_file": str(self.file),
            "reload": ["touch", str(self.flag)],
            "proof_url": f"{self.scene.consumer.url}/internal/secret-proof",
            "proof_patience": 5.0,
            **changed,
        }

    def context(self) -> Context:
        """Whoever waits gives the consumer the time to notice its reload."""
        return Context(host=self.host, sleep=self._notice)

    def _notice(self, _seconds: float) -> None:
        if self.flag.exists():
            lines = dict(line.rpartition(b" ")[2].split(b"=", 1) for line in self.file.read_bytes().splitlines()[-2:])
            self.scene.consumer.values |= {name.decode(): value.strip(b"'").decode() for name, value in lines.items()}

    def deliver(self, **changed: Any) -> Any:
        return carry_out(DELIVERY, self.params(**changed), self.context())


@pytest.fixture
def place(scene: Scene, tmp_path: Path) -> Place:
    return Place(scene, tmp_path)


def test_delivery(place: Place) -> None:
    place.scene.rotate("current")
    predicted = predict(DELIVERY, place.params(), place.context())
    assert predicted.before["fields"] == {"JWT_SECRET": "stale", "HOOK": "stale"}
    plan = place.deliver()
    assert plan == predicted
    assert [change.action for change in plan.changes] == ["update", "run"]
    new = place.scene.current()
    assert place.file.read_bytes() == (
        place.others + f"export JWT_SECRET='{new['JWT_SECRET']}'\nHOOK={new['WEBHOOK_SECRET']}".encode()
    )
    assert place.file.stat().st_mode & 0o7777 == 0o640
    assert sorted(os.listdir(place.file.parent)) == ["app.env", "reloaded"]
    for value in (*place.scene.old.values(), new["JWT_SECRET"], new["WEBHOOK_SECRET"]):
        assert not any(value in shown for shown in place.host.shown)
        assert value not in repr(plan)
    assert not place.deliver().changes
    place.scene.consumer.values["WEBHOOK_SECRET"] = place.scene.consumer.values["HOOK"]
    place.scene.rotate("retired")


def test_check_mode_knows_a_version_that_is_only_planned(place: Place) -> None:
    rotation = predict(ROTATION, place.scene.options("current"), place.scene.context())
    planned = predict(DELIVERY, place.params(version=rotation.after["version"]), place.context())
    place.scene.rotate("current")
    assert predict(DELIVERY, place.params(version=4), place.context()) == planned


def test_a_version_that_never_came_is_not_delivered(place: Place) -> None:
    with pytest.raises(FirebreakError, match="Vault holds version 3 of the secret, not yet 4") as caught:
        place.deliver(version=4)
    assert caught.value.effect == "none"


def test_after_a_crash_before_the_reload_it_is_reloaded(place: Place) -> None:
    place.scene.rotate("current")

    def stop(change: Any) -> None:
        if change.data["step"] == "reload":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(DELIVERY, place.params(), place.context(), stop)
    assert [change.data["step"] for change in place.deliver().changes] == ["reload"]


def test_a_consumer_that_keeps_the_old_value_is_unproven(place: Place) -> None:
    place.scene.rotate("current")
    with pytest.raises(Unproven, match="the consumer is stale"):
        place.deliver(reload=["true"], proof_patience=0.1)
    with pytest.raises(FirebreakError, match="reload ended with status 3"):
        place.deliver(reload=["sh", "-c", "exit 3"])


def test_a_file_that_others_changed_meanwhile_is_left(place: Place) -> None:
    place.scene.rotate("current")

    def intrude(change: Any) -> None:
        place.file.write_bytes(b"MINE=1\n")

    with pytest.raises(FirebreakError, match="somebody else changed it") as caught:
        carry_out(DELIVERY, place.params(), place.context(), intrude)
    assert caught.value.effect == "none"
    assert place.file.read_bytes() == b"MINE=1\n"
    assert os.listdir(place.file.parent) == ["app.env"]


def test_a_link_stays_a_link_and_what_a_crash_left_is_swept(place: Place) -> None:
    place.scene.rotate("current")
    link = place.file.with_name("link.env")
    link.symlink_to(place.file)
    with subprocess.Popen(["true"]) as dead:
        pass
    left = [f"app.env.firebreak.{number}.Ab3xYz" for number in (dead.pid, 999999999)]
    foreign = [
        "app.env.firebreak",
        "app.env.firebreak.old",
        f"app.env.firebreak.{dead.pid}",
        "app.env.firebreak.1x.Ab3xYz",
    ]
    foreign.append(f"app.env.firebreak.{os.getpid()}.Ab3xYz")  # of a run that is alive
    for name in (*left, *foreign):
        place.file.with_name(name).write_text("left by a crash")
    place.deliver(env_file=str(link))
    assert link.is_symlink()
    assert sorted(os.listdir(place.file.parent)) == sorted(["app.env", "link.env", "reloaded", *foreign])
    assert place.scene.current()["JWT_SECRET"].encode() in place.file.read_bytes()


def test_two_runs_at_once_do_not_mix(tmp_path: Path) -> None:
    """One is held while its new file lies there; the other begins and ends meanwhile."""
    folder, tools, go = tmp_path / "etc", tmp_path / "tools", tmp_path / "go"
    folder.mkdir()
    tools.mkdir()
    file = folder / "app.env"
    file.write_text("A=old\n")
    (tools / "chmod").write_text(f'#!/bin/sh\nwhile [ ! -e {go} ]; do sleep 0.02; done\n{shutil.which("chmod")} "$@"\n')
    (tools / "chmod").chmod(0o755)
    held, other = LocalHost(), LocalHost()
    held.path = f"{tools}:{os.environ['PATH']}"
    seen = _delivery.compare(other, str(file), {"A": "x"})[0]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(_delivery.replace, held, str(file), seen, {"A": "first"})
        try:
            until = time.monotonic() + 10
            while not (lying := sorted(set(folder.iterdir()) - {file})) and time.monotonic() < until:
                time.sleep(0.01)
            _delivery.replace(other, str(file), seen, {"A": "second"})
            assert len(lying) == 1 and sorted(set(folder.iterdir()) - {file}) == lying
            assert lying[0].stat().st_mode & 0o7777 == 0o600
        finally:
            go.touch()
        with pytest.raises(FirebreakError, match="somebody else changed it") as caught:
            first.result(10)
    assert caught.value.effect == "none"
    assert file.read_text() == "A=second\n" and os.listdir(folder) == ["app.env"]


def test_values_that_do_not_arrive_whole_change_nothing(place: Place) -> None:
    place.scene.rotate("current")
    before = place.file.read_bytes()

    def cut(change: Any) -> None:
        place.host.bytes_that_arrive = 40

    with pytest.raises(FirebreakError, match="did not arrive whole") as caught:
        carry_out(DELIVERY, place.params(), place.context(), cut)
    assert caught.value.effect == "none"
    assert place.file.read_bytes() == before
    assert os.listdir(place.file.parent) == ["app.env"]


FORMS = {
    b"": b"A=new\nB=new\n",
    b"\n": b"\nA=new\nB=new\n",
    b"X": b"X\nA=new\nB=new\n",
    b"A=old": b"A=new\nB=new\n",
    b"A=old\nB=old": b"A=new\nB=new",
    b"A=old\r\nB=old\r\n": b"A=new\r\nB=new\r\n",
    b"A=\n#A=old\nB='old'\nA=\"older\"\n": b"A=new\n#A=old\nB='new'\nA=\"new\"\n",
    b"  export A=old # why\nAB=1\nBA=2\nB=a=b\n\n\n": b"  export A=new\nAB=1\nBA=2\nB=new\n\n\n",
    b"C=\xff\xfe\t&\\n\\\\ \nA=007\nB=7.0\n": b"C=\xff\xfe\t&\\n\\\\ \nA=new\nB=new\n",
    b"exportA=1\nexport  B=x": b"exportA=1\nexport  B=new\nA=new\n",
}


@pytest.mark.parametrize("content", FORMS, ids=range(len(FORMS)))
def test_forms_of_env_files(tmp_path: Path, content: bytes) -> None:
    file, host, values = tmp_path / "it's an = env.file", LocalHost(), {"A": "new", "B": "new"}
    file.write_bytes(content)
    seen, before = _delivery.compare(host, str(file), values)
    assert "current" not in before.values()
    _delivery.replace(host, str(file), seen, values)
    assert file.read_bytes() == FORMS[content]
    assert _delivery.compare(host, str(file), values)[1] == {"A": "current", "B": "current"}


def test_values_are_texts_not_numbers(tmp_path: Path) -> None:
    file = tmp_path / "app.env"
    file.write_bytes(b"A=10\nB=0x10\nC=1e1\nD=10 \n")
    standings = _delivery.compare(LocalHost(), str(file), {"A": "10.0", "B": "16", "C": "10", "D": "10"})[1]
    assert set(standings.values()) == {"stale"}


def test_what_no_env_file_can_hold(tmp_path: Path) -> None:
    file = tmp_path / "app.env"
    file.write_bytes(b'A="first\nsecond"\n')
    with pytest.raises(FirebreakError, match="goes over several lines"):
        _delivery.compare(LocalHost(), str(file), {"A": "new"})
    for value in ("two words", "new\nline", "$HOME", "quo'te", ""):
        with pytest.raises(Refused, match="characters that readers") as caught:
            _delivery.compare(LocalHost(), str(file), {"B": value})
        assert not value or value not in caught.value.msg


def test_hosts_that_cannot_be_used(place: Place) -> None:
    with pytest.raises(FirebreakError, match="it does not exist") as caught:
        place.deliver(env_file=f"{place.file}.gone")
    assert caught.value.effect == "none"

    class Unreachable:
        def run(self, command: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
            raise FirebreakError("the host cannot be reached over its connection")

    with pytest.raises(FirebreakError, match="cannot be reached") as caught:
        carry_out(DELIVERY, place.params(), place.scene.context(host=Unreachable()))
    assert caught.value.effect == "none"
    with pytest.raises(Refused, match="runs in its action"):
        carry_out(DELIVERY, place.params(), place.scene.context())
