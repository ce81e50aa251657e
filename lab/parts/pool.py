# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The pool of connections between the application and its database: PgBouncer, or a double that takes the same file."""

from __future__ import annotations

import subprocess
from pathlib import Path

from .. import files
from . import Site
from .services import real_program

# `divan` is the application's way to its database; `reports` is somebody else's.
SETTINGS = """\
[databases]
; host and port of a line say where its clients are led to
divan = host=127.0.0.1 port={primary} auth_user=pooler
reports = host=127.0.0.1 port={standby} dbname=divan auth_user=pooler pool_size=2

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {users}
auth_query = SELECT name, password FROM pooler.lookup($1)
admin_users = firebreak
pool_mode = transaction
default_pool_size = 12
server_login_retry = 0.3
query_wait_timeout = 5
ignore_startup_parameters = extra_float_digits,options
"""


def folder(site: Site) -> Path:
    return site.run / "pool1"


def settings_file(site: Site) -> Path:
    return folder(site) / "pgbouncer.ini"


async def pool(site: Site) -> None:
    """It needs no server yet: whoever comes before there is one waits."""
    home, port = folder(site), site.port("pool1")
    home.mkdir(mode=0o700)
    users = home / "userlist.txt"
    files.write(users, "".join(f'"{name}" "{site.secrets[name]}"\n' for name in ("firebreak", "pooler")))
    ports = {"primary": site.port("pg1"), "standby": site.port("pg2")}
    files.write(settings_file(site), SETTINGS.format(port=port, users=users, **ports))
    program = real_program("pgbouncer")
    if program:
        process = site.process(
            "pool1", [program, str(settings_file(site))], drop_root=True
        )  # it refuses to run as root
        version = _version(program)
    else:
        process = site.python("pool1", "lab.doubles.pgbouncer", str(settings_file(site)))
        version = "PgBouncer"
    await process.start()
    await process.listening(port)
    site.ready("pool1", "real" if program else "double", version, f"postgresql://127.0.0.1:{port}/divan")


def _version(program: str) -> str:
    shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=10)
    return shown.stdout.partition("\n")[0].strip() or "PgBouncer"
