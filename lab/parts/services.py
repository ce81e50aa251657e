# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Vault, S3, the edge, the victim application, its SSH host and the sinks."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import hmac
import http.client
import json
import os
import shutil
from collections.abc import Callable
from importlib import metadata, util
from typing import Any
from urllib.parse import urlsplit

from .. import LabError, files
from . import Site

APP_KEY = "app/backend"
BUCKET = "cases"


def real_program(name: str) -> str | None:
    """The real server, where there is one: on PATH, or what ``make real`` left in the user's cache folder.

    ``LAB_DOUBLES=vault,pgbouncer,versitygw`` takes the doubles all the same.
    """
    from .. import real

    if name in os.environ.get("LAB_DOUBLES", "").split(","):
        return None
    found = real.find(name)
    return str(found) if found else None


def request(
    method: str, url: str, body: Any = None, headers: dict[str, str] | None = None, source: str = "127.0.0.1"
) -> tuple[int, Any]:
    """One small HTTP request; the answer's JSON where it is JSON."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10, source_address=(source, 0))
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        connection.request(method, parts.path + (f"?{parts.query}" if parts.query else ""), data, headers or {})
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    try:
        return answer.status, json.loads(text)
    except ValueError:
        return answer.status, text.decode(errors="replace")


async def until(call: Callable[[], tuple[int, Any]], what: str, wanted: tuple[int, ...] = (200, 204)) -> Any:
    """Ask until the answer is right."""
    last: object = "no answer"
    for _unused in range(300):
        try:
            last, body = await asyncio.to_thread(call)
            if last in wanted:
                return body
        except (OSError, http.client.HTTPException) as error:
            last = type(error).__name__
        await asyncio.sleep(0.03)
    raise LabError(f"{what}: {last}")


def app_secrets(site: Site) -> dict[str, str]:
    """The fields of the application's key in Vault; its env file holds the same."""
    return {
        "JWT_SECRET": site.secrets["jwt"],
        "WEBHOOK_SECRET": site.secrets["webhook"],
        "BOT_TOKEN": site.secrets["bot"],
        "DATABASE_PASSWORD": site.secrets["app"],
        "SENTRY_DSN": f"https://{site.secrets['sentry']}@sentry.example.com/1",
    }


async def vault(site: Site) -> None:
    port, secret = site.port("vault"), site.secrets["vault"]
    # The real server reads the first two, the double the third: the token is in no list of processes.
    env = {
        "VAULT_DEV_ROOT_TOKEN_ID": secret,
        "VAULT_DEV_LISTEN_ADDRESS": f"127.0.0.1:{port}",
        "VAULT_DEV_ROOT_TOKEN": secret,
    }
    program = real_program("vault")
    if program:
        # Its standard output greets with the root token; what it logs goes elsewhere.
        process = site.process("vault", [program, "server", "-dev", "-dev-no-store-token"], env=env, mute=True)
    elif util.find_spec("lab.doubles.vault"):
        process = site.python("vault", "lab.doubles.vault", "--port", str(port), env=env)
    else:
        site.left_out("vault", "neither the real server nor its double is here")
        return
    await process.start()
    await process.listening(port)
    await seed_vault(site)
    _unused, health = await asyncio.to_thread(request, "GET", site.url("vault") + "/v1/sys/health")
    site.ready("vault", "real" if program else "double", f"Vault {health['version']}", site.url("vault"))


async def seed_vault(site: Site) -> None:
    def put(path: str, data: dict[str, str]) -> Callable[[], tuple[int, Any]]:
        headers = {"X-Vault-Token": site.secrets["vault"], "Content-Type": "application/json"}
        return lambda: request("POST", f"{site.url('vault')}/v1/secret/data/{path}", {"data": data}, headers)

    await until(put(APP_KEY, app_secrets(site)), "Vault does not take the application's secrets")
    await until(
        put("billing/gateway", {"API_KEY": site.secrets["bot"][::-1], "MERCHANT": "m-1001"}),
        "Vault does not take a key",
    )
    await until(
        put("app/frontend", {"PUBLIC_KEY": "pk-lab", "SENTRY_DSN": "https://sentry.example.com/2"}),
        "Vault does not take a key",
    )


async def s3(site: Site) -> None:
    port = site.port("s3")
    program = real_program("versitygw")
    if program:
        process = site.process("s3", _versitygw(site, program), env=_s3_keys(site))
    elif util.find_spec("moto"):
        process = site.python("s3", "moto.server", "-H", "127.0.0.1", "-p", str(port))
    else:
        site.left_out("s3", "neither versitygw nor moto is here")
        return
    await process.start()
    await process.listening(port)
    await until(lambda: request("PUT", f"{site.url('s3')}/{BUCKET}", b"", _signed(site)), "S3 does not make the bucket")
    version = "versitygw" if program else f"moto {metadata.version('moto')}"
    site.ready("s3", "real" if program else "double", version, site.url("s3"), bucket=BUCKET)


def _s3_keys(site: Site) -> dict[str, str]:
    return {"ROOT_ACCESS_KEY": site.secrets["s3_key"], "ROOT_SECRET_KEY": site.secrets["s3_secret"]}


