# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""Cloudflare, through the generic calls of its SDK.

The SDK's own methods for rulesets return what no type describes, and its retries would repeat a write. Only its request
builder, authentication and exceptions are used.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import ssl
import urllib.parse
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from ._control import Context
from ._deps import require
from ._errors import FirebreakError, Refused
from ._http import retry_after, tls_failure
from ._redact import Held

SPEC: dict[str, Any] = {
    "cloudflare_url": {"type": "str", "default": "https://api.cloudflare.com/client/v4"},
    "cloudflare_token": {"type": "str", "no_log": True},
    "cloudflare_account_id": {"type": "str"},
    "cloudflare_zone_id": {"type": "str"},
}

PHASE = "http_request_firewall_custom"
NO_ENTRY_POINT = 10003
LIST_IN_USE = 10031
CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 20.0
# How long a client that got no deadline from the engine goes on reading or waiting.
PATIENCE = 25.0
SHORTEST_SECONDS = 1.0  # also after the deadline: an unclear write is looked up
READS = 3
PAGE = 500
PASSES = 6  # over a list that changes while it is read
# The service documents no maximum for one request. Others send whole lists at once.
BATCH = 5000
SETTLE_SECONDS = 4.0
# What the SDK takes from the environment by itself, before what it is told.
_STRAY = ("API_KEY", "EMAIL", "API_USER_SERVICE_KEY", "BASE_URL", "CUSTOM_HEADERS")

_HINTS = {
    400: "it does not accept the request",
    401: "cloudflare_token is not valid",
    403: "cloudflare_token is not valid, lacks a permission, or belongs to another account than cloudflare_account_id or "
    "cloudflare_zone_id",
    404: "there is nothing at this place",
    429: "it limits requests",
}

Json = dict[str, Any]

_cloudflare: ModuleType | None = None
_httpx: ModuleType | None = None
_tls: ssl.SSLContext | None = None


class CloudflareError(FirebreakError):
    """An answer that is not a success; ``status`` is 0 where none came."""

    def __init__(self, msg: str, status: int, codes: tuple[int, ...], effect: str, wait: str = "") -> None:
        super().__init__(msg, effect=effect)
        self.status = status
        self.codes = codes
        self.wait = wait


def preload() -> None:
    global _cloudflare, _httpx, _tls
    if _cloudflare is None:
        module = require("cloudflare", "cloudflare", "5.7.0")
        _httpx = require("httpx", "httpx", "0.25.0")
        _tls = ssl.create_default_context()
        _transport().close()  # its first use imports more
        _cloudflare = module


def addresses(params: Json) -> list[str]:
    return [params["cloudflare_url"]]


def connect(params: Json, context: Context) -> Client:
    preload()
    if urllib.parse.urlsplit(params["cloudflare_url"]).scheme not in ("http", "https"):
        raise Refused("cloudflare_url must begin with http:// or https://")
    token = params.get("cloudflare_token") or context.env.get("CLOUDFLARE_API_TOKEN")
    if not token:
        raise Refused("cloudflare_token is missing: set it, or CLOUDFLARE_API_TOKEN in the environment of the task")
    context.secret(token)
    token = context.secret(token.strip())
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise Refused("cloudflare_token holds characters that no token has")
    return Client(params, token, context)


def _transport() -> Any:
    """No proxy, no netrc, no certificates from the environment; a redirect would take the token along."""
    return _httpx.Client(verify=_tls, trust_env=False, follow_redirects=False)  # type: ignore[union-attr]


@contextlib.contextmanager
def _clean_environment() -> Iterator[None]:
    """The SDK prefers an e-mail address or a base URL of the environment to the token and address that it is given."""
    names = [f"CLOUDFLARE_{name}" for name in _STRAY]
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


