# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The host ``app``: an SSH server for the lab's one key, whose commands run as the lab's own user."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

import asyncssh

from . import files
from .process import SHIM

USER = "lab"
ALIAS = "lab-app"  # for who comes through a proxy


class Door(asyncssh.SSHServer):
    """One user, one key; nothing else."""

    def begin_auth(self, username: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return False


def make_keys(folder: Path, port: int) -> tuple[asyncssh.SSHKey, asyncssh.SSHKey]:
    host, client = (asyncssh.generate_private_key("ssh-ed25519") for _unused in range(2))
    files.write(folder / "client", client.export_private_key().decode())
    key = host.export_public_key().decode()
    files.write(folder / "known_hosts", f"[127.0.0.1]:{port},{ALIAS} {key}")
    return host, client


async def serve(options: argparse.Namespace) -> None:
    host, client = make_keys(options.keys, options.port)
    env = {"HOME": str(options.home), "PATH": os.environ["PATH"], "LANG": "C.UTF-8", "USER": USER}

    async def command(process: asyncssh.SSHServerProcess[bytes]) -> None:
        shell = ["/bin/sh", "-c", process.command] if process.command else ["/bin/sh"]
        if process.get_extra_info("username") != USER:
            process.exit(1)
            return
        ends = [*process.get_extra_info("peername")[:2], *process.get_extra_info("sockname")[:2]]
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-IS", SHIM, str(os.getpid()), str(int(signal.SIGKILL)), "0", *shell,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env={**env, "SSH_CONNECTION": " ".join(map(str, ends))}, cwd=options.home,
        )  # fmt: skip
        # The channel stays open until the exit status is sent: a client that sees the end of the output before closes it,
        # and then takes the missing status for a lost connection (OpenSSH's exits 255).
        await process.redirect(stdin=child.stdin, stdout=child.stdout, stderr=child.stderr, send_eof=False)
        code = await child.wait()
        await process.stdout.drain()
        await process.stderr.drain()
        process.exit(code if code >= 0 else 128 - code)

    server = await asyncssh.listen(
        "127.0.0.1",
        options.port,
        server_host_keys=[host],
        server_factory=Door,
        process_factory=command,
        authorized_client_keys=asyncssh.import_authorized_keys(client.export_public_key().decode()),
        encoding=None,
        sftp_factory=True,
        reuse_address=True,
    )
    await server.wait_closed()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--keys", type=Path, required=True)
    parser.add_argument("--home", type=Path, required=True)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
