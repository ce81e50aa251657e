# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""One HTTP request for a proof: no redirects, no proxies, no netrc, nothing from the environment, nothing printed."""

from __future__ import annotations

import dataclasses
import email.utils
import http.client
import queue
import re
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

from ._control import Context
from ._errors import FirebreakError, Refused

LONGEST_BODY = 1 << 20
# By OpenSSL's number: what a certificate lacks.
NOT_ACCEPTED = {
    10: "the server's certificate has expired",
    18: "the server's certificate is of an unknown authority",
    19: "the server's certificate is of an unknown authority",
    20: "the server's certificate is of an unknown authority",
    21: "the server's certificate is of an unknown authority",
    62: "the server's certificate is another name's",
    64: "the server's certificate is another address's",
}
NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST")


class NoAnswer(FirebreakError):
    """The server did not answer with HTTP. ``reason`` is the type of the failure."""

    def __init__(self, where: str, reason: str, effect: str) -> None:
        super().__init__(f"{where} gave no answer ({reason})", effect=effect)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str] = dataclasses.field(repr=False)
    body: bytes = dataclasses.field(repr=False)
    seconds: float


def check_url(option: str, url: str) -> urllib.parse.SplitResult:
    """Its parts; where it is none, an error that names the option."""
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:
        pass
    raise Refused(f"{option} must be a URL that begins with http:// or https:// and names a host")


def origin(url: str) -> str:
    """Scheme, host and port: what a message may show of an address (a query can hold a secret)."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def retry_after(text: str | None, now: float) -> float | None:
    """How many seconds a server asks to wait, in seconds or as a date; None where it does not say."""
    text = (text or "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", text):
        return float(text)
    try:
        return max(email.utils.parsedate_to_datetime(text).timestamp() - now, 0.0)
    except (ValueError, OverflowError):
        return None


def tls_failure(failure: BaseException | None) -> str | None:
    """Why a TLS connection never came about, wherever that stands among the exceptions that a client wraps it in.

    Any other failure of TLS may come after the request.
    """
    seen: list[BaseException] = []
    todo: list[Any] = [failure]
    while todo:
        one = todo.pop()
        if not isinstance(one, BaseException) or one in seen:
            continue
        seen.append(one)
        if isinstance(one, ssl.SSLCertVerificationError):
            return NOT_ACCEPTED.get(one.verify_code, "the server's certificate is not accepted")
        if isinstance(one, ssl.SSLError) and one.reason in NO_TLS:
            return "the server does not speak TLS there"
        todo += [one.__cause__, one.__context__, getattr(one, "reason", None), *one.args]
    return None


def _connection(
    parts: urllib.parse.SplitResult, timeout: float, ca_cert: str | None, source: str | None
) -> http.client.HTTPConnection:
    bound = (source, 0) if source else None
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=ca_cert)
        return http.client.HTTPSConnection(
            parts.hostname or "", parts.port, timeout=timeout, source_address=bound, context=context
        )
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout, source_address=bound)


def request(
    method: str,
    url: str,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
    timeout: float = 5.0,
    ca_cert: str | None = None,
    source: str | None = None,
) -> Answer:
    """The answer as it came, whatever its status; a redirect is one too. ``source`` is the address to speak from."""
    parts = check_url("an address", url)
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    started = time.monotonic()
    connected = False
    connection = None
    try:
        connection = _connection(parts, timeout, ca_cert, source)
        connection.connect()
        connected = True
        connection.request(method, target, body=body, headers={"Connection": "close", **(headers or {})})
        answer = connection.getresponse()
        content = answer.read(LONGEST_BODY)
        return Answer(answer.status, dict(answer.headers), content, time.monotonic() - started)
    except (OSError, http.client.HTTPException, ValueError) as exc:
        raise NoAnswer(
            origin(url), tls_failure(exc) or type(exc).__name__, "unknown" if connected else "none"
        ) from None
    finally:
        if connection:
            connection.close()


# What follows makes this file a service: the one of gates, whose checks bring their own addresses.

SPEC: dict[str, Any] = {}


def preload() -> None:
    """The standard library is there."""


def addresses(params: dict[str, Any]) -> list[str]:
    urls = [check["url"] for check in params.get("checks") or []]
    return urls + [check["then"]["url"] for check in params.get("checks") or [] if check.get("then")]


def connect(params: dict[str, Any], context: Context) -> Client:
    return Client(context)


class Client:
    """Every request is a connection of its own, as a new visitor's would be."""

    def __init__(self, context: Context) -> None:
        self.secret = context.secret
        self.sleep = context.sleep

    request = staticmethod(request)

    def close(self) -> None:
        """Nothing stays open."""


def in_parallel(work: Callable[[Any], Any], items: list[Any], width: int, seconds: float) -> list[Any]:
    """One result an item, None where it did not end in time. What hangs (name resolution does) is left behind."""
    results: list[Any] = [None] * len(items)
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    for number in range(len(items)):
        todo.put(number)

    def worker() -> None:
        while True:
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((number, work(items[number])))
            except Exception as failure:
                done.put((number, failure))

    for _thread in range(min(width, len(items))):
        threading.Thread(target=worker, daemon=True).start()
    until = time.monotonic() + seconds
    for _item in items:
        try:
            number, result = done.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return results
        if isinstance(result, Exception):
            raise result
        results[number] = result
    return results
