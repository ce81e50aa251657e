# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""Vault and OpenBao, through hvac's plain adapter.

Its convenience calls are not used: they follow redirects with the token, take addresses and tokens from the
environment, and some reset what they were not asked to touch.
"""

from __future__ import annotations

import hmac
import json
import re
import ssl
import urllib.parse
from pathlib import Path
from types import ModuleType
from typing import Any

from ._control import Context
from ._deps import require
from ._errors import FirebreakError, Refused
from ._http import check_url, retry_after, tls_failure
from ._redact import Held

REQUIRED = ("vault_url",)
SPEC: dict[str, Any] = {
    "vault_url": {"type": "str"},
    "vault_token": {"type": "str", "no_log": True},
    "vault_namespace": {"type": "str"},
    "vault_ca_cert": {"type": "str"},
}

CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 10.0
ATTEMPTS = 3
PASSING = (0, 500, 502, 503, 504)  # 0 is no answer
DEFAULT_VERSIONS = 10  # where neither secret nor mount says how many are kept

NO_VAULT = "what answered {} does not speak as Vault does: see vault_url"
_HINTS = {
    400: "it does not accept the request",
    403: "vault_token is not valid any more, or its policies do not allow this",
    404: "there is nothing at this place",
    429: "it limits requests",
    503: "it is sealed or has no leader",
}

_hvac: ModuleType | None = None
_requests: ModuleType | None = None


class VaultError(FirebreakError):
    """An answer that is not a success; ``status`` is 0 where none came."""

    def __init__(self, msg: str, status: int, effect: str) -> None:
        super().__init__(msg, effect=effect)
        self.status = status
        self.hung = False  # it was waited for
        self.retry_after: str | None = None


class NoAnswer(VaultError):
    """None came."""

    def __init__(self, action: str, exc: Exception) -> None:
        reason = tls_failure(exc) or type(exc).__name__
        super().__init__(f"{action}: vault_url gave no answer ({reason})", 0, _effect_of(exc))
        names = {type(each).__name__ for each in (exc, *exc.args)}  # one failure, another type in head and body
        self.hung = bool(names & {"ReadTimeout", "ReadTimeoutError"})


class Mismatch(VaultError):
    """The version that a write was based on is not the current one."""


def preload() -> None:
    global _hvac, _requests
    if _hvac is None:
        _hvac = require("hvac.adapters", "hvac", "2.3.0")
        _requests = require("requests", "requests", "2.28.0")


def addresses(params: dict[str, Any]) -> list[str]:
    """Vault itself, and where a proof is asked for."""
    proofs = [("proof: url", proof["url"]) for proof in params.get("proof") or []]
    urls = [("vault_url", params.get("vault_url")), ("proof_url", params.get("proof_url")), *proofs]
    return [check_url(option, url).geturl() for option, url in urls if url]


def connect(params: dict[str, Any], context: Context) -> Client:
    preload()
    check_url("vault_url", params["vault_url"])
    token = context.secret(params.get("vault_token") or context.env.get("VAULT_TOKEN"))
    if not token:
        raise Refused("vault_token is missing: set it, or VAULT_TOKEN in the environment of the task")
    for option, value in (("vault_token", token), ("vault_namespace", params.get("vault_namespace"))):
        if value and not re.fullmatch(r"[!-~]+", value):
            raise Refused(
                f"{option} holds characters that no header carries: a space, the end of a line, or beyond ASCII"
            )
    _check_certificates(params.get("vault_ca_cert"))
    client = Client(params, token, context)
    if params.get("vault_namespace"):
        client.require_namespaces()
    return client


def _check_certificates(place: str | None) -> None:
    """A file, or a folder of them as OpenSSL has it."""
    try:
        if place and Path(place).is_dir():
            ssl.create_default_context(capath=place)
        elif place:
            ssl.create_default_context(cafile=place)
    except (OSError, ValueError) as exc:
        raise Refused(f"vault_ca_cert cannot be used as a file of certificates ({type(exc).__name__})") from None


def same(left: Any, right: Any) -> bool:
    """Compare two values of a secret without a hint in the time that it takes."""
    return hmac.compare_digest(_bytes(left), _bytes(right))


def _bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else json.dumps(value, sort_keys=True).encode()


def contains(data: Any, values: dict[str, Any]) -> bool:
    """Whether these values stand among the fields of a secret."""
    return isinstance(data, dict) and all(name in data and same(data[name], value) for name, value in values.items())


class Client:
    """A few calls in Vault's own words; not found is None."""

    def __init__(self, params: dict[str, Any], token: str, context: Context) -> None:
        self.held = Held()
        self.secret = context.secret
        self.host = context.host
        self.clock = context.clock
        self.sleep = context.sleep
        self._context = context
        self._session = _requests.Session()  # type: ignore[union-attr]
        self._session.trust_env = False  # no proxy, netrc or CA from the environment
        self._session.verify = params.get("vault_ca_cert") or True
        self._adapter = _hvac.RawAdapter(  # type: ignore[union-attr]
            base_uri=params["vault_url"],
            token=token,
            namespace=params.get("vault_namespace"),
            allow_redirects=False,
            session=self._session,
        )

    def close(self) -> None:
        self._session.close()

    # Requests

    def left(self) -> float:
        """Seconds to the deadline of the changes. Before there is one, each request has its own."""
        return self._context.deadline - self.clock() if self._context.deadline else 2 * ANSWER_SECONDS

    def _send(self, method: str, where: str, action: str, **kwargs: Any) -> Any:
        headers = {**kwargs.pop("headers", {})}
        if self._context.correlation:
            headers["X-Correlation-Id"] = self._context.correlation
        kwargs["timeout"] = (self._context.at_most(CONNECT_SECONDS), self._context.at_most(ANSWER_SECONDS))
        try:
            return self._adapter.request(
                method, f"/v1/{urllib.parse.quote(where)}", headers=headers, raise_exception=False, **kwargs
            )
        except _requests.exceptions.RequestException as exc:  # type: ignore[union-attr]
            raise NoAnswer(action, exc) from None

    def _call(self, method: str, where: str, action: str, again: bool, **kwargs: Any) -> tuple[int, dict[str, Any]]:
        """One request. ``again`` says that it has no effect, so that it can be repeated after any passing failure.

        A rate limit came before any effect. A server that hangs once hangs again: it is not waited for twice.
        """
        attempt = 0
        while True:
            attempt += 1
            if not again:
                self._context.still_ours()
            try:
                answer = self._send(method, where, action, **kwargs)
                return answer.status_code, _checked(answer, action)
            except VaultError as error:
                if again:
                    error.effect = "none"
                passing = error.status == 429 or (again and error.status in PASSING and not error.hung)
                asked = retry_after(error.retry_after, self.clock())
                pause = 0.2 * attempt if asked is None else asked
                if not passing or attempt == ATTEMPTS or pause >= self.left():
                    if asked is not None:
                        error.msg += f"; it asks to wait {asked:.0f} s"
                        error.args = (error.msg,)
                    raise
            self.sleep(pause)

    def _read(self, where: str, action: str, **kwargs: Any) -> tuple[int, dict[str, Any]]:
        return self._call("get", where, action, True, **kwargs)

    # What the server and the token can do

    def require_namespaces(self) -> None:
        """Vault Community ignores a namespace and would write to the root: refuse it there."""
        answer = self._send("get", "sys/health", "look for namespaces", params={"standbyok": "true"})
        body = _json(answer)
        enterprise = body.get("enterprise") or "+ent" in str(body.get("version", ""))
        if answer.status_code == 200 and not enterprise:
            raise Refused("vault_namespace is set, but this server has no namespaces: leave it out")

    def require_capabilities(self, wanted: dict[str, tuple[str, ...]]) -> None:
        """Ask for all paths at once, before anything is written."""
        _status, body = self._call(
            "post", "sys/capabilities-self", "ask what the token may do", True, json={"paths": sorted(wanted)}
        )
        granted = body.get("data") or body
        lacking = [
            f"{', '.join(missing)} on {where}"
            for where, needed in sorted(wanted.items())
            if "root" not in granted.get(where, ())
            and (missing := [each for each in needed if each not in granted.get(where, ())])
        ]
        if lacking:
            raise Refused(f"the policies of vault_token lack {'; '.join(lacking)}", guard="capabilities")

    def identity(self) -> dict[str, list[str]]:
        """How the server names this token: it tells no address."""
        action = "look up the token"
        seen = _data(*self._read("auth/token/lookup-self", action), "accessor", action)
        return {"tokens": [seen["accessor"]] if seen["accessor"] else []}  # a batch token has none

    # KV version 2

    def read_secret(self, mount: str, path: str, version: int | None = None) -> dict[str, Any] | None:
        """``version`` and ``data``; data is None for a deleted or destroyed version."""
        query = {"version": str(version)} if version else None
        status, body = self._read(f"{mount}/data/{path}", f"read {mount}/{path}", params=query)
        if status == 404 and not body.get("data"):
            return None
        data = _data(status, body, "metadata", f"read {mount}/{path}")
        return {"version": data["metadata"]["version"], "data": data["data"]}

    def read_metadata(self, mount: str, path: str) -> dict[str, Any] | None:
        action = f"read the metadata of {mount}/{path}"
        status, body = self._read(f"{mount}/metadata/{path}", action)
        return None if status == 404 and not body.get("data") else _data(status, body, "versions", action)

    def versions_kept(self, mount: str, metadata: dict[str, Any]) -> int:
        """How many versions the server keeps of a secret."""
        action = f"read the configuration of {mount}"
        config = _data(*self._read(f"{mount}/config", action), "max_versions", action)
        return max(metadata.get("max_versions") or 0, config["max_versions"]) or DEFAULT_VERSIONS

    def write_secret(self, mount: str, path: str, data: dict[str, Any], cas: int) -> int:
        return self._write("post", mount, path, data, cas)

    def patch_secret(self, mount: str, path: str, values: dict[str, Any], cas: int) -> int:
        """Only these fields travel: the server keeps the others as they are, to the byte."""
        return self._write("patch", mount, path, values, cas)

    def _write(self, method: str, mount: str, path: str, data: dict[str, Any], cas: int) -> int:
        headers = {"Content-Type": "application/merge-patch+json"} if method == "patch" else {}
        payload = {"options": {"cas": cas}, "data": data}
        action = f"write {mount}/{path}"
        try:
            status, body = self._call(method, f"{mount}/data/{path}", action, False, headers=headers, json=payload)
            if status == 404:
                raise VaultError(f"{action}: {_HINTS[404]} (404)", 404, "none")
            if not body.get("data"):
                raise VaultError(f"{action}: Vault answered {status} without a version", status, "unknown")
            self._context.effective()
            return int(body["data"]["version"])
        except VaultError as error:
            if error.effect == "none" and not isinstance(error, Mismatch):
                raise
            return self._settle(mount, path, data, cas, error)

    def _settle(self, mount: str, path: str, data: dict[str, Any], cas: int, error: VaultError) -> int:
        """After an unclear answer, look: the write may have had its effect although its reply was lost."""
        try:
            now = self.read_secret(mount, path)
        except VaultError:
            raise VaultError(error.msg, error.status, "unknown") from None
        version = now["version"] if now else 0
        if now and version == cas + 1 and contains(now["data"], data):
            return version
        if version == cas:
            raise error
        raise VaultError(
            f"{mount}/{path} was written by {self.writer(mount, path, version)} in between "
            f"(version {version} where {cas} was expected)",
            error.status,
            "none",
        )

    def writer(self, mount: str, path: str, version: int) -> str:
        """Who wrote a version, where the server tells (Vault 1.21 does)."""
        entry = ((self.read_metadata(mount, path) or {}).get("versions") or {}).get(str(version)) or {}
        return (entry.get("created_by") or {}).get("actor") or "somebody else"

    def destroy_versions(self, mount: str, path: str, versions: list[int]) -> None:
        if not versions:  # the server refuses to do nothing
            return
        where, action = f"{mount}/destroy/{path}", f"destroy old versions of {mount}/{path}"
        try:
            self._call("put", where, action, False, json={"versions": versions})
            self._context.effective()
        except VaultError as error:
            if error.effect == "none" or self._remain(mount, path, versions):
                raise

    def _remain(self, mount: str, path: str, versions: list[int]) -> bool:
        try:
            return bool(set(versions) & set(undestroyed(self.read_metadata(mount, path))))
        except VaultError:
            return True


