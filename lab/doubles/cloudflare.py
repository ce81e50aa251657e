# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A double of Cloudflare: its API, and its edge before an application.

    python -m lab.doubles.cloudflare --port 8001 --proxy-port 8002 --origin http://127.0.0.1:8003 \\
        --account-id <32 hex digits> --zone-id <32 hex digits>

The token of the API comes from LAB_CLOUDFLARE_TOKEN. Beside the API stand paths for tests:

=============  ======  =================================================================================
/lab/dump      GET     the whole state
/lab/log       GET     the requests so far (DELETE empties it)
/lab/faults    POST    a list of faults to come (GET what is left of them, DELETE none)
/lab/foreign   POST    {"rule": {...}, "when": "now" | "before_write"}: another writer
/lab/seed      POST    ?rules=40&entries=3: what others own
/lab/reset     POST    ?rules=3&entries=3: empty, then seeded; no faults; ?rules=-1 leaves it empty
/lab/settings  POST    {"plan": "free", "delay": 0.5}: the account's plan, seconds that a bulk operation takes
=============  ======  =================================================================================

A fault: {"kind": "drop" | "429" | "500" | "502" | "unsuccessful" | "slow", "on": "writes" | "reads" | "all", "nth": 1,
"times": 1, "path": "a regular expression", "after": true for "its effect comes first", "retry_after": "1", "seconds": 3}.
"""

from __future__ import annotations

import argparse
import ctypes
import http.server
import json
import os
import re
import signal
import socketserver
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

from lab.doubles.cloudflare_proxy import Proxy
from lab.doubles.cloudflare_state import ApiError, Edge

PREFIX = "/client/v4"
PR_SET_PDEATHSIG = 1
ID = "[0-9a-f]{32}"
Json = dict[str, Any]
Query = dict[str, str]
Answer = tuple[int, Any, Json]


class Fault:
    """One fault that waits for its request."""

    def __init__(self, given: Json) -> None:
        self.given = {"on": "writes", "nth": 1, "times": 1, "path": "", "after": False, **given}
        self.seen = 0

    def hits(self, method: str, path: str) -> bool:
        writes = method != "GET"
        if self.given["on"] not in ("all", "writes" if writes else "reads") or not re.search(self.given["path"], path):
            return False
        self.seen += 1
        return bool(self.given["nth"] <= self.seen < self.given["nth"] + self.given["times"])

    def spent(self) -> bool:
        return bool(self.seen >= self.given["nth"] + self.given["times"] - 1)


class Api:
    """Requests to answers; knows nothing of HTTP but methods, paths and statuses."""

    def __init__(self, edge: Edge, token: str) -> None:
        self.edge, self._token = edge, token
        self.faults: list[Fault] = []
        self.foreign: list[Json | None] = []
        self.log: list[Json] = []
        scope, items = "/(zones/[^/]+|accounts/[^/]+)/rulesets", "/accounts/[^/]+/rules/lists"
        self._routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("GET", "/user/tokens/verify", self._verify),
            ("GET", "/accounts/[^/]+/tokens/verify", self._verify),
            ("GET", "/zones/([^/]+)", self._zone),
            ("GET", scope, lambda _b, _q, s: ok(edge.rulesets(s))),
            ("POST", scope, lambda b, q, s: ok(edge.create_ruleset(s, b, dry(q)))),
            ("GET", f"{scope}/phases/([a-z0-9_]+)/entrypoint", lambda _b, _q, s, p: ok(edge.entry_point(s, p))),
            (
                "PUT",
                f"{scope}/phases/([a-z0-9_]+)/entrypoint",
                lambda b, q, s, p: ok(edge.put_entry_point(s, p, b, dry(q))),
            ),
            ("GET", f"{scope}/({ID})", lambda _b, _q, s, i: ok(edge.ruleset(s, i))),
            ("PUT", f"{scope}/({ID})", lambda b, q, s, i: ok(edge.put_ruleset(s, i, b, dry(q)))),
            ("DELETE", f"{scope}/({ID})", self._delete_ruleset),
            ("GET", f"{scope}/({ID})/versions", lambda _b, _q, s, i: ok(edge.versions(s, i))),
            ("GET", f"{scope}/({ID})/versions/([0-9]+)", lambda _b, _q, s, i, v: ok(edge.version(s, i, v))),
            ("POST", f"{scope}/({ID})/rules", lambda b, q, s, i: ok(edge.add_rule(s, i, b, dry(q)))),
            ("PATCH", f"{scope}/({ID})/rules/({ID})", lambda b, q, s, i, r: ok(edge.edit_rule(s, i, r, b, dry(q)))),
            ("DELETE", f"{scope}/({ID})/rules/({ID})", lambda _b, q, s, i, r: ok(edge.delete_rule(s, i, r, dry(q)))),
            ("GET", items, lambda _b, _q: ok(edge.lists())),
            ("POST", items, lambda b, _q: ok(edge.create_list(b))),
            ("GET", f"{items}/bulk_operations/({ID})", lambda _b, _q, i: ok(edge.operation(i))),
            ("GET", f"{items}/({ID})", lambda _b, _q, i: ok(edge.account_list(i))),
            ("PUT", f"{items}/({ID})", lambda b, _q, i: ok(edge.edit_list(i, b))),
            ("DELETE", f"{items}/({ID})", lambda _b, _q, i: ok(edge.delete_list(i))),
            ("GET", f"{items}/({ID})/items", self._items),
            ("POST", f"{items}/({ID})/items", lambda b, _q, i: ok(edge.add_items(i, b))),
            ("PUT", f"{items}/({ID})/items", lambda b, _q, i: ok(edge.add_items(i, b, True))),
            ("DELETE", f"{items}/({ID})/items", lambda b, _q, i: ok(edge.delete_items(i, b))),
            ("GET", f"{items}/({ID})/items/({ID})", lambda _b, _q, i, n: ok(edge.item(i, n))),
        ]

    def fault(self, method: str, path: str) -> Json:
        hit = next((fault.given for fault in self.faults if fault.hits(method, path)), {})
        self.faults = [fault for fault in self.faults if not fault.spent()]
        return hit

    def answer(self, method: str, path: str, query: Query, body: Any, authorization: str) -> Answer:
        """One request, whole, under the lock of the state."""
        with self.edge.lock:
            self.edge.settle()
            if method != "GET" and query.get("dry_run") != "true":
                for rule in self.foreign:
                    self.edge.add_foreign(rule)
                self.foreign = []
            try:
                self._authorize(path, authorization)
                return self._route(method, path, query, body)
            except ApiError as error:
                return error.status, None, {"errors": error.errors}

    def _authorize(self, path: str, authorization: str) -> None:
        scheme, _unused, token = authorization.partition(" ")
        if scheme != "Bearer" or not re.fullmatch(r"[A-Za-z0-9_.-]+", token):
            chain = [{"code": 6111, "message": "Invalid format for Authorization header"}]
            raise ApiError(400, 6003, "Invalid request headers", error_chain=chain)
        if token != self._token:
            if path.endswith("/tokens/verify"):
                raise ApiError(401, 1000, "Invalid API Token")
            raise ApiError(403, 10000, "Authentication error")
        kind, _unused, rest = path.lstrip("/").partition("/")
        given, ours = rest.partition("/")[0], {"zones": self.edge.zone, "accounts": self.edge.account}
        if re.fullmatch(ID, given) and given != ours.get(kind, given):
            raise ApiError(403, 10000, "Authentication error")

    def _route(self, method: str, path: str, query: Query, body: Any) -> Answer:
        kind, _unused, rest = path.lstrip("/").partition("/")
        if kind in ("zones", "accounts") and not re.fullmatch(ID, rest.partition("/")[0]):
            raise unroutable(path)
        allowed = False
        for verb, pattern, handler in self._routes:
            match = re.fullmatch(pattern, path)
            if match and verb == method:
                if method in ("POST", "PUT", "PATCH") and not isinstance(body, (dict, list)):
                    raise ApiError(400, 10026, "invalid JSON: the request has no body")
                return handler(body, query, *match.groups())
            allowed = allowed or match is not None
        if allowed:
            raise ApiError(405, 10000, "Method not allowed for this authentication scheme")
        raise unroutable(path)

    def _verify(self, _body: Any, _query: Query) -> Answer:
        message = {"code": 10000, "message": "This API Token is valid and active", "type": None}
        return 200, {"id": "0" * 32, "status": "active"}, {"messages": [message]}

    def _delete_ruleset(self, _body: Any, query: Query, scope: str, ruleset_id: str) -> Answer:
        self.edge.delete_ruleset(scope, ruleset_id, dry(query))
        return 204, None, {}

    def _zone(self, _body: Any, _query: Query, zone: str) -> Answer:
        account = {"id": self.edge.account, "name": "lab"}
        return ok({"id": zone, "name": "example.com", "status": "active", "type": "full", "account": account})

    def _items(self, _body: Any, query: Query, list_id: str) -> Answer:
        per_page = query.get("per_page", "25")
        if not re.fullmatch("[0-9]{1,3}", per_page) or not 1 <= int(per_page) <= 500:
            raise ApiError(400, 10026, "filters.api.invalid_per_page")
        items, info = self.edge.items(list_id, query.get("cursor", ""), int(per_page), query.get("search", ""))
        return 200, items, {"result_info": info}

    def control(self, method: str, path: str, query: Query, body: Any) -> Any:
        """The paths of the lab itself."""
        verb, numbers = (
            (method, path),
            {key: int(value) for key, value in query.items() if re.fullmatch(r"-?\d+", value)},
        )
        with self.edge.lock:
            if verb == ("GET", "/lab/dump"):
                return self.edge.dump()
            if path == "/lab/log":
                return self._logged(method)
            if path == "/lab/faults":
                return self._faults(method, body)
            if verb == ("POST", "/lab/foreign"):
                return self._another_writer(body or {})
            if verb == ("POST", "/lab/seed"):
                return self.edge.seed(numbers.get("rules", 3), numbers.get("entries", 3))
            if verb == ("POST", "/lab/reset"):
                return self._reset(numbers.get("rules", 3), numbers.get("entries", 3))
            if verb == ("POST", "/lab/settings"):
                self.edge.plan = body.get("plan", self.edge.plan)
                self.edge.delay = body.get("delay", self.edge.delay)
                return {"plan": self.edge.plan, "delay": self.edge.delay}
        raise KeyError(path)

    def _logged(self, method: str) -> list[Json]:
        logged = list(self.log)
        if method == "DELETE":
            self.log.clear()
        return logged

    def _faults(self, method: str, body: Any) -> list[Json]:
        if method == "POST":
            self.faults += [Fault(each) for each in body]
        elif method == "DELETE":
            self.faults = []
        return [fault.given for fault in self.faults]

    def _another_writer(self, body: Json) -> None:
        if body.get("when", "now") == "now":
            self.edge.add_foreign(body.get("rule"))
        else:
            self.foreign.append(body.get("rule"))

    def _reset(self, rules: int, entries: int) -> None:
        self.edge.reset()
        self.faults, self.foreign = [], []
        self.log.clear()
        if rules >= 0:
            self.edge.seed(rules, entries)


def ok(result: Any) -> Answer:
    return 200, result, {}


def dry(query: Query) -> bool:
    value = query.get("dry_run", "false")
    if value not in ("true", "false"):
        raise ApiError(400, 20104, "dry_run is neither true nor false")
    return value == "true"


def unroutable(path: str) -> ApiError:
    error = ApiError(404, 7003, f"Could not route to {PREFIX}{path}, perhaps your object identifier is invalid?")
    error.errors.append({"code": 7000, "message": "No route for that URI"})
    return error


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: Server

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        body = self._body()
        if url.path.startswith("/lab/"):
            self._control(url.path, query, body)
        elif url.path.startswith(PREFIX + "/"):
            self._api(url.path.removeprefix(PREFIX), query, body)
        else:
            self._send(404, b"", "text/html")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _body(self) -> Any:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            return json.loads(raw) if raw else None
        except ValueError:
            return None

    def _control(self, path: str, query: Query, body: Any) -> None:
        try:
            answer = self.server.api.control(self.command, path, query, body)
        except (KeyError, ApiError, TypeError, ValueError) as error:
            self._send(400, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode(), "application/json")
            return
        self._send(200, json.dumps(answer).encode(), "application/json")

    def _api(self, path: str, query: Query, body: Any) -> None:
        api = self.server.api
        with api.edge.lock:
            fault = api.fault(self.command, path)
            entry = {"method": self.command, "path": path, "query": query, "body": body, "fault": fault.get("kind")}
            api.log.append(entry)
        answer: Answer = (0, None, {})
        if not fault or fault["after"] or fault["kind"] == "slow":
            answer = api.answer(self.command, path, query, body, self.headers.get("Authorization", ""))
            entry["status"] = answer[0]
        self._spoil(fault, answer) if fault else self._envelope(*answer)

    def _spoil(self, fault: Json, answer: Answer) -> None:
        kind = fault["kind"]
        if kind == "drop":
            self.close_connection = True
        elif kind == "slow":
            time.sleep(fault.get("seconds", 3))
            self._envelope(*answer)
        elif kind == "429":
            wait = {"Retry-After": str(fault["retry_after"])} if fault.get("retry_after") else {}
            error = {"code": 971, "message": "Please wait and consider throttling your request speed"}
            self._envelope(429, None, {"errors": [error]}, wait)
        elif kind == "502":
            self._send(502, b"<html><body><h1>502 Bad Gateway</h1></body></html>", "text/html")
        elif kind == "unsuccessful":
            self._envelope(200, None, {"errors": [{"code": 10001, "message": "unable to do it"}]})
        else:
            self._envelope(500, None, {"errors": [{"code": 10002, "message": "internal error"}]})

    def _envelope(self, status: int, result: Any, more: Json, headers: dict[str, str] | None = None) -> None:
        limits = {
            "Ratelimit": '"default";r=1100;t=240',
            "Ratelimit-Policy": '"default";q=1200;w=300',
            **(headers or {}),
        }
        if status == 204:
            self._send(204, b"", "application/json", limits)
            return
        envelope = {"result": result, "success": "errors" not in more, "errors": [], "messages": [], **more}
        self._send(status, json.dumps(envelope).encode(), "application/json", limits)

    def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: Any) -> None:
        pass


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, api: Api) -> None:
        self.api = api
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, *_args: Any) -> None:
        """A client that went away is no news."""


def die_with_parent(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)


def main() -> None:
    parent = os.getppid()
    parser = argparse.ArgumentParser(prog="lab.doubles.cloudflare")
    for option, kind in (
        ("--port", int),
        ("--proxy-port", int),
        ("--origin", str),
        ("--account-id", str),
        ("--zone-id", str),
    ):
        parser.add_argument(option, type=kind, required=True)
    parser.add_argument("--plan", choices=("free", "pro", "business", "enterprise"), default="enterprise")
    parser.add_argument("--rules", type=int, default=3, help="rules of others at start")
    given = parser.parse_args()
    # Blocked in every thread and awaited in this one: else a thread that runs no Python may take it, and nothing happens.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    die_with_parent(parent)
    edge = Edge(given.account_id, given.zone_id, given.plan)
    edge.seed(given.rules, 3)
    servers = [
        Server(given.port, Api(edge, os.environ["LAB_CLOUDFLARE_TOKEN"])),
        Proxy(given.proxy_port, edge, given.origin),
    ]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print("ready", flush=True)
    signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    main()
