# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What can go wrong with each service that a control talks to. A control says its service; the faults are the service's.

``faults`` meet one request of a run that is under way; ``places`` are options under which a run cannot even begin.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from ansible_collections.firebreak.incident.plugins.module_utils import (
    _cloudflare,
    _pgbouncer,
    _postgresql,
    _redis,
    _vault,
)
from ansible_collections.firebreak.incident.plugins.module_utils._errors import FirebreakError
from ansible_collections.firebreak.incident.plugins.module_utils._task import spec_of
from tests import dumps, helpers
from tests.contract.rotation_walk import LocalHost
from tests.truth.injector import (
    Fault,
    HttpInjector,
    Injector,
    PostgresqlInjector,
    RedisInjector,
    Request,
    certificate,
    closed_port,
    deaf_port,
    http_answer,
    postgresql_error,
    serving,
)

Params = dict[str, Any]
Place = Callable[[Any, Params, Path], contextlib.AbstractContextManager[Params]]
PAGE = b"<html><head><title>Please log in</title></head><body>canary of a proxy</body></html>"
FOR_LONG = 600
# Where a redirect leads to; nobody may follow it there.
ELSEWHERE = HttpInjector(("127.0.0.1", 9))


class Party(Protocol):
    """Whom a control talks to, with something in between that can be armed."""

    seen: list[Request]
    hits: int

    def arm(self, fault: Fault | None, first: int = 1) -> None: ...


@dataclasses.dataclass(frozen=True)
class Service:
    name: str
    faults: tuple[Fault, ...]
    places: dict[str, Place]
    stand: Callable[
        [Any, Params, contextlib.ExitStack], tuple[Party, Params]
    ]  # the party, and options that lead through it


# --- HTTP


def http_faults(refusal: Callable[[int], Any], empty: Any) -> tuple[Fault, ...]:
    """``refusal`` is the service's own way to say no, ``empty`` an answer of its own that says nothing."""

    def answer(status: int, **headers: str) -> bytes:
        return http_answer(status, refusal(status), **headers)

    away = {"Location": f"http://127.0.0.1:{ELSEWHERE.port}/elsewhere"}
    return (
        Fault("429 for a second", answer(429, Retry_After="1"), seconds=4.0),
        Fault("429 for long", answer(429, Retry_After=str(FOR_LONG))),
        Fault("429 until a date", answer(429, Retry_After="Fri, 31 Dec 2100 23:59:59 GMT")),
        Fault("429 without a time", answer(429)),
        Fault("500", answer(500)),
        Fault("500 after the effect", answer(500), reaches=True, on="writes"),
        Fault("502 with a page", http_answer(502, PAGE, "text/html")),
        Fault("502 with a page after the effect", http_answer(502, PAGE, "text/html"), reaches=True, on="writes"),
        Fault("503", answer(503)),
        Fault("503 from there on", answer(503), times=None),
        Fault("a page instead", http_answer(200, PAGE, "text/html")),
        Fault("a page instead, after the effect", http_answer(200, PAGE, "text/html"), reaches=True, on="writes"),
        Fault("an answer that says nothing", http_answer(200, empty)),
        Fault("redirected", http_answer(307, **away)),
        Fault("redirected after the effect", http_answer(307, **away), reaches=True, on="writes"),
        Fault("reset before", then="reset"),
        Fault("reset after the effect", reaches=True, then="reset"),
        Fault("cut", cut=True, then="close"),
        Fault("hangs", then="hang"),
        Fault("hangs after the effect", reaches=True, then="hang", on="writes"),
        Fault("gone from there on", then="reset", times=None),
        Fault("credential revoked", answer(403), times=None),
        Fault("credential unknown", answer(401), times=None),
        Fault("shows the old state", stale=2, on="writes"),
    )


