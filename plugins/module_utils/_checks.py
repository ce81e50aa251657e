# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""A gate's checks over HTTP: what is asked, and what an answer shows. Only verdicts leave; bodies and headers do not."""

from __future__ import annotations

import json
import re
from typing import Any

from . import _http
from ._errors import Refused
from ._guards import is_loopback
from ._http import Answer, NoAnswer

SERVED = [200]
REFUSED = [401, 403]
RISE_SECONDS = 1.0
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{.*\})?\s+(\S+)", re.MULTILINE)


def probe(client: _http.Client, params: dict[str, Any]) -> dict[str, Any]:
    """One round of all checks at once."""
    checks = params["checks"]
    _refuse_bad(params, checks)
    rounds = -(-len(checks) // params["parallel"])
    patience = rounds * (3 * params["request_timeout"] + RISE_SECONDS)
    seen = _http.in_parallel(lambda check: _tried(client, params, check), checks, params["parallel"], patience)
    results = [
        result or _result(check, "unknown", None, patience, "no answer in time")
        for check, result in zip(checks, seen, strict=True)
    ]
    return {"passed": all(result["passed"] for result in results), "checks": results}


def _refuse_bad(params: dict[str, Any], checks: list[dict[str, Any]]) -> None:
    names = [check["name"] for check in checks]
    if not checks or len({*names}) != len(names):
        raise Refused("checks: there must be at least one, each with a name of its own")
    if params["parallel"] < 1 or params["request_timeout"] <= 0 or params["interval"] < 0:
        raise Refused("parallel, request_timeout, interval: these must be positive")
    if params["timeout"] < params["for_seconds"]:
        raise Refused("timeout: it must not be shorter than for_seconds")
    for check in checks:
        if check["must"] == "refuse" and (check.get("expect") or check.get("then")):
            raise Refused("checks: expect and then look at an answer that was served; must=refuse has none")
        source = check.get("source_address")
        if source and (params.get("site") != "lab" or not is_loopback(source)):
            raise Refused("source_address: a loopback address, on the lab only")


def _tried(client: _http.Client, params: dict[str, Any], check: dict[str, Any]) -> dict[str, Any]:
    spent = 0.0

    def ask(url: str, method: str, headers: dict[str, str], body: bytes | None) -> Answer:
        nonlocal spent
        answer = client.request(
            method,
            url,
            headers=headers,
            body=body,
            timeout=params["request_timeout"],
            ca_cert=params.get("ca_cert"),
            source=check.get("source_address"),
        )
        spent += answer.seconds
        return answer

    def first() -> Answer:
        headers, body = _content(client, check)
        return ask(check["url"], check["method"], headers, body)

    status = None
    try:
        answer = first()
        status = answer.status
        if check["must"] == "refuse":
            return _result(check, *_refusal(check, status), spent)
        why = _shortcoming(check, answer)
        if not why and (check.get("expect") or {}).get("rising"):
            client.sleep(RISE_SECONDS)
            why = _not_risen(check["expect"]["rising"], answer, first())
        if not why and check.get("then"):
            why = _second(client, check["then"], answer, ask)
        return _result(check, "served" if status in _statuses(check) else "unknown", status, spent, why)
    except NoAnswer as failure:
        gone = failure.reason == "ConnectionRefusedError" and check["unreachable_is_refused"]
        if gone and check["must"] == "refuse":
            return _result(check, "refused", None, spent, None)
        return _result(check, "unknown", status, spent, f"no answer ({failure.reason})")


def _content(client: _http.Client, check: dict[str, Any]) -> tuple[dict[str, str], bytes | None]:
    headers = {str(name): str(value) for name, value in (check.get("headers") or {}).items()}
    for value in headers.values():
        client.secret(value)
    body = check.get("body")
    if body is None:
        return headers, None
    if isinstance(body, str):
        return headers, body.encode()
    return {"Content-Type": "application/json", **headers}, json.dumps(body).encode()


def _refusal(check: dict[str, Any], status: int) -> tuple[str, int]:
    if status in _statuses(check):
        return "refused", status
    return ("served" if status < 400 else "unknown"), status


def _statuses(check: dict[str, Any]) -> list[int]:
    return check.get("expect_status") or (REFUSED if check["must"] == "refuse" else SERVED)


def _result(
    check: dict[str, Any], state: str, status: int | None, seconds: float, why: str | None = None
) -> dict[str, Any]:
    wanted = "refused" if check["must"] == "refuse" else "served"
    if not why and state != wanted:
        why = f"status {status}: the door is open" if state == "served" else f"status {status} is no refusal"
    return {
        "name": check["name"],
        "passed": state == wanted and not why,
        "state": state,
        "status": status,
        "milliseconds": round(seconds * 1000, 1),
        "expected": _expected(check),
        "why": f"unknown: {why}" if why and state == "unknown" and wanted == "refused" else why,
    }


def _expected(check: dict[str, Any]) -> str:
    words = [f"{check['must']}: status {' or '.join(map(str, _statuses(check)))}"]
    expect = check.get("expect") or {}
    words += [f"a text of {len(expect['contains'])} characters"] if expect.get("contains") else []
    words += [f"field {name}" for name in [*(expect.get("present") or []), *(expect.get("equals") or {})]]
    words += [f"{expect['rising']} rising"] if expect.get("rising") else []
    words += ["a usable token"] if check.get("then") else []
    return ", ".join(words)


def _shortcoming(check: dict[str, Any], answer: Answer) -> str | None:
    """What a served answer lacks."""
    if answer.status not in _statuses(check):
        return f"status {answer.status}"
    expect = check.get("expect") or {}
    if expect.get("contains") and expect["contains"].encode() not in answer.body:
        return "the text is not there"
    for name in expect.get("present") or []:
        if field(answer.body, name) in (None, "", [], {}):
            return f"field {name} is not there, or empty"
    for name, value in (expect.get("equals") or {}).items():
        if field(answer.body, name) != value:
            return f"field {name} has another value"
    return None


def _second(client: _http.Client, then: dict[str, Any], answer: Answer, ask: Any) -> str | None:
    token = field(answer.body, then["field"])
    if not token or not isinstance(token, str):
        return f"field {then['field']} is not there, or empty"
    client.secret(token)
    status = ask(then["url"], "GET", {"Authorization": f"Bearer {token}"}, None).status
    return None if status in then["expect_status"] else f"the token is not accepted, status {status}"


def _not_risen(name: str, one: Answer, other: Answer) -> str | None:
    earlier, later = metric(one.body, name), metric(other.body, name)
    if earlier is None or later is None:
        return f"metric {name} is not there"
    return None if later > earlier else f"metric {name} does not rise"


def field(body: bytes, name: str) -> Any:
    """A field of a JSON body, None when it is not there."""
    try:
        value = json.loads(body)
    except ValueError:
        return None
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def metric(body: bytes, name: str) -> float | None:
    """The sum of a metric over its labels, None when there is no sample of it. A comment is no sample."""
    values = [value for found, value in SAMPLE.findall(body.decode("utf-8", "replace")) if found == name]
    try:
        return sum(map(float, values)) if values else None
    except ValueError:
        return None
