# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The gate against a small server whose answers a test decides."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from ansible.module_utils.common.arg_spec import ModuleArgumentSpecValidator

from ansible_collections.firebreak.incident.plugins.module_utils._control import Context
from ansible_collections.firebreak.incident.plugins.module_utils._engine import execute
from ansible_collections.firebreak.incident.plugins.module_utils._task import spec_of
from ansible_collections.firebreak.incident.plugins.modules.health_gate import CONTROL

CANARY = "canary-password-9"
TOKEN = "canary-token-77"


class Site:
    """``answers`` maps a path to a function of the request that gives status and body."""

    def __init__(self) -> None:
        self.answers: dict[str, Callable[[Any], tuple[int, str]]] = {}
        self.seen: list[tuple[str, str, str]] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.content = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
                site.seen.append((self.command, self.path, self.client_address[0]))
                status, body = site.answers[self.path](self)
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", "/ok")
                self.send_header("Content-Length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())

            def do_POST(self) -> None:
                self.do_GET()

            def log_message(self, format: str, *words: Any) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    made.answers["/ok"] = lambda request: (200, '{"state": "HEALTHY", "empty": []}')
    yield made
    made.server.shutdown()
    made.server.server_close()


def gate(checks: list[dict[str, Any]], timeout: float = 0, **own: Any) -> dict[str, Any]:
    spec = spec_of(CONTROL)
    given = {"site": "lab", "checks": checks, "timeout": timeout, "interval": 0.05, "incident_id": "INC-2026-1120-001"}
    checked = ModuleArgumentSpecValidator(spec["argument_spec"]).validate({**given, **own})
    assert not checked.error_messages, checked.error_messages
    context = Context(check_mode=True)
    for value in checked._no_log_values:
        context.secret(value)
    return execute(CONTROL, checked.validated_parameters, context)


def one(site: Site, path: str = "/ok", **own: Any) -> dict[str, Any]:
    result = gate([{"name": "it", "url": site.url + path, **own}])
    assert result.get("failed", False) != result["passed"]
    assert result["changed"] is False
    return result["checks"][0]


def test_served_as_expected(site: Site) -> None:
    seen = one(site, expect={"contains": "HEALTHY", "equals": {"state": "HEALTHY"}, "present": ["state"]})
    assert (seen["passed"], seen["state"], seen["status"], seen["why"]) == (True, "served", 200, None)
    assert seen["milliseconds"] > 0


@pytest.mark.parametrize(
    ("own", "why"),
    [
        ({"expect_status": [204]}, "status 200"),
        ({"expect": {"contains": "DEGRADED"}}, "the text is not there"),
        ({"expect": {"present": ["empty"]}}, "field empty"),
        ({"expect": {"equals": {"state": "DEGRADED"}}}, "field state"),
        ({"expect": {"rising": "hits"}}, "metric hits is not there"),
        ({"then": {"url": "http://127.0.0.1:1/"}}, "field access_token"),
    ],
)
def test_what_is_not_as_expected_is_named(site: Site, own: dict[str, Any], why: str) -> None:
    seen = one(site, **own)
    assert not seen["passed"]
    assert why in seen["why"]


def test_a_door_is_closed_only_by_a_refusal(site: Site) -> None:
    for status, passed, state in ((401, True, "refused"), (403, True, "refused"), (200, False, "served"),
                                  (302, False, "served"), (500, False, "unknown"), (429, False, "unknown")):  # fmt: skip
        site.answers["/door"] = lambda request, status=status: (status, "")
        seen = one(site, "/door", must="refuse")
        assert (seen["passed"], seen["state"], seen["status"]) == (passed, state, status)
    site.answers["/door"] = lambda request: (503, "")
    assert one(site, "/door", must="refuse", expect_status=[503])["passed"]


def test_a_door_whose_service_is_down_is_not_closed() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/"
    door = {"name": "door", "url": url, "must": "refuse"}
    seen = gate([door])["checks"][0]
    assert (seen["passed"], seen["state"], seen["status"]) == (False, "unknown", None)
    assert "ConnectionRefusedError" in seen["why"]
    assert gate([{**door, "unreachable_is_refused": True}])["passed"]
    assert not gate([{**door, "must": "pass", "unreachable_is_refused": True}])["passed"]


def test_a_redirect_is_not_followed(site: Site) -> None:
    site.answers["/moved"] = lambda request: (302, "")
    seen = one(site, "/moved")
    assert (seen["passed"], seen["status"], seen["why"]) == (False, 302, "status 302")
    assert [path for _method, path, _source in site.seen] == ["/moved"]


def test_a_user_logs_in_and_nothing_of_it_is_told(site: Site) -> None:
    def login(request: Any) -> tuple[int, str]:
        right = json.loads(request.content) == {"email": "test@example.com", "password": CANARY}
        return (200, json.dumps({"access_token": TOKEN})) if right else (401, f"no: {request.content}")

    def me(request: Any) -> tuple[int, str]:
        right = request.headers["Authorization"] == f"Bearer {TOKEN}" and request.headers["X-Key"] is None
        return (200, TOKEN) if right else (401, "")

    site.answers |= {"/login": login, "/me": me}
    check = {"method": "POST", "body": {"email": "test@example.com", "password": CANARY}, "headers": {"X-Key": CANARY}}
    seen = one(site, "/login", **check, then={"url": f"{site.url}/me"})
    assert seen["passed"]
    for wrong in (
        {"must": "refuse", "body": {"password": CANARY + "x"}},
        {"body": json.dumps({"password": CANARY})},
        {"then": {"url": f"{site.url}/ok", "expect_status": [201]}},
    ):
        result = gate([{"name": "it", "url": f"{site.url}/login", **check, **wrong}])
        assert result["passed"] == (wrong.get("must") == "refuse")
        assert CANARY not in json.dumps(result)
        assert TOKEN not in json.dumps(result)


def test_a_metric_has_to_rise(site: Site) -> None:
    hits = iter(range(100))
    site.answers["/metrics"] = lambda request: (200, f'# hits 1\nhits{{path="/"}} {next(hits)}\nflat 7\n')
    assert one(site, "/metrics", expect={"rising": "hits"})["passed"]
    assert one(site, "/metrics", expect={"rising": "flat"})["why"] == "metric flat does not rise"


def test_all_checks_are_under_way_at_once_and_one_hanging_is_named(site: Site) -> None:
    def slow(request: Any) -> tuple[int, str]:
        time.sleep(0.3)
        return 200, ""

    def dripping(request: Any) -> tuple[int, str]:
        request.send_response(200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        for _byte in range(40):
            request.wfile.write(b"x")
            time.sleep(0.1)
        return 200, ""

    site.answers |= {"/slow": slow, "/drip": dripping}
    started = time.monotonic()
    assert gate([{"name": str(number), "url": f"{site.url}/slow"} for number in range(8)])["passed"]
    assert time.monotonic() - started < 1.5
    started = time.monotonic()
    checks = [{"name": "drip", "url": f"{site.url}/drip"}, {"name": "fine", "url": f"{site.url}/ok"}]
    result = gate(checks, request_timeout=0.2)
    assert time.monotonic() - started < 3
    assert [(check["name"], check["passed"]) for check in result["checks"]] == [("drip", False), ("fine", True)]
    assert "drip: " in result["msg"]


def test_it_waits_until_it_passes_and_a_red_round_restarts_the_watch(site: Site) -> None:
    started = time.monotonic()
    site.answers["/later"] = lambda request: (200 if time.monotonic() - started > 0.3 else 503, "")
    result = gate([{"name": "later", "url": f"{site.url}/later"}], timeout=10, for_seconds=0.3)
    assert result["passed"]
    assert result["seconds"] >= 0.6


def test_a_source_address_stands_for_a_person_on_the_lab(site: Site) -> None:
    assert one(site, source_address="127.66.0.9")["passed"]
    assert site.seen[-1][2] == "127.66.0.9"


@pytest.mark.parametrize(
    ("checks", "own", "told"),
    [
        ([], {}, "checks"),
        ([{"name": "a", "url": "http://127.0.0.1/"}, {"name": "a", "url": "http://127.0.0.1/"}], {}, "checks"),
        ([{"name": "a", "url": "http://127.0.0.1/", "source_address": "192.0.2.1"}], {}, "source_address"),
        ([{"name": "a", "url": "http://127.0.0.1/", "must": "refuse", "expect": {"contains": "x"}}], {}, "checks"),
        ([{"name": "a", "url": "http://127.0.0.1/"}], {"for_seconds": 9}, "timeout"),
        ([{"name": "a", "url": "http://127.0.0.1/"}], {"parallel": 0}, "parallel"),
        ([{"name": "a", "url": "http://app.example.com/"}], {}, "site"),
        ([{"name": "a", "url": "ftp://127.0.0.1/"}], {}, "http://"),
        ([{"name": "a", "url": "http://127.0.0.1/", "then": {"url": "http://app.example.com/"}}], {}, "site"),
    ],
)
def test_bad_input_is_refused(checks: list[dict[str, Any]], own: dict[str, Any], told: str) -> None:
    result = gate(checks, **own)
    assert result["failed"]
    assert told in result["msg"]


def test_the_environment_moves_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert one(site)["passed"]