def _versitygw(site: Site, program: str) -> list[str]:
    data, versions, sidecar = (site.run / "s3" / name for name in ("data", "versions", "sidecar"))
    for folder in (data, versions):
        folder.mkdir(parents=True, mode=0o700)
    words = [
        program,
        "--keep-alive",
        "--quiet",
        "--port",
        f"127.0.0.1:{site.port('s3')}",
        "posix",
        "--versioning-dir",
        str(versions),
    ]
    try:
        os.setxattr(data, "user.lab", b"1")
    except OSError:  # a file system without extended attributes
        sidecar.mkdir(mode=0o700)
        words += ["--sidecar", str(sidecar)]
    return [*words, str(data)]


def _signed(site: Site) -> dict[str, str]:
    """The headers of `PUT /cases` with Object Lock, signed: the one request that the lab itself sends to S3."""
    now = datetime.datetime.now(datetime.UTC)
    day, moment = now.strftime("%Y%m%d"), now.strftime("%Y%m%dT%H%M%SZ")
    empty = hashlib.sha256(b"").hexdigest()
    headers = {
        "host": f"127.0.0.1:{site.port('s3')}",
        "x-amz-bucket-object-lock-enabled": "true",
        "x-amz-content-sha256": empty,
        "x-amz-date": moment,
    }
    names = ";".join(headers)
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    canonical = f"PUT\n/{BUCKET}\n\n{lines}\n{names}\n{empty}"
    scope = f"{day}/us-east-1/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = f"AWS4{site.secrets['s3_secret']}".encode()
    for word in scope.split("/"):
        key = hmac.digest(key, word.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    credential = f"{site.secrets['s3_key']}/{scope}"
    return {
        **headers,
        "Authorization": f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders={names}, Signature={signature}",
    }


async def edge(site: Site) -> None:
    if not util.find_spec("lab.doubles.cloudflare"):
        site.left_out("cf", "the double of the edge is not here; the application is reached directly")
        return
    api, proxy = site.port("cf"), site.port("edge")
    process = site.python(
        "cf", "lab.doubles.cloudflare", "--port", str(api), "--proxy-port", str(proxy), "--origin", site.url("app"),
        "--account-id", site.cloudflare_account_id, "--zone-id", site.cloudflare_zone_id,
        env={"LAB_CLOUDFLARE_TOKEN": site.secrets["cloudflare"]},
    )  # fmt: skip
    await process.start()
    await process.listening(api)
    await process.listening(proxy)
    site.ready("cf", "double", "Cloudflare API v4", f"{site.url('cf')}/client/v4", proxy=site.url("edge"))


def app_url(site: Site) -> str:
    """Where users reach the application: through the edge, where there is one."""
    return site.url("edge" if "cf" in site.processes else "app")


async def app(site: Site) -> None:
    values = {**app_secrets(site), "REDIS_PASSWORD": site.secrets["redis_app"], "LOG_LEVEL": "info"}
    lines = ["# Read at the start and at each reload.", *(f"{name}={value}" for name, value in values.items())]
    files.write(site.app_dir / "app.env", "\n".join(lines) + "\n")
    files.write(site.app_dir / "reload", '#!/bin/sh\nexec kill -HUP "$(cat "$(dirname "$0")/app.pid")"\n', mode=0o700)
    env = {
        "PORT": site.port("app"),
        "PGHOST": "127.0.0.1",
        "PGPORT": site.port("pool1"),
        "PGDATABASE": "divan",
        "PGUSER": "app",
    }
    env |= {
        "REDIS_HOST": "127.0.0.1",
        "REDIS_PORT": site.port("cache1"),
        "REDIS_USERNAME": "app",
        "APP_DIR": site.app_dir,
    }
    process = site.python("app", "lab.app", env={name: str(value) for name, value in env.items()})
    await process.start()
    await process.listening(site.port("app"))
    files.write(site.app_dir / "app.pid", f"{process.pid}\n")
    site.ready("app", "real", "victim application", site.url("app"))


async def first_login(site: Site) -> None:
    """The lab counts as started when a user gets in."""
    person = {name: site.people[20][name] for name in ("email", "password")}
    headers = {"Content-Type": "application/json"}
    await until(
        lambda: request("POST", app_url(site) + "/api/auth/login", person, headers, source="127.0.2.21"),
        "nobody can log in",
    )
    site.ready("login", "real", "first successful login", app_url(site))


async def ssh(site: Site) -> None:
    if not shutil.which("ssh"):
        site.left_out("ssh", "no `ssh` on PATH: the host `app` is left out of the inventory")
        return
    if not util.find_spec("asyncssh"):
        site.left_out("ssh", "asyncssh is missing: the host `app` is left out of the inventory")
        return
    folder = site.run / "ssh"
    folder.mkdir(mode=0o700)
    process = site.python(
        "ssh", "lab.ssh", "--port", str(site.port("ssh")), "--keys", str(folder), "--home", str(site.app_dir)
    )
    await process.start()
    await process.listening(site.port("ssh"))
    site.ready("ssh", "real", f"asyncssh {metadata.version('asyncssh')}", f"ssh://127.0.0.1:{site.port('ssh')}")


async def sinks(site: Site) -> None:
    process = site.python(
        "sinks",
        "lab.sinks",
        "--mail-port",
        str(site.port("mail")),
        "--hook-port",
        str(site.port("hook")),
        "--dir",
        str(site.run),
    )
    await process.start()
    await process.listening(site.port("mail"))
    await process.listening(site.port("hook"))
    site.ready("sinks", "real", "mail and webhook servers", f"smtp://127.0.0.1:{site.port('mail')} {site.url('hook')}")
