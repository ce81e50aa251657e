# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The victim: a small application with logins, refresh tokens, a signed webhook and metrics.

Its secrets lie in ``app.env``; SIGHUP reads that file again. It writes sessions and an audit log into PostgreSQL and keeps
refresh tokens in Valkey. On a read-only database users still get in: what would be written is counted and left out.
"""

from __future__ import annotations

import base64
import binascii
import collections
import email.utils
import hmac
import json
import os
import queue
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psycopg
import redis
import redis.backoff
import redis.retry

from .parts.people import check_password

ACCESS_SECONDS = 900
REFRESH_SECONDS = 7 * 24 * 3600
SECRET_NAMES = ("JWT_SECRET", "WEBHOOK_SECRET", "BOT_TOKEN", "DATABASE_PASSWORD", "SENTRY_DSN")
NETWORKS = {"127.0.2.": "192.0.2.", "127.66.0.": "198.51.100.", "127.0.113.": "203.0.113."}


class Refused(Exception):
    """A request that gets an error status."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status
        self.why = why


class Settings:
    """The env file, read at the start and at each reload."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: dict[str, str] = {}
        self.generation = 0
        self.load()

    def load(self) -> None:
        lines = (line.strip() for line in self._path.read_text(encoding="utf-8").splitlines())
        pairs = (line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
        self._values = {name.strip(): value.strip().strip("'\"") for name, value in pairs}
        self.generation += 1

    def __getitem__(self, name: str) -> str:
        return self._values[name]


class Database:
    """A few connections, opened when needed; a broken one is replaced once."""

    def __init__(self, settings: Settings, env: Mapping[str, str]) -> None:
        self._settings = settings
        self._where = f"host={env['PGHOST']} port={env['PGPORT']} dbname={env['PGDATABASE']} user={env['PGUSER']}"
        self._free: queue.LifoQueue[psycopg.Connection[Any] | None] = queue.LifoQueue()
        for _unused in range(8):
            self._free.put(None)

    def run(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        connection = self._free.get(timeout=5)
        try:
            for last in (False, True):
                try:
                    connection = connection or self._connect()
                    cursor = connection.execute(statement, values)
                    return cursor.fetchall() if cursor.description else []
                except (psycopg.OperationalError, psycopg.InterfaceError):
                    if connection is not None:
                        connection.close()
                    connection = None
                    if last:
                        raise Refused(503, "database unavailable") from None
            return []
        finally:
            self._free.put(connection)

    def _connect(self) -> psycopg.Connection[Any]:
        password = self._settings["DATABASE_PASSWORD"]
        # Behind a pool the next transaction may be on another server's connection: nothing is prepared.
        return psycopg.connect(
            self._where,
            password=password,
            autocommit=True,
            connect_timeout=3,
            application_name="divan",
            prepare_threshold=None,
        )


class Application:
    """What the application does; no HTTP in here."""

    def __init__(self, settings: Settings, database: Database, env: Mapping[str, str]) -> None:
        self.settings = settings
        self._database = database
        once = redis.retry.Retry(redis.backoff.NoBackoff(), 1)
        self._tokens = redis.Redis(
            host=env["REDIS_HOST"], port=int(env["REDIS_PORT"]), username=env["REDIS_USERNAME"], password=settings["REDIS_PASSWORD"],
            socket_timeout=3, socket_connect_timeout=3, retry=once, decode_responses=True,
        )  # fmt: skip
        self.requests: collections.Counter[tuple[str, str, int]] = collections.Counter()
        self.skipped_writes = 0
        self.lock = threading.Lock()

    # Logins

    def login(self, body: dict[str, Any], address: str, correlation: str) -> dict[str, Any]:
        rows = self._database.run(
            "SELECT id, email, password_hash FROM users WHERE email = %s", (str(body.get("email")),)
        )
        if not rows or not check_password(str(body.get("password")), rows[0][2]):
            self._audit(str(body.get("email"))[:100], "login_failed", address, correlation)
            raise Refused(401, "wrong email or password")
        user, email, _unused = rows[0]
        self._write("INSERT INTO sessions (user_id, address) VALUES (%s, %s)", (user, address))
        self._audit(email, "login", address, correlation)
        return {"access_token": self._access(user), "refresh_token": self._refresh(user, int(time.time()), address)}

    def refresh(self, body: dict[str, Any], address: str, correlation: str) -> dict[str, Any]:
        """The token is used up and followed by another; the family keeps the time of its first."""
        match = re.fullmatch(r"(\d{1,12})\.([0-9a-f]{32})", str(body.get("refresh_token")))
        if not match:
            raise Refused(401, "session revoked")
        family = self._rotate(f"session:refresh:{match[1]}:{match[2]}", new := secrets.token_hex(16))
        user = int(family["user_id"])
        self._audit(f"user:{user}", "refresh", address, correlation)
        return {"access_token": self._access(user), "refresh_token": f"{user}.{new}"}

    def _rotate(self, key: str, new: str) -> dict[str, Any]:
        """One step: a token is never in this process alone, where a revocation would not find it."""
        name = f"{key.rpartition(':')[0]}:{new}"
        try:
            with self._tokens.pipeline() as steps:
                steps.rename(key, name)
                steps.get(name)
                steps.expire(name, REFRESH_SECONDS)
                held = steps.execute()[1]
        except redis.ResponseError:  # no such key
            raise Refused(401, "session revoked") from None
        return dict(json.loads(held))

    def me(self, authorization: str, address: str, correlation: str) -> dict[str, Any]:
        user = self._verified(authorization.removeprefix("Bearer "))
        rows = self._database.run("SELECT id, email, name, note FROM users WHERE id = %s", (user,))
        if not rows:
            raise Refused(401, "no such user")
        self._audit(rows[0][1], "read_profile", address, correlation)
        return dict(zip(("id", "email", "name", "note"), rows[0], strict=True))

    def payment(self, body: bytes, signature: str, address: str, correlation: str) -> dict[str, Any]:
        expected = hmac.digest(self.settings["WEBHOOK_SECRET"].encode(), body, "sha256").hex()
        if not hmac.compare_digest(expected.encode(), signature.encode()):
            raise Refused(401, "wrong signature")
        event = _json(body)
        if "reference" not in event:  # a provider's ping
            return {"accepted": True, "stored": False}
        try:
            values = (str(event.get("reference"))[:100], int(event.get("amount") or 0))
        except (TypeError, ValueError):
            raise Refused(400, "amount is not a number") from None
        stored = self._write("INSERT INTO payments (reference, amount) VALUES (%s, %s)", values)
        self._audit("payment-provider", "payment", address, correlation)
        return {"accepted": True, "stored": stored}

    def _access(self, user: int) -> str:
        now = int(time.time())
        return sign({"sub": str(user), "iat": now, "exp": now + ACCESS_SECONDS}, self.settings["JWT_SECRET"])

    def _verified(self, text: str) -> int:
        try:
            head, claims, signature = text.split(".")
            right = _encoded(hmac.digest(self.settings["JWT_SECRET"].encode(), f"{head}.{claims}".encode(), "sha256"))
            if not hmac.compare_digest(right.encode(), signature.encode()):
                raise Refused(401, "invalid token")
            if json.loads(_decoded(head))["alg"] != "HS256":
                raise Refused(401, "invalid token")
            values = json.loads(_decoded(claims))
            if float(values["exp"]) < time.time():
                raise Refused(401, "expired token")
            return int(values["sub"])
        except (ValueError, KeyError, TypeError, binascii.Error):
            raise Refused(401, "invalid token") from None

    def _refresh(self, user: int, began: int, address: str) -> str:
        identity = secrets.token_hex(16)
        value = json.dumps({"user_id": user, "iat": began, "address": address})
        self._tokens.set(f"session:refresh:{user}:{identity}", value, ex=REFRESH_SECONDS)
        return f"{user}.{identity}"

    # The database

    def _audit(self, actor: str, action: str, address: str, correlation: str) -> None:
        statement = "INSERT INTO audit_logs (actor, action, address, correlation_id) VALUES (%s, %s, %s, %s)"
        self._write(statement, (actor, action, address, correlation or None))

    def _write(self, statement: str, values: tuple[Any, ...]) -> bool:
        try:
            self._database.run(statement, values)
        except psycopg.errors.ReadOnlySqlTransaction:
            with self.lock:
                self.skipped_writes += 1
            return False
        return True

    # Operations

    def proof(self, query: dict[str, list[str]]) -> dict[str, Any]:
        """That we hold a value, without saying it. The nonce is short, so that this cannot sign a token or a webhook."""
        name, nonce = (query.get(key, [""])[0] for key in ("name", "nonce"))
        if name not in SECRET_NAMES or not re.fullmatch(r"(?:[0-9a-f]{2}){8,32}", nonce):
            raise Refused(404, "no such secret, or the nonce is not 8 to 32 bytes in hex")
        return {"hmac": hmac.digest(self.settings[name].encode(), bytes.fromhex(nonce), "sha256").hex()}

    def health(self) -> dict[str, Any]:
        checks: dict[str, Callable[[], Any]] = {
            "database": lambda: self._database.run("SELECT 1"),
            "sessions": self._tokens.ping,
        }
        seen = {}
        for name, check in checks.items():
            try:
                check()
                seen[name] = "ok"
            except (Refused, redis.RedisError):
                seen[name] = "unavailable"
        if set(seen.values()) != {"ok"}:
            raise Refused(503, ", ".join(name for name, state in seen.items() if state != "ok") + " unavailable")
        return {"status": "ok", "checks": seen, "generation": self.settings.generation}

    def metrics(self) -> str:
        with self.lock:
            counted, skipped = dict(self.requests), self.skipped_writes
        lines = ["# TYPE divan_http_requests_total counter"]
        for (method, path, status), count in sorted(counted.items()):
            lines.append(f'divan_http_requests_total{{method="{method}",path="{path}",status="{status}"}} {count}')
        lines += [
            "# TYPE divan_database_writes_skipped_total counter",
            f"divan_database_writes_skipped_total {skipped}",
        ]
        return "\n".join(lines) + "\n"


def sign(claims: dict[str, Any], key: str) -> str:
    """A JWT, HS256."""
    head = _encoded(json.dumps({"alg": "HS256", "typ": "JWT"}).encode())
    text = f"{head}.{_encoded(json.dumps(claims).encode())}"
    return f"{text}.{_encoded(hmac.digest(key.encode(), text.encode(), 'sha256'))}"


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _json(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body or b"{}")
    except ValueError:
        raise Refused(400, "not JSON") from None
    if not isinstance(value, dict):
        raise Refused(400, "not an object")
    return value


def documented(address: str) -> str:
    """Loopback addresses as the edge shows them, for those who come past it."""
    for ours, shown in NETWORKS.items():
        if address.startswith(ours):
            return shown + address.removeprefix(ours)
    return address


PATHS = (
    "/api/auth/login",
    "/api/auth/refresh",
    "/api/me",
    "/hooks/payment",
    "/health",
    "/obs/metrics",
    "/internal/secret-proof",
)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    application: Application

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        began = time.monotonic()
        self.path_only = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            status, answer = 200, self._route(body)
        except Refused as refusal:
            status, answer = refusal.status, {"error": refusal.why}
        except redis.RedisError:
            status, answer = 503, {"error": "sessions unavailable"}
        except Exception as error:
            status, answer = 500, {"error": "internal error"}
            print(f"error: {type(error).__name__}", file=sys.stderr)
        self._send(status, answer)
        self._log(status, time.monotonic() - began)

    def _route(self, body: bytes) -> dict[str, Any] | str:
        app, who = self.application, (self._address(), self._correlation())
        match self.command, self.path_only:
            case "POST", "/api/auth/login":
                return app.login(_json(body), *who)
            case "POST", "/api/auth/refresh":
                return app.refresh(_json(body), *who)
            case "GET", "/api/me":
                return app.me(self.headers.get("Authorization") or "", *who)
            case "POST", "/hooks/payment":
                return app.payment(body, self.headers.get("X-Signature") or "", *who)
            case "GET", "/health":
                return app.health()
            case "GET", "/obs/metrics":
                return app.metrics()
            case "GET", "/internal/secret-proof" if self._internal():
                return app.proof(parse_qs(urlsplit(self.path).query))
        raise Refused(404, "no such page")

    def _internal(self) -> bool:
        return self.client_address[0] == "127.0.0.1" and not self.headers.get("CF-Connecting-IP")

    def _address(self) -> str:
        peer = str(self.client_address[0])
        seen_by_edge = self.headers.get("CF-Connecting-IP") if peer == "127.0.0.1" else None
        return seen_by_edge or documented(peer)

    def _correlation(self) -> str:
        return (self.headers.get("X-Correlation-Id") or "")[:100]

    def _send(self, status: int, answer: dict[str, Any] | str) -> None:
        kind = "text/plain; version=0.0.4" if isinstance(answer, str) else "application/json"
        data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode() + b"\n"
        lines = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            f"Content-Type: {kind}",
            f"Content-Length: {len(data)}",
            f"Date: {email.utils.formatdate(usegmt=True)}",
        ]
        if self._correlation():
            lines.append("X-Correlation-Id: " + re.sub(r"[^\w.:/-]", "_", self._correlation()))
        # One segment for head and body.
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + data)

    def _log(self, status: int, seconds: float) -> None:
        path = self.path_only if self.path_only in PATHS else "other"
        with self.application.lock:
            self.application.requests[(self.command, path, status)] += 1
        line = {
            "time": round(time.time(), 3), "method": self.command, "path": path, "status": status, "address": self._address(),
            "correlation_id": self._correlation(), "milliseconds": round(seconds * 1000, 1),
        }  # fmt: skip
        print(json.dumps(line), flush=True)

    def log_message(self, format: str, *words: Any) -> None:
        """The log line is ours."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


def main() -> None:
    env = os.environ
    settings = Settings(Path(env["APP_DIR"]) / "app.env")
    Handler.application = Application(settings, Database(settings, env), env)
    signal.signal(signal.SIGHUP, lambda *_unused: settings.load())
    Server(("127.0.0.1", int(env["PORT"])), Handler).serve_forever()


if __name__ == "__main__":
    main()