def undestroyed(metadata: dict[str, Any] | None) -> list[int]:
    """Versions whose value can be read or undeleted."""
    versions = (metadata or {}).get("versions") or {}
    return sorted(int(number) for number, entry in versions.items() if not entry.get("destroyed"))


def _effect_of(exc: Exception) -> str:
    """A connection that was never made carried nothing."""
    errors = _requests.exceptions  # type: ignore[union-attr]
    reason = getattr(exc.args[0], "reason", None) if exc.args else None
    never = isinstance(exc, (errors.ConnectTimeout, errors.InvalidURL)) or tls_failure(exc) is not None
    return "none" if never or type(reason).__name__ in ("NewConnectionError", "NameResolutionError") else "unknown"


def _json(answer: Any) -> dict[str, Any]:
    try:
        body = answer.json() if answer.content else {}
    except ValueError:
        body = {}
    return body if isinstance(body, dict) else {}


def _data(status: int, body: dict[str, Any], key: str, action: str) -> dict[str, Any]:
    """What Vault wraps an answer in; another server that answers with success has no such thing."""
    data = body.get("data")
    if not isinstance(data, dict) or key not in data:
        raise VaultError(f"{action}: {NO_VAULT.format(status)}", status, "none")
    return data


def _checked(answer: Any, action: str) -> dict[str, Any]:
    """The body of a success or of a not-found; else our error, in our words: Vault's text can hold a value."""
    status = answer.status_code
    body = _json(answer)
    errors = [str(each) for each in body.get("errors") or []]
    if status == 404 and any("no handler for route" in each for each in errors):
        raise VaultError(f"{action}: no secrets engine is mounted there (404): see engine_mount_point", 404, "none")
    says = isinstance(body.get("data"), dict) or "errors" in body
    nothing = answer.request.method == "PATCH" and not answer.content  # as Vault answers a PATCH of what is not there
    if status == 404 and not says and not nothing:
        raise VaultError(f"{action}: {NO_VAULT.format(status)}", status, "none")
    if 200 <= status < 300 or status == 404:
        return body
    if 300 <= status < 400:  # by whatever stands between, perhaps after it was carried out
        hint = "vault_url must lead to the active node, as a rule without a path of its own"
        raise VaultError(f"{action}: Vault redirects ({status}): {hint}", status, "unknown")
    if status == 400 and any("check-and-set" in each for each in errors):
        raise Mismatch(f"{action}: it was changed in between (400)", status, "none")
    sealed = status == 503 and any("sealed" in each for each in errors)
    effect = "none" if status < 500 or sealed else "unknown"
    error = VaultError(f"{action}: Vault answered {status}: {_HINTS.get(status, 'it failed')}", status, effect)
    error.retry_after = answer.headers.get("Retry-After")
    raise error
