# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A mail server and a webhook server that accept everything and keep it: ``mail.jsonl`` and ``hook.jsonl``."""

from __future__ import annotations

import argparse
import asyncio
import email
import email.policy
import json
import time
from pathlib import Path
from typing import Any

from aiosmtpd.smtp import SMTP

from . import files


class Kept:
    """One line a message, for the lab's user only."""

    def __init__(self, path: Path) -> None:
        self._file = files.appending(path)

    def add(self, **message: Any) -> None:
        self._file.write(json.dumps({"time": round(time.time(), 3), **message}) + "\n")
        self._file.flush()


class Mail:
    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        message = email.message_from_bytes(envelope.content, policy=email.policy.default)
        body = message.get_body(("plain", "html"))
        text = body.get_content() if body else ""
        self._kept.add(sender=envelope.mail_from, to=envelope.rcpt_tos, subject=str(message["Subject"]), text=text)
        return "250 OK"


async def hook(kept: Kept, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers ``ok``: chat services say just that, and their clients wait for it."""
    try:
        while line := await reader.readline():
            method, path, _unused = line.decode("latin-1").split(" ", 2)
            headers = {}
            while (line := await reader.readline()) not in (b"\r\n", b""):
                name, _unused, value = line.decode("latin-1").partition(":")
                headers[name.strip().lower()] = value.strip()
            body = await reader.readexactly(int(headers.get("content-length") or 0))
            kept.add(method=method, path=path, headers=headers, body=body.decode(errors="replace"))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok")
            await writer.drain()
    except (ValueError, OSError, asyncio.IncompleteReadError):
        pass  # not a request, or the client is gone
    finally:
        writer.close()


async def serve(options: argparse.Namespace) -> None:
    mails, hooks = Kept(options.dir / "mail.jsonl"), Kept(options.dir / "hook.jsonl")
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: SMTP(Mail(mails), enable_SMTPUTF8=True), "127.0.0.1", options.mail_port)
    server = await asyncio.start_server(lambda r, w: hook(hooks, r, w), "127.0.0.1", options.hook_port)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mail-port", type=int, required=True)
    parser.add_argument("--hook-port", type=int, required=True)
    parser.add_argument("--dir", type=Path, required=True)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