def http_places(option: str, ca_option: str = "") -> dict[str, Place]:
    """Addresses under which nobody answers, or not the one who should."""

    def at(url: str, port: int, scheme: str = "http") -> str:
        return urlsplit(url)._replace(scheme=scheme, netloc=f"127.0.0.1:{port}").geturl()

    @contextlib.contextmanager
    def refused(_lab: Any, params: Params, _folder: Path) -> Iterator[Params]:
        yield {**params, option: at(params[option], closed_port())}

    @contextlib.contextmanager
    def deaf(_lab: Any, params: Params, _folder: Path) -> Iterator[Params]:
        with deaf_port() as port:
            yield {**params, option: at(params[option], port)}

    @contextlib.contextmanager
    def plain(_lab: Any, params: Params, _folder: Path) -> Iterator[Params]:
        yield {**params, option: at(params[option], int(urlsplit(params[option]).port or 0), "https")}

    def with_certificate(name: str, days: int, trusted: bool) -> Place:
        @contextlib.contextmanager
        def place(_lab: Any, params: Params, folder: Path) -> Iterator[Params]:
            file = certificate(folder, name, days)
            parts = urlsplit(params[option])
            with HttpInjector((str(parts.hostname), int(parts.port or 0)), serving(file)) as secure:
                known = {ca_option: str(file)} if trusted else {}
                yield {**params, option: at(params[option], secure.port, "https"), **known}

        return place

    places = {
        "nobody there": refused,
        "deaf": deaf,
        "no TLS there": plain,
        "unknown authority": with_certificate("127.0.0.1", 1, False),
    }
    if ca_option:
        places["certificate expired"] = with_certificate("127.0.0.1", -1, True)
        places["another's certificate"] = with_certificate("vault.example.com", 1, True)
    return places


def with_options(**changed: Any) -> Place:
    @contextlib.contextmanager
    def place(_lab: Any, params: Params, _folder: Path) -> Iterator[Params]:
        yield {**params, **changed}

    return place


