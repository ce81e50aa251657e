# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""Show which value of a secret a consumer works with, without showing the value."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import hashlib
import hmac
import json
import secrets
import urllib.parse
from typing import Any

from ._errors import Unproven
from ._http import Answer, NoAnswer, origin, request, retry_after

TOKEN_SECONDS = 60
ANSWER_SECONDS = 5.0
SHORTEST_SECONDS = 1.0
# A consumer whose own database has only just come back says 503 for a moment.
UNAVAILABLE_SECONDS = 5.0
UNAVAILABLE_PAUSE = 0.5
SPEC: dict[str, Any] = {
    "field": {"type": "str", "required": True},
    "kind": {"type": "str", "choices": ["jwt", "webhook", "challenge"], "required": True},
    "url": {"type": "str", "required": True},
    "name": {"type": "str"},
    "claims": {"type": "dict"},
    "body": {"type": "str", "default": "{}"},
    "header": {"type": "str", "default": "X-Signature"},
    "prefix": {"type": "str", "default": ""},
}


def prove_rotation(client: Any, proof: dict[str, Any], old: str, new: str) -> None:
    """The new value is accepted and the old one is refused, one attempt each: more could lock an account."""
    check = {"jwt": _jwt, "webhook": _webhook, "challenge": _challenge}[proof["kind"]]
    check(client, proof, old, new)


def answers_with(client: Any, url: str, name: str, value: str) -> bool:
    """Whether the consumer's answer to a fresh nonce is the HMAC of this value; Unproven where it gives no HMAC."""
    return _matches(_ask(client, url, name), value)


def _matches(asked: tuple[bytes, str], value: str) -> bool:
    nonce, answer = asked
    return hmac.compare_digest(answer.encode(), hmac.new(value.encode(), nonce, hashlib.sha256).hexdigest().encode())


def _ask(client: Any, url: str, name: str) -> tuple[bytes, str]:
    nonce = secrets.token_bytes(32)
    query = urllib.parse.urlencode({"name": name, "nonce": nonce.hex()})
    answer = _send(client, "GET", f"{url}{'&' if '?' in url else '?'}{query}", f"the challenge for {name}")
    try:
        digest = json.loads(answer.body)["hmac"] if answer.status == 200 else None
    except (ValueError, KeyError, TypeError):
        digest = None
    if not isinstance(digest, str):
        raise Unproven(f"{origin(url)} did not answer the challenge for {name} (status {answer.status})", effect="none")
    return nonce, digest.lower()


def _send(
    client: Any, method: str, url: str, what: str, headers: dict[str, str] | None = None, body: bytes | None = None
) -> Answer:
    """One attempt. A limit of requests, or no service, was no attempt yet: it is waited for, where that ends in time."""
    until = client.clock() + UNAVAILABLE_SECONDS
    while True:
        try:
            answer = request(method, url, headers, body, min(ANSWER_SECONDS, max(client.left(), SHORTEST_SECONDS)))
        except NoAnswer as error:
            raise Unproven(f"{what} could not be proven: {error.msg}", effect="none") from None
        if answer.status not in (429, 503):
            return answer
        wait = retry_after(answer.headers.get("Retry-After"), client.clock())
        if answer.status == 503:
            wait = UNAVAILABLE_PAUSE if wait is None else wait
            if wait >= min(until - client.clock(), client.left()):
                return answer
        elif wait is None or wait >= client.left():
            asks = "" if wait is None else f" and asks to wait {wait:.0f} s"
            raise Unproven(f"{what} could not be proven: {origin(url)} limits requests (429){asks}", effect="none")
        client.sleep(wait)


def _challenge(client: Any, proof: dict[str, Any], old: str, new: str) -> None:
    name = proof.get("name") or proof["field"]
    asked = _ask(client, proof["url"], name)
    if _matches(asked, old):
        raise Unproven(f"{origin(proof['url'])} still works with the old {name}", effect="none")
    if not _matches(asked, new):
        raise Unproven(f"{origin(proof['url'])} works with neither the new nor the old {name}", effect="none")


def _jwt(client: Any, proof: dict[str, Any], old: str, new: str) -> None:
    ahead = 0.0

    def present(value: str) -> Answer:
        token = signed_token(proof.get("claims") or {"sub": "firebreak"}, value, client.clock() + ahead)
        headers = {"Authorization": f"Bearer {token}"}
        return _send(client, "GET", proof["url"], f"{proof['field']} as a token's key", headers)

    def attempt(value: str) -> int:
        nonlocal ahead
        answer = present(value)
        theirs = _ahead(answer, client.clock())
        if answer.status == 401 and abs(theirs - ahead) > TOKEN_SECONDS / 2:
            ahead = theirs  # refused for its time: it is the server's clock that counts
            answer = present(value)
        return answer.status

    _refused_and_accepted(proof, "token", attempt, old, new)


def _ahead(answer: Answer, now: float) -> float:
    """How far the server's clock is ahead of ours, as far as it says."""
    date = {name.lower(): value for name, value in answer.headers.items()}.get("date", "")
    with contextlib.suppress(ValueError):
        return email.utils.parsedate_to_datetime(date).timestamp() - now
    return 0.0


def _webhook(client: Any, proof: dict[str, Any], old: str, new: str) -> None:
    body = (proof.get("body") or "{}").encode()

    def attempt(value: str) -> int:
        signature = (proof.get("prefix") or "") + hmac.new(value.encode(), body, hashlib.sha256).hexdigest()
        headers = {proof.get("header") or "X-Signature": signature, "Content-Type": "application/json"}
        return _send(client, "POST", proof["url"], f"{proof['field']} as a webhook's key", headers, body).status

    _refused_and_accepted(proof, "webhook", attempt, old, new)


def _refused_and_accepted(proof: dict[str, Any], what: str, attempt: Any, old: str, new: str) -> None:
    """A door that refuses everybody proves nothing, so the new value goes first."""
    where = origin(proof["url"])
    status = attempt(new)
    if not 200 <= status < 300:
        raise Unproven(f"{where} does not accept a {what} of the new {proof['field']} (status {status})", effect="none")
    status = attempt(old)
    if status != 401:
        raise Unproven(
            f"{where} does not refuse a {what} of the old {proof['field']} with 401 (status {status})", effect="none"
        )


def signed_token(claims: dict[str, Any], key: str, now: float) -> str:
    """A JSON Web Token, HS256, good for a minute."""
    times = {"iat": int(now), "exp": int(now) + TOKEN_SECONDS}
    signed = b".".join(_part(each) for each in ({"alg": "HS256", "typ": "JWT"}, {**times, **claims}))
    mac = hmac.new(key.encode(), signed, hashlib.sha256).digest()
    return (signed + b"." + _base64url(mac)).decode()


def _part(content: dict[str, Any]) -> bytes:
    return _base64url(json.dumps(content, separators=(",", ":")).encode())


def _base64url(content: bytes) -> bytes:
    return base64.urlsafe_b64encode(content).rstrip(b"=")