class Client:
    """A few calls in the service's own words; not found is None."""

    def __init__(self, params: Json, token: str, context: Context) -> None:
        self.held = Held()
        self._params = params
        self._context = context
        self._begun = context.clock()
        headers = {"X-Correlation-Id": context.correlation} if context.correlation else {}
        with _clean_environment():
            self._sdk = _cloudflare.Cloudflare(  # type: ignore[union-attr]
                api_token=token,
                base_url=params["cloudflare_url"],
                max_retries=0,
                default_headers=headers,
                http_client=_transport(),
            )

    def close(self) -> None:
        self._sdk.close()

    # Requests

    def _send(self, method: str, where: str, action: str, body: Any, query: Json, key: str | None) -> Json:
        """One request, one envelope. Its result is an object with ``key``, or without one a list."""
        more = {} if method == "get" else {"body": body}
        if method != "get":
            self._context.still_ours()
        wait = max(self._give_up - self._context.clock(), SHORTEST_SECONDS)
        timeout = _httpx.Timeout(min(ANSWER_SECONDS, wait), connect=min(CONNECT_SECONDS, wait))  # type: ignore[union-attr]
        options = {"params": query, "timeout": timeout}
        try:
            # The plain response: the SDK fails on an answer without a body and hides what is in one without success.
            answer = getattr(self._sdk, method)(where, cast_to=_httpx.Response, options=options, **more)  # type: ignore[union-attr]
        except _cloudflare.APIStatusError as failure:  # type: ignore[union-attr]
            raise _refusal(action, failure) from None
        except _cloudflare.CloudflareError as failure:  # type: ignore[union-attr]
            never = isinstance(failure.__cause__, (_httpx.ConnectError, _httpx.ConnectTimeout))  # type: ignore[union-attr]
            reason = tls_failure(failure) or type(failure.__cause__ or failure).__name__
            msg = f"{action}: cloudflare_url gave no answer ({reason})"
            raise CloudflareError(msg, 0, (), "none" if never else "unknown") from None
        status, envelope = answer.status_code, _json(answer.content)
        if status != 204 and envelope.get("success") is not True:
            codes = _codes(envelope)
            msg = f"{action}: Cloudflare answered {status}, but without success{_listed(codes)}"
            raise CloudflareError(msg, status, codes, "unknown")
        result = envelope.get("result")
        fits = isinstance(result, dict) and key in result if key else isinstance(result, list | None)
        if status != 204 and not fits and not query.get("dry_run"):
            msg = f"{action}: what answered {status} does not speak as Cloudflare does: see cloudflare_url"
            raise CloudflareError(msg, status, (), "unknown")
        return envelope

    def _read(self, where: str, action: str, query: Json | None = None, key: str | None = None) -> Json:
        attempt = 1
        while True:
            try:
                return self._patiently("get", where, action, None, query or {}, key)
            except CloudflareError as error:
                if attempt == READS or not (error.status in (0, 200) or error.status >= 500):
                    raise
                self._pause(0.2 * attempt, error)
                attempt += 1

    def _patiently(self, method: str, where: str, action: str, body: Any, query: Json, key: str | None) -> Json:
        """Repeat only what was refused before it had an effect: a limit of requests, another operation under way."""
        pause = 0.25
        while True:
            try:
                return self._send(method, where, action, body, query, key)
            except CloudflareError as error:
                if error.status != 429:
                    raise
                asked = retry_after(error.wait, self._context.clock())
                self._pause(pause if asked is None else asked, error)
                pause *= 2

    def _pause(self, seconds: float, error: CloudflareError) -> None:
        """Wait, where that ends before the deadline."""
        if self._context.clock() + seconds >= self._give_up:
            if error.status == 429:
                error.msg += f"; it asks to wait {seconds:.0f} s"
                error.args = (error.msg,)
            raise error
        self._context.sleep(seconds)

    @property
    def _give_up(self) -> float:
        return self._context.deadline or self._begun + PATIENCE

    def _write(
        self,
        method: str,
        where: str,
        action: str,
        body: Any = None,
        dry: bool = False,
        done: Callable[[], bool] | None = None,
        key: str = "id",
    ) -> Any:
        """Sent once. After an unclear answer ``done`` looks whether the effect is there."""
        query = {"dry_run": "true"} if dry else {}
        try:
            result = self._patiently(method, where, action, body, query, key).get("result")
            if not dry:
                self._context.effective()
            return result
        except CloudflareError as error:
            if error.effect == "none" or done is None or not self._turned_out(done):
                raise
            return None

    def _turned_out(self, done: Callable[[], bool]) -> bool:
        now = self._context.clock()
        give_up = min(now + SETTLE_SECONDS, max(self._give_up, now + SHORTEST_SECONDS))
        while True:
            with contextlib.suppress(CloudflareError):
                if done():
                    return True
            if self._context.clock() >= give_up:
                return False
            self._context.sleep(0.5)

    def _scope(self, option: str, kind: str) -> str:
        value = self._params.get(option) or ""
        if not re.fullmatch("[0-9a-f]{32}", value):
            raise Refused(f"{option} must be set to 32 hexadecimal digits (the dashboard shows it)")
        return f"/{kind}/{value}"

    def identity(self) -> dict[str, list[str]]:
        """The token's id: the API tells no address. A token of the account is verified at another place than a person's."""
        where = "/user"
        if self._sdk.api_token.startswith("cfat_"):
            where = self._scope("cloudflare_account_id", "accounts")
        seen = self._read(f"{where}/tokens/verify", "verify the token", key="id")["result"]
        return {"tokens": [seen["id"]]}

    # Custom rules of a zone

    @property
    def _rulesets(self) -> str:
        return self._scope("cloudflare_zone_id", "zones") + "/rulesets"

    def entry_point(self) -> Json | None:
        """The zone's ruleset of custom rules. Only this one code says that there is none; all else is a failure."""
        try:
            answer = self._read(f"{self._rulesets}/phases/{PHASE}/entrypoint", "read the custom rules", key="id")
        except CloudflareError as error:
            if error.status == 404 and NO_ENTRY_POINT in error.codes:
                return None
            raise
        ruleset: Json = answer["result"]
        return {**ruleset, "rules": ruleset.get("rules") or []}

    def rule(self, ref: str) -> Json | None:
        rules = (self.entry_point() or {"rules": []})["rules"]
        return next((rule for rule in rules if rule.get("ref") == ref), None)

    def create_entry_point(self, description: str, rule: Json, dry: bool = False) -> None:
        body = {"name": "default", "kind": "zone", "phase": PHASE, "description": description, "rules": [rule]}
        self._write("post", self._rulesets, "create the custom rules", body, dry, lambda: self._is_there(rule))

    def add_rule(self, ruleset: str, rule: Json, position: Json, dry: bool = False) -> None:
        where, body = f"{self._rulesets}/{ruleset}/rules", {**rule, "position": position}
        self._write("post", where, "add the rule", body, dry, lambda: self._is_there(rule))

    def edit_rule(self, ruleset: str, rule_id: str, rule: Json, dry: bool = False) -> None:
        where = f"{self._rulesets}/{ruleset}/rules/{rule_id}"
        self._write("patch", where, "change the rule", rule, dry, lambda: self._is_there(rule))

    def delete_rule(self, ruleset: str, rule_id: str, ref: str, dry: bool = False) -> None:
        where = f"{self._rulesets}/{ruleset}/rules/{rule_id}"
        self._write("delete", where, "delete the rule", None, dry, lambda: self.rule(ref) is None)

    def delete_entry_point(self, ruleset: str) -> None:
        action = "delete the empty ruleset"
        self._write("delete", f"{self._rulesets}/{ruleset}", action, done=lambda: self.entry_point() is None)

    def _is_there(self, rule: Json) -> bool:
        return rule.items() <= (self.rule(rule["ref"]) or {}).items()

    # Lists of an account

    @property
    def _lists(self) -> str:
        return self._scope("cloudflare_account_id", "accounts") + "/rules/lists"

    def lists(self) -> list[Json]:
        return self._read(self._lists, "read the account's lists")["result"] or []

    def list_names(self) -> set[str] | None:
        """None where the task does not say whose."""
        return {each["name"] for each in self.lists()} if self._params.get("cloudflare_account_id") else None

    def find_list(self, name: str) -> Json | None:
        return next((each for each in self.lists() if each["name"] == name), None)

    def create_list(self, name: str, description: str) -> None:
        body = {"name": name, "kind": "ip", "description": description}
        self._write("post", self._lists, f"create the list {name}", body, done=lambda: self.find_list(name) is not None)

    def delete_list(self, list_id: str, name: str) -> None:
        try:
            action = f"delete the list {name}"
            self._write("delete", f"{self._lists}/{list_id}", action, done=lambda: self.find_list(name) is None)
        except CloudflareError as error:
            if LIST_IN_USE not in error.codes:
                raise
            msg = f"the list {name} cannot be deleted while a rule uses it: release that rule first"
            raise CloudflareError(msg, error.status, error.codes, "none") from None

    def listed(self, name: str) -> tuple[Json | None, list[Json]]:
        """A list and its entries. Where another run deletes it between the two requests, it is looked for again."""
        known = self.find_list(name)
        while known is not None:
            try:
                return known, self.items(known["id"])
            except CloudflareError as error:
                again = self.find_list(name)
                if error.status != 404 or (again or {}).get("id") == known["id"]:
                    raise
                known = again
        return None, []

    def items(self, list_id: str) -> list[Json]:
        """All entries. Pages of a list that somebody changes meanwhile leave some out: then they are read again."""
        found, cursor = self._page(list_id, "")
        if not cursor:
            return found
        before = self._state(list_id)
        for _pass in range(PASSES):
            found, cursor = self._page(list_id, "")
            while cursor:
                more, cursor = self._page(list_id, cursor)
                found += more
            after = self._state(list_id)
            if after == before:
                return found
            before = after
        msg = "read the list's entries: somebody else keeps changing the list; run the same command again"
        raise CloudflareError(msg, 200, (), "none")

    def _page(self, list_id: str, cursor: str) -> tuple[list[Json], str]:
        query: Json = {"per_page": PAGE, **({"cursor": cursor} if cursor else {})}
        answer = self._read(f"{self._lists}/{list_id}/items", "read the list's entries", query)
        found: list[Json] = answer["result"] or []
        after = ((answer.get("result_info") or {}).get("cursors") or {}).get("after")
        return found, after if found and after else ""

    def _state(self, list_id: str) -> tuple[Any, Any]:
        """What changes when an entry does."""
        known = self._read(f"{self._lists}/{list_id}", "read the list", key="id")["result"]
        return known.get("modified_on"), known.get("num_items")

    def add_items(self, list_id: str, items: list[Json]) -> None:
        """Replaces an entry of the same value: give only what is not there."""
        for start in range(0, len(items), BATCH):
            part = items[start : start + BATCH]
            self._bulk("post", list_id, "add entries to the list", part, lambda part=part: self._holds(list_id, part))  # type: ignore[misc]

    def delete_items(self, list_id: str, ids: list[str]) -> None:
        for start in range(0, len(ids), BATCH):
            part = set(ids[start : start + BATCH])
            body = {"items": [{"id": each} for each in sorted(part)]}
            action = "delete entries of the list"
            self._bulk("delete", list_id, action, body, lambda part=part: not part & self._ids(list_id))  # type: ignore[misc]

    def _ids(self, list_id: str) -> set[str]:
        return {item["id"] for item in self.items(list_id)}

    def _holds(self, list_id: str, items: list[Json]) -> bool:
        return {item["ip"] for item in items} <= {item.get("ip") for item in self.items(list_id)}

    def _bulk(self, method: str, list_id: str, action: str, body: Any, done: Callable[[], bool]) -> None:
        """The service takes the request, and does it later: follow the operation to its end."""
        answer = self._write(method, f"{self._lists}/{list_id}/items", action, body, done=done, key="operation_id")
        if answer is None:
            return
        where = f"{self._lists}/bulk_operations/{answer['operation_id']}"
        pause = 0.05
        while True:
            self._pause(pause, CloudflareError(f"{action}: the operation has not ended yet", 200, (), "unknown"))
            state = self._read(where, f"{action}: follow the operation", key="status")["result"]
            if state["status"] == "completed":
                return
            if state["status"] == "failed":
                raise _failed(action, str(state.get("error", "")))
            pause = min(pause * 3, 2.0)