def http_stand(option: str, asks: str = "$^", ca_option: str = "") -> Any:
    """In between, over TLS where its authority can be named."""

    def stand(_lab: Any, params: Params, stack: contextlib.ExitStack) -> tuple[Party, Params]:
        parts = urlsplit(params[option])
        target = (str(parts.hostname), int(parts.port or 0))
        secure = None
        if ca_option:
            file = certificate(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            secure, parts, params = serving(file), parts._replace(scheme="https"), {**params, ca_option: str(file)}
        between = stack.enter_context(HttpInjector(target, secure, asks))
        return between, {**params, option: parts._replace(netloc=f"127.0.0.1:{between.port}").geturl()}

    return stand


def _cloudflare_says(status: int) -> Any:
    code = {429: 971, 401: 10000, 403: 10000}.get(status, 10001)
    return {"success": False, "errors": [{"code": code, "message": "canary of a server's text"}], "result": None}


_OPERATION = {"success": True, "errors": [], "result": {"id": "0" * 32, "status": "failed", "error": "canary"}}
BULK = r"(POST|DELETE) .*/items$"
CLOUDFLARE = Service(
    "cloudflare",
    (
        *http_faults(_cloudflare_says, {"success": True, "errors": [], "result": None}),
        Fault("half of a bulk, then reset", half=True, then="reset", on=BULK),
        Fault("half of a bulk", half=True, on=BULK),
        Fault("a bulk that fails after all", http_answer(200, _OPERATION), reaches=True, on="bulk_operations"),
    ),
    {
        **http_places("cloudflare_url"),
        "wrong token": with_options(cloudflare_token="canary-of-a-token"),
        "another's account and zone": with_options(cloudflare_account_id="0" * 32, cloudflare_zone_id="0" * 32),
    },
    http_stand("cloudflare_url", asks="dry_run=true"),
)
VAULT = Service(
    "vault",
    http_faults(lambda _status: {"errors": ["canary of a server's text"]}, {"data": None}),
    {**http_places("vault_url", "vault_ca_cert"), "wrong token": with_options(vault_token="canary-of-a-token")},
    http_stand("vault_url", "capabilities-self", "vault_ca_cert"),
)


# --- where a consumer of a secret shows which one it works with


def _consumer_stand(_lab: Any, params: Params, stack: contextlib.ExitStack) -> tuple[Party, Params]:
    params = copy.deepcopy(params)
    holders = [*(params.get("proof") or []), params]
    places = [(holder, name) for holder in holders for name in ("url", "proof_url") if holder.get(name)]
    target = urlsplit(places[0][0][places[0][1]]) if places else urlsplit("http://127.0.0.1:9")
    between = stack.enter_context(HttpInjector((str(target.hostname), int(target.port or 0)), asks="."))
    for holder, name in places:
        holder[name] = urlsplit(holder[name])._replace(netloc=f"127.0.0.1:{between.port}").geturl()
    return between, {**params, "proof_patience": 0.7} if params.get("proof_url") else params


CONSUMER = Service("consumer", http_faults(lambda _status: {"error": "canary"}, {}), {}, _consumer_stand)


# --- PostgreSQL


def _postgresql_faults() -> tuple[Fault, ...]:
    refusals = {
        "a statement timeout": "57014",
        "a lock": "55P03",
        "no privilege": "42501",
        "disk full": "53100",
        "out of memory": "53200",
        "a standby": "25006",
    }
    ends = {"admin shutdown": "57P01", "crash of another session": "57P02"}
    starts = {
        "starting up": ("57P03", "the database system is starting up"),
        "too many connections": ("53300", "sorry, too many clients already"),
    }
    return (
        *(
            Fault(name, postgresql_error(code), on="(?i)(alter|select|set|begin|copy)")
            for name, code in refusals.items()
        ),
        *(Fault(name, postgresql_error(code, fatal=True), then="close") for name, code in ends.items()),
        *(
            Fault(
                f"{name} after the effect", postgresql_error(code, fatal=True), reaches=True, then="close", on="writes"
            )
            for name, code in ends.items()
        ),
        *(Fault(name, postgresql_error(*no, fatal=True), then="close", on="^connect$") for name, no in starts.items()),
        Fault("down from there on", postgresql_error(*starts["starting up"], fatal=True), then="close", times=None),
        Fault("reset before", then="reset"),
        Fault("reset after the effect", reaches=True, then="reset"),
        Fault("cut", cut=True, then="close"),
        Fault("hangs", then="hang"),
        Fault("hangs after the effect", reaches=True, then="hang", on="writes"),
        Fault("gone from there on", then="reset", times=None),
    )


def _postgresql_stand(_lab: Any, params: Params, stack: contextlib.ExitStack) -> tuple[Party, Params]:
    between = stack.enter_context(PostgresqlInjector((params["postgresql_host"], params["postgresql_port"])))
    return between, {**params, "postgresql_port": between.port}


@contextlib.contextmanager
def _as_reporting(lab: Any, params: Params, _folder: Path) -> Iterator[Params]:
    """A role that may read, and alter nothing."""
    yield {**params, "postgresql_user": "reporting", "postgresql_password": lab.stolen["reporting_password"]}


@contextlib.contextmanager
def _roles_held(lab: Any, params: Params, _folder: Path) -> Iterator[Params]:
    """Another session alters the same roles, and does not commit."""
    with dumps.session(lab) as other, other.transaction(force_rollback=True):
        for role in ("reporting", "readers"):
            other.execute(f"ALTER ROLE {role} CONNECTION LIMIT 17")  # type: ignore[arg-type]
        yield params


def tcp_places(option: str, injector: type[Injector], secure: Params) -> dict[str, Place]:
    @contextlib.contextmanager
    def refused(_lab: Any, params: Params, _folder: Path) -> Iterator[Params]:
        yield {**params, option: closed_port()}

    @contextlib.contextmanager
    def deaf(_lab: Any, params: Params, _folder: Path) -> Iterator[Params]:
        with deaf_port() as port:
            yield {**params, option: port}

    @contextlib.contextmanager
    def unknown(_lab: Any, params: Params, folder: Path) -> Iterator[Params]:
        with injector(("127.0.0.1", params[option]), serving(certificate(folder))) as between:
            yield {**params, option: between.port, **secure}

    return {"nobody there": refused, "deaf": deaf, "unknown authority": unknown, "no TLS there": with_options(**secure)}


POSTGRESQL = Service(
    "postgresql",
    _postgresql_faults(),
    {
        **tcp_places("postgresql_port", PostgresqlInjector, {"postgresql_sslmode": "verify-full"}),
        "wrong password": with_options(postgresql_password="canary-of-a-password"),
        "no such database": with_options(postgresql_database="nowhere"),
        "TLS required": with_options(postgresql_sslmode="require"),
        "a role that may nothing": _as_reporting,
        "roles held by another session": _roles_held,
    },
    _postgresql_stand,
)


# --- the pool, whose console and clients speak as PostgreSQL does


def _pgbouncer_faults() -> tuple[Fault, ...]:
    full = postgresql_error("08P01", "no more connections allowed (max_client_conn)", fatal=True)
    over = postgresql_error("57P01", "canary of a server's text", fatal=True)
    return (
        Fault("refused", postgresql_error("08P01")),
        Fault("full", full, then="close", on="^connect$"),
        Fault("shutdown", over, then="close"),
        Fault("shutdown after the effect", over, reaches=True, then="close", on="RELOAD|WAIT_CLOSE"),
        Fault("down from there on", over, then="close", times=None),
        Fault("reset before", then="reset"),
        Fault("reset after the effect", reaches=True, then="reset"),
        Fault("cut", cut=True, then="close"),
        Fault("hangs", then="hang"),
        Fault("hangs after the effect", reaches=True, then="hang", on="RELOAD|WAIT_CLOSE"),
        Fault("gone from there on", then="reset", times=None),
    )


def _pgbouncer_stand(_lab: Any, params: Params, stack: contextlib.ExitStack) -> tuple[Party, Params]:
    between = stack.enter_context(PostgresqlInjector((params["pgbouncer_host"], params["pgbouncer_port"])))
    return between, {**params, "pgbouncer_port": between.port}


def application_word(lab: Any, name: str) -> str:
    """A password of the application, from its env file."""
    lines = (lab.dir / "app" / "app.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)[name]


@contextlib.contextmanager
def _as_app(lab: Any, params: Params, _folder: Path) -> Iterator[Params]:
    """A client of the pool, who may not speak to its console."""
    yield {**params, "pgbouncer_user": "app", "pgbouncer_password": application_word(lab, "DATABASE_PASSWORD")}


PGBOUNCER = Service(
    "pgbouncer",
    _pgbouncer_faults(),
    {
        **tcp_places("pgbouncer_port", PostgresqlInjector, {"pgbouncer_sslmode": "verify-full"}),
        "wrong password": with_options(pgbouncer_password="canary-of-a-password"),
        "no such file": with_options(conffile="/nonexistent/pgbouncer.ini"),
        "TLS required": with_options(pgbouncer_sslmode="require"),
        "no user of the console": _as_app,
    },
    _pgbouncer_stand,
)


# --- Redis


def _redis_faults() -> tuple[Fault, ...]:
    lines = {
        "loading": "LOADING Redis is loading the dataset in memory",
        "busy": "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
        "a replica": "READONLY You can't write against a read only replica.",
        "no password": "NOAUTH Authentication required.",
        "no permission": "NOPERM User canary has no permissions to run the 'set' command",
        "moved": "MOVED 866 192.0.2.9:6379",
        "full": "OOM command not allowed when used memory > 'maxmemory'.",
        "its primary is down": "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
        "it cannot save": "MISCONF Errors writing to the AOF file: No space left on device",
    }
    return (
        *(Fault(name, f"-{line}\r\n".encode()) for name, line in lines.items()),
        Fault("loading from there on", f"-{lines['loading']}\r\n".encode(), times=None),
        Fault("password revoked", b"-WRONGPASS invalid username-password pair or user is disabled.\r\n", on="AUTH"),
        Fault("half of a bulk, then reset", half=True, then="reset", on="UNLINK"),
        Fault("reset before", then="reset"),
        Fault("reset after the effect", reaches=True, then="reset"),
        Fault("cut", cut=True, then="close"),
        Fault("hangs", then="hang"),
        Fault("hangs after the effect", reaches=True, then="hang", on="writes"),
        Fault("gone from there on", then="reset", times=None),
    )


def _redis_stand(_lab: Any, params: Params, stack: contextlib.ExitStack) -> tuple[Party, Params]:
    between = stack.enter_context(RedisInjector((params["redis_host"], params["redis_port"])))
    return between, {**params, "redis_port": between.port}


@contextlib.contextmanager
def _as_application(lab: Any, params: Params, _folder: Path) -> Iterator[Params]:
    """A user whose rights end at the application's own keys."""
    yield {**params, "redis_username": "app", "redis_password": application_word(lab, "REDIS_PASSWORD")}


REDIS = Service(
    "redis",
    _redis_faults(),
    {
        **tcp_places("redis_port", RedisInjector, {"redis_tls": True}),
        "wrong password": with_options(redis_password="canary-of-a-password"),
        "a user that may nothing": _as_application,
    },
    _redis_stand,
)


# --- the host, over its connection


@dataclasses.dataclass(frozen=True)
class HostFault(Fault):
    """``tools`` stand on the host's PATH before the real ones."""

    unreachable: bool = False
    status: int | None = None
    tools: tuple[tuple[str, str], ...] = ()


class Between(LocalHost):
    """The host beside us, behind a connection that breaks."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self.arm(None)

    def arm(self, fault: Fault | None, first: int = 1) -> None:
        self.fault, self.first, self.hits = fault, first, 0
        self.seen: list[Request] = []

    def run(self, command: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        writes = "mv -f" in command or "firebreak" not in command
        self.seen.append(Request("write" if "mv -f" in command else "reload" if writes else "compare", writes))
        fault = self.fault
        if not isinstance(fault, HostFault) or len(self.seen) < self.first or not fault.fits(self.seen[-1]):
            return super().run(command, stdin)
        if fault.times is not None and self.hits >= fault.times:
            return super().run(command, stdin)
        self.hits += 1
        return self._suffering(fault, command, stdin)

    def _suffering(self, fault: HostFault, command: str, stdin: bytes) -> tuple[int, bytes, bytes]:
        answer = (fault.status or 0, b"", b"canary of a shell's text")
        if fault.reaches or fault.tools:
            usual = self.path
            self.path = f"{self._tools(dict(fault.tools))}:{usual}"
            answer = super().run(command, stdin)
            self.path = usual
        if fault.unreachable:  # as the connection of the action says it
            raise FirebreakError(
                "the host cannot be reached over its connection; check ansible_host and the connection"
            )
        return answer

    def _tools(self, tools: dict[str, str]) -> Path:
        for name, script in tools.items():
            self._folder.mkdir(exist_ok=True)
            file = self._folder / name
            file.write_text(f"#!/bin/sh\n{script}\n")
            file.chmod(0o700)
        return self._folder


HOST = Service(
    "host",
    (
        HostFault("unreachable", unreachable=True),
        HostFault("unreachable from there on", unreachable=True, times=None),
        HostFault("connection lost after the effect", unreachable=True, reaches=True),
        HostFault("the shell dies", status=255),
        HostFault("the file cannot be written", tools=(("mv", "exit 1"),), on="write"),
        HostFault("no room beside the file", tools=(("mktemp", "exit 1"),), on="write"),
        HostFault("no awk there", tools=(("awk", "exit 127"),)),
        HostFault("the reload fails", status=3, on="reload"),
        HostFault("the reload fails after it worked", reaches=True, unreachable=True, on="reload"),
        HostFault("hangs", tools=(("awk", "exec sleep 30"), ("cat", "exec sleep 30"))),
    ),
    {},
    lambda lab, params, stack: (Between(Path(lab.dir) / "tools-of-the-test"), params),
)

SERVICES: dict[Any, Service] = {
    _cloudflare: CLOUDFLARE,
    _vault: VAULT,
    _postgresql: POSTGRESQL,
    _pgbouncer: PGBOUNCER,
    _redis: REDIS,
}


def services_of(control: str) -> list[Service]:
    """Everybody whom a control talks to, by what its specification says."""
    made = helpers.module_of(control).CONTROL
    options = spec_of(made)["argument_spec"]
    more = [CONSUMER] if {"proof", "proof_url"} & options.keys() else []
    return [SERVICES[made.service], *more, *([HOST] if made.needs_host else [])]
