# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The responder's own role, token, session and address survive every playbook, whatever stands in the lists by mistake; and what
the shell's environment says of another site reaches no run.

One story: with mistakes in every list, dry and real; as it should be; as if this were production; and the rest under a HALT.
All systems stand behind proxies that keep what was sent to them, and the environment is full of another site's variables, which
lead to servers that nobody may come to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from lab.client import Lab
from lab.faults import proxied
from lab.inventory import THIEF
from lab.parts import STAFF
from lab.parts.services import request
from lab.tcp_proxy import Connection
from tests import dumps
from tests.controls.cloudflare_ip_list import visit
from tests.runs import Run, extra, glass, lab_in, run
from tests.truth import playbooks, table

RESPONDER = "203.0.113.9"
SEEN = "127.0.2.9"  # where the database sees this run come from
CANARY = "canary-of-another-site-{}"
SECRETS = ("PGPASSWORD", "REDISCLI_AUTH", "VAULT_TOKEN", "CLOUDFLARE_API_TOKEN", "CLOUDFLARE_API_KEY")
SECRETS += ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


class Elsewhere:
    """A server of another site: it counts who comes, and answers nobody."""

    def __init__(self) -> None:
        self.came = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                visitor, _unused = self._listener.accept()
                self.came += 1
                visitor.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def environment(self) -> dict[str, str]:
        """Everything by which an SDK or a program could find this server, or take a credential along."""
        here = f"http://127.0.0.1:{self.port}"
        names = ("VAULT_ADDR", "VAULT_AGENT_ADDR", "CLOUDFLARE_BASE_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
        proxies = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        return {
            **dict.fromkeys((*names, *proxies), here),
            **{name: CANARY.format(name) for name in SECRETS},
            "PGHOST": "127.0.0.1",
            "PGHOSTADDR": "127.0.0.1",
            "PGPORT": str(self.port),
            "PGUSER": "canary",
            "PGDATABASE": "canary",
            "PGOPTIONS": "-c search_path=canary",
            "PGSSLMODE": "require",
            "REDIS_URL": f"redis://:{CANARY.format('REDIS_URL')}@127.0.0.1:{self.port}/0",
            "VAULT_NAMESPACE": "canary",
            "CLOUDFLARE_EMAIL": "canary@example.com",
            "AWS_DEFAULT_REGION": "eu-canary-1",
            "NO_PROXY": "",
            "no_proxy": "",
        }


@dataclasses.dataclass
class Story:
    lab: Lab
    runs: dict[str, Run]
    dumps: dict[str, dict[str, Any]]
    survives: dict[str, dict[str, Any]]
    sent: bytes
    came: int


def mistaken(address: str) -> tuple[str, ...]:
    return extra(
        firebreak_block_addresses=[THIEF, address],
        firebreak_stolen_roles=["reporting", "firebreak"],
        firebreak_affected_users=["11", str(STAFF)],
        firebreak_evidence_patience=2,
    )


def survivors(lab: Lab) -> dict[str, Any]:
    """The responder's things, tried one by one by their own clients."""
    known = lab.hostvars("pg1")
    with (
        contextlib.suppress(psycopg.OperationalError),
        psycopg.connect(
            host="127.0.0.1",
            port=known["firebreak_postgresql_port"],
            dbname="divan",
            user="firebreak",
            password=known["firebreak_postgresql_password"],
        ) as session,
    ):
        role = session.execute("SELECT session_user").fetchone()
    url = lab.env["LAB_CLOUDFLARE_URL"] + "/user/tokens/verify"
    status, _body = request("GET", url, headers={"Authorization": f"Bearer {lab.env['LAB_CLOUDFLARE_TOKEN']}"})
    return {
        "role": list(role or ()),
        "sessions": {
            key: value for key, value in dumps.keys(lab).items() if key.startswith(f"session:refresh:{STAFF}:")
        },
        "address": visit(lab, "127.0.113.9"),
        "vault token": dumps.ask_vault(lab, "GET", "auth/token/lookup-self")["data"]["policies"],
        "cloudflare token": status,
    }


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    sent = bytearray()
    real = Connection._pass

    def recorded(self: Connection, way: str, data: bytes, target: socket.socket, passed: int) -> int:
        if way == "up":
            sent.extend(data)
        return real(self, way, data, target, passed)

    folder = tmp_path_factory.mktemp("guards")
    elsewhere = Elsewhere()
    with lab_in(folder / "lab") as lab, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "_pass", recorded)
        with dumps.client(lab) as cache:  # begun before the incident
            cache.set(f"session:refresh:{STAFF}:guards", json.dumps({"user_id": str(STAFF), "iat": 1}), ex=86400)
        told = Story(lab, {}, {"before": dumps.everything(lab)}, {"before": survivors(lab)}, b"", 0)

        def go(name: str, playbook: str, *words: str, **env: str) -> Run:
            surroundings = {**elsewhere.environment(), **env}
            told.runs[name] = done = run(lab, playbook, *words, inventory=folder / "inventory.json", **surroundings)
            told.dumps[name] = dumps.everything(lab)
            told.survives[name] = survivors(lab)
            return done

        with proxied(lab, folder / "inventory.json") as proxies:
            proxies["pg1"].source = SEEN
            production = extra(firebreak_site="production")
            go("production", "data_breach", *production, FIREBREAK_LAB="1")
            go("mistaken, dry", "data_breach", "--check", *mistaken(SEEN))
            incident = go("mistaken", "data_breach", *mistaken(RESPONDER)).incident
            go("data_breach", "data_breach", *playbooks.SCENARIOS["data_breach"].words(incident))
            halt = lab.dir / "cases" / "HALT"
            halt.touch()
            go("halted", "data_breach", *extra(firebreak_break_glass=glass("all_sessions")))
            go("open", "open", *playbooks.SCENARIOS["open"].words(None), *extra(firebreak_incident_new=True))
            go("verify_case", "verify_case", *playbooks.SCENARIOS["verify_case"].words(incident))
            go("other site", "release", *extra(firebreak_incident_id=incident), *production)
            go("release", "release", *playbooks.SCENARIOS["release"].words(incident))
        told.sent, told.came = bytes(sent), elsewhere.came
        elsewhere.close()
        yield told