def _failed(action: str, reason: str) -> CloudflareError:
    full = "maximum" in reason.lower() or "limit" in reason.lower()
    why = (
        "the account's lists hold as many entries as its plan allows (10,000 below Enterprise); remove entries, or block "
        "wider ranges"
        if full
        else "the operation failed"
    )
    return CloudflareError(f"{action}: {why}", 200, (), "none" if full else "unknown")


def _json(content: bytes) -> Json:
    """The envelope; empty where there is none."""
    try:
        body = json.loads(content)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _codes(body: Any) -> tuple[int, ...]:
    errors = body.get("errors") if isinstance(body, dict) else None
    listed = errors if isinstance(errors, list) else []
    return tuple(each["code"] for each in listed if isinstance(each, dict) and isinstance(each.get("code"), int))


def _listed(codes: tuple[int, ...]) -> str:
    return f", code {', '.join(str(code) for code in codes)}" if codes else ""


def _refusal(action: str, failure: Any) -> CloudflareError:
    """In our words: the service's text repeats what it was sent. A place in an expression is numbers only."""
    status, codes = failure.status_code, _codes(failure.body)
    hint = (
        "it redirects; cloudflare_url must name the API itself"
        if 300 <= status < 400
        else _HINTS.get(status, "it failed")
    )
    place = re.search(r"Filter parsing error \((\d+):(\d+)\)", str(failure.body)) if status == 400 else None
    if place:
        hint = f"the expression is wrong at line {place[1]}, character {place[2]}"
    msg = f"{action}: Cloudflare answered {status}{_listed(codes)}: {hint}"
    # A redirect comes from whatever stands between, perhaps after it was carried out.
    effect = "none" if 400 <= status < 500 and status != 408 else "unknown"
    return CloudflareError(msg, status, codes, effect, failure.response.headers.get("retry-after", ""))
