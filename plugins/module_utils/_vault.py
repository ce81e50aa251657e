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
import urllib.parse
from types import ModuleType
from typing import Any

from ._control import Context
from ._deps import require
from ._errors import FirebreakError, Refused
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
LONGEST_PAUSE = 5.0

_HINTS = {
    400: "it does not accept the request",
    403: "the token is not valid any more, or its policies do not allow this",
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


class Mismatch(VaultError):
    """The version that a write was based on is not the current one."""


def preload() -> None:
    global _hvac, _requests
    if _hvac is None:
        _hvac = require("hvac.adapters", "hvac", "2.3.0")
        _requests = require("requests", "requests", "2.28.0")


def addresses(params: dict[str, Any]) -> list[str]:
    """Vault itself, and where a proof is asked for."""
    proofs = [proof["url"] for proof in params.get("proof") or []]
    return [url for url in (params.get("vault_url"), params.get("proof_url"), *proofs) if url]


def connect(params: dict[str, Any], context: Context) -> Client:
    preload()
    url = params["vault_url"]
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise Refused("vault_url must begin with http:// or https://")
    token = params.get("vault_token") or context.env.get("VAULT_TOKEN")
    if not token:
        raise Refused("vault_token is missing: set it, or VAULT_TOKEN in the environment of the task")
    client = Client(params, context.secret(token), context)
    if params.get("vault_namespace"):
        client.require_namespaces()
    return client


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
        self._correlation = context.correlation
        self._session = _requests.Session()  # type: ignore[union-attr]
        self._session.trust_env = False  # no proxy, netrc or CA from the environment
        self._session.verify = params.get("vault_ca_cert") or True
        self._adapter = _hvac.RawAdapter(  # type: ignore[union-attr]
            base_uri=params["vault_url"],
            token=token,
            namespace=params.get("vault_namespace"),
            timeout=(CONNECT_SECONDS, ANSWER_SECONDS),
            allow_redirects=False,
            session=self._session,
        )

    def close(self) -> None:
        self._session.close()

    # Requests

    def _send(self, method: str, where: str, action: str, **kwargs: Any) -> Any:
        headers = {**kwargs.pop("headers", {})}
        if self._correlation:
            headers["X-Correlation-Id"] = self._correlation
        try:
            return self._adapter.request(
                method, f"/v1/{urllib.parse.quote(where)}", headers=headers, raise_exception=False, **kwargs
            )
        except _requests.exceptions.RequestException as exc:  # type: ignore[union-attr]
            raise VaultError(f"{action}: vault_url gave no answer ({type(exc).__name__})", 0, _effect_of(exc)) from None

    def _call(self, method: str, where: str, action: str, again: bool, **kwargs: Any) -> tuple[int, dict[str, Any]]:
        """One request. ``again`` allows to repeat it after any passing failure; a rate limit came before any effect."""
        for attempt in range(1, ATTEMPTS + 1):
            last = attempt == ATTEMPTS
            try:
                answer = self._send(method, where, action, **kwargs)
            except VaultError:
                if last or not again:
                    raise
                self.sleep(0.1 * attempt)
                continue
            passing = answer.status_code == 429 or (again and answer.status_code in (500, 502, 503, 504))
            if last or not passing:
                break
            self.sleep(_pause(answer.headers.get("Retry-After"), attempt))
        return answer.status_code, _checked(answer, action)

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

    # KV version 2

    def read_secret(self, mount: str, path: str, version: int | None = None) -> dict[str, Any] | None:
        """``version`` and ``data``; data is None for a deleted or destroyed version."""
        query = {"version": str(version)} if version else None
        status, body = self._read(f"{mount}/data/{path}", f"read {mount}/{path}", params=query)
        data = body.get("data")
        if not data:
            if status == 404:
                return None
            raise VaultError(f"read {mount}/{path}: Vault answered {status} without data", status, "none")
        return {"version": data["metadata"]["version"], "data": data["data"]}

    def read_metadata(self, mount: str, path: str) -> dict[str, Any] | None:
        status, body = self._read(f"{mount}/metadata/{path}", f"read the metadata of {mount}/{path}")
        return None if status == 404 else body["data"]

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
        where, action = f"{mount}/destroy/{path}", f"destroy old versions of {mount}/{path}"
        try:
            self._call("put", where, action, False, json={"versions": versions})
        except VaultError as error:
            if error.effect == "none" or self._left(mount, path, versions):
                raise

    def _left(self, mount: str, path: str, versions: list[int]) -> bool:
        try:
            return bool(set(versions) & set(undestroyed(self.read_metadata(mount, path))))
        except VaultError:
            return True


def undestroyed(metadata: dict[str, Any] | None) -> list[int]:
    """Versions whose value can be read or undeleted."""
    versions = (metadata or {}).get("versions") or {}
    return sorted(int(number) for number, entry in versions.items() if not entry.get("destroyed"))


def _pause(retry_after: str | None, attempt: int) -> float:
    try:
        return min(float(retry_after or ""), LONGEST_PAUSE)
    except ValueError:
        return 0.2 * attempt


def _effect_of(exc: Exception) -> str:
    """A connection that was never made carried nothing."""
    errors = _requests.exceptions  # type: ignore[union-attr]
    reason = getattr(exc.args[0], "reason", None) if exc.args else None
    never = isinstance(exc, (errors.ConnectTimeout, errors.SSLError, errors.InvalidURL))
    return "none" if never or type(reason).__name__ in ("NewConnectionError", "NameResolutionError") else "unknown"


def _json(answer: Any) -> dict[str, Any]:
    try:
        body = answer.json() if answer.content else {}
    except ValueError:
        body = {}
    return body if isinstance(body, dict) else {}


def _checked(answer: Any, action: str) -> dict[str, Any]:
    """The body of a success or of a not-found; else our error, in our words: Vault's text can hold a value."""
    status = answer.status_code
    body = _json(answer)
    if status == 404 and any("no handler for route" in str(each) for each in body.get("errors") or []):
        raise VaultError(f"{action}: no secrets engine is mounted there (404): see engine_mount_point", 404, "none")
    if 200 <= status < 300 or status == 404:
        return body
    if 300 <= status < 400:
        raise VaultError(f"{action}: Vault redirects ({status}); vault_url must name the active node", status, "none")
    if status == 400 and any("check-and-set" in str(each) for each in body.get("errors") or []):
        raise Mismatch(f"{action}: it was changed in between (400)", status, "none")
    sealed = status == 503 and any("sealed" in str(each) for each in body.get("errors") or [])
    effect = "none" if status < 500 or sealed else "unknown"
    raise VaultError(f"{action}: Vault answered {status}: {_HINTS.get(status, 'it failed')}", status, effect)