@pytest.mark.parametrize("playbook", table.PLAYBOOKS)
def test_the_responder_survives(story: Story, playbook: str) -> None:
    before = story.survives["before"]
    assert before["role"] == ["firebreak"] and before["sessions"] and before["vault token"]
    assert (before["address"], before["cloudflare token"]) == (200, 200)
    assert story.survives[playbook] == before
    contained = dumps.contained(story.lab) if playbook == "release" else None
    assert contained in (None, {"vault", "app", "cache1"})
    assert (story.runs[playbook].code == 0) == (playbook != "open"), story.runs[playbook].output[-3000:]


def refusals(run: Run) -> dict[str, str]:
    """What each control said that was refused, in the last attempt."""
    failed = [line for line in run.results if "failed" in line["event"] and "changes" not in line["result"]]
    return {line["action"].removeprefix("firebreak.incident."): line["result"]["msg"] for line in failed}


@pytest.mark.parametrize("playbook", ["data_breach"])
def test_what_is_protected_is_refused_and_named_and_the_others_go_on(story: Story, playbook: str) -> None:
    dry, real = refusals(story.runs["mistaken, dry"]), refusals(story.runs["mistaken"])
    assert RESPONDER in real["cloudflare_ip_list"] and "is protected; take it" in real["cloudflare_ip_list"]
    assert SEEN in dry["cloudflare_ip_list"] and "as pg1 sees it" in dry["cloudflare_ip_list"]
    assert "firebreak is the role in use" in real["postgresql_login_lock"]
    assert f"accounts {STAFF}" in real["redis_session_revocation"]
    assert all(dry[name] == real[name] for name in ("postgresql_login_lock", "redis_session_revocation"))
    seen = {one["host"]: one for result in story.runs["mistaken"].of("own_access_info") for one in [result["seen"]]}
    assert seen["pg1"] == {"host": "pg1", "addresses": [SEEN], "roles": ["firebreak"], "tokens": []}
    for host in ("cache1", "app"):  # on a busy machine an answer may be too late, and is told to be missing then
        late = re.search(
            rf"{host} does not say how it sees.*?no\s+answer\s+in\s+time", story.runs["mistaken"].output, re.DOTALL
        )
        assert seen[host]["addresses"] == ["127.0.0.1"] or late, story.runs["mistaken"].output[:9000]
    assert seen["cf"]["tokens"]
    accessor = dumps.ask_vault(story.lab, "GET", "auth/token/lookup-self")["data"]["accessor"]
    assert seen["vault"]["tokens"] == [accessor]
    assert story.runs["mistaken"].code != 0
    for name in ("cf", "pg1", "cache1"):
        assert name in story.runs["mistaken"].open
    assert story.survives["mistaken"] == story.survives["before"]
    dump = story.dumps["mistaken"]
    assert "default_transaction_read_only" in dump["postgresql"]["configuration"]
    assert (
        dump["vault"]["secrets"]["secret/app/backend"]
        != story.dumps["before"]["vault"]["secrets"]["secret/app/backend"]
    )
    assert dump["edge"]["rulesets"] == story.dumps["before"]["edge"]["rulesets"]
    assert story.dumps["mistaken, dry"] == story.dumps["before"]


@pytest.mark.parametrize("playbook", ["data_breach"])
def test_as_another_site_nothing_is_done(story: Story, playbook: str) -> None:
    assert story.runs["production"].code != 0
    assert "FIREBREAK_LAB is set" in story.runs["production"].output
    assert story.dumps["production"] == story.dumps["before"]
    assert story.runs["other site"].code != 0
    assert "is of the site lab" in story.runs["other site"].output
    assert story.dumps["other site"] == story.dumps["verify_case"]


@pytest.mark.parametrize("playbook", ["data_breach", "open"])
def test_a_halt_stops_it(story: Story, playbook: str) -> None:
    name = "halted" if playbook == "data_breach" else playbook
    assert story.runs[name].code != 0 and "HALT stands in the case store" in story.runs[name].output
    assert story.dumps[name] == story.dumps["data_breach"]


def test_no_variable_of_another_site_reaches_a_run(story: Story) -> None:
    assert story.came == 0
    assert story.runs["data_breach"].code == 0
    # The proxies see what is sent: what the lab's own variables say is in it.
    assert story.lab.env["VAULT_TOKEN"].encode() in story.sent
    assert story.lab.hostvars("cache1")["firebreak_redis_password"].encode() in story.sent
    assert CANARY.partition("{")[0].encode() not in story.sent
    for done in story.runs.values():
        assert CANARY.partition("{")[0] not in done.output


def test_the_other_sites_server_counts_who_comes() -> None:
    elsewhere = Elsewhere()
    with socket.create_connection(("127.0.0.1", elsewhere.port), timeout=5) as visitor:
        assert visitor.recv(1) == b""
    assert elsewhere.came == 1
    elsewhere.close()
