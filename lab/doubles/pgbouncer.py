# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A router of connections to PostgreSQL that takes PgBouncer's file and its commands, where the real one is not here.

``python -m lab.doubles.pgbouncer FILE``. Pooling by transaction, SCRAM on both sides, users of ``auth_file`` and ``auth_query``.
It knows SHOW VERSION, CONFIG, DATABASES, POOLS, SERVERS and CLIENTS, PAUSE, RESUME, RELOAD, RECONNECT, WAIT_CLOSE, KILL,
DISABLE and ENABLE. What it does not know of the protocol: cancel requests, TLS, and statements prepared for longer than a transaction.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from .pgbouncer_wire import Goodbye, Line, Scram, Verifier, error, login, parameters, row_description, rows

VERSION = "PgBouncer 1.18.0"
CONSOLE = "pgbouncer"
TEXT, NUMBER = 25, 23
KNOWN_PARAMETERS = {"user", "database", "client_encoding", "datestyle", "timezone", "standard_conforming_strings"}
KNOWN_PARAMETERS |= {"application_name", "replication"}
NUMBERS = {"port", "local_port", "wait", "wait_us", "close_needed", "remote_pid"}
LINE_COLUMNS = [
    (name, NUMBER if name in NUMBERS else TEXT)
    for name in (
        "type", "user", "database", "state", "addr", "port", "local_addr", "local_port", "connect_time", "request_time", "wait",
        "wait_us", "close_needed", "ptr", "link", "remote_pid", "tls", "application_name",
    )
]  # fmt: skip
PAIR = re.compile(r"\s*([^\s=]+)\s*=\s*('(?:[^']|'')*'|\S*)")


class Settings:
    """The file, read whole: a mistake anywhere, and nothing of it is taken."""

    def __init__(self, path: Path) -> None:
        self.options: dict[str, str] = {}
        self.databases: dict[str, dict[str, str]] = {}
        section = ""
        for number, line in enumerate(path.read_text().splitlines(), 1):
            text = line.strip()
            if not text or text[0] in ";#":
                continue
            if text[0] == "[":
                section = text.strip("[]")
                continue
            name, equals, value = (word.strip() for word in text.partition("="))
            if not equals or (section == "databases" and not re.fullmatch(r"[\w.-]+|\*", name)):
                raise ValueError(f"syntax error in configuration ({path.name}:{number})")
            if section == "databases":
                pairs = self._pairs(value)
                if name != "*":  # nobody makes a database of any name here
                    self.databases[name] = pairs
            else:
                self.options[name] = value
        users = Path(self.options["auth_file"]).read_text()
        self.users = dict(re.findall(r'^"([^"]*)" "([^"]*)"', users, re.MULTILINE))

    @staticmethod
    def _pairs(text: str) -> dict[str, str]:
        if not re.fullmatch(rf"(?:{PAIR.pattern})*\s*", text):
            raise ValueError("syntax error in connection string")
        found = PAIR.findall(text)
        return {key: value[1:-1].replace("''", "'") if value.startswith("'") else value for key, value in found}

    def number(self, name: str, default: float) -> float:
        return float(self.options.get(name, default))


class Server:
    """One connection to a server; it is idle, or linked to one client until the end of a transaction."""

    def __init__(self, database: Database, user: str, line: Line) -> None:
        self.database = database
        self.user = user
        self.line = line
        self.generation = database.generation
        self.welcome = b""
        self.client: Client | None = None
        self.since = time.time()

    async def read(self) -> None:
        """Everything that the server says goes to the client, as long as it has one."""
        with contextlib.suppress(OSError, EOFError):
            while True:
                kind, body = await self.line.read()
                client = self.client
                if client is None:
                    continue
                client.line.send(kind, body)
                if kind == b"Z" and client.answered(body):
                    self.database.free(self)
        if self.client is not None and not self.line.closed:
            self.client.leave("server conn crashed?")
        self.database.drop(self)


class Database:
    """A line of the file, with its servers and clients."""

    def __init__(self, router: Router, name: str, pairs: dict[str, str]) -> None:
        self.router = router
        self.name = name
        self.pairs = pairs
        self.paused = self.disabled = False
        self.generation = 0
        self.servers: list[Server] = []
        self.opening: dict[str, int] = {}
        self.clients: list[Client] = []
        self.changed = asyncio.Condition()
        self.welcome: dict[str, bytes] = {}

    @property
    def host(self) -> str | None:
        return self.pairs.get("host")

    @property
    def port(self) -> int:
        return int(self.pairs.get("port", 5432))

    @property
    def size(self) -> int:
        return int(self.pairs.get("pool_size") or self.router.settings.number("default_pool_size", 20))

    @property
    def held(self) -> bool:
        return self.paused or self.router.paused

    def take(self, pairs: dict[str, str]) -> None:
        if pairs != self.pairs:
            self.pairs = pairs
            self.reconnect()

    def reconnect(self) -> None:
        self.generation += 1
        for server in [one for one in self.servers if one.client is None]:
            self.drop(server)

    def pause(self) -> None:
        self.paused = True
        self.reconnect()

    async def drained(self) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: not self.servers)

    async def settled(self) -> None:
        """No server is left that the file has led to before."""
        async with self.changed:
            await self.changed.wait_for(lambda: all(one.generation == self.generation for one in self.servers))

    def kill(self, why: str = "database removed") -> None:
        for client in list(self.clients):
            client.leave(why)
        for server in list(self.servers):
            self.drop(server)

    async def server_for(self, client: Client) -> Server:
        """An idle one, or a new one, as soon as that is allowed."""
        give_up = time.monotonic() + self.router.settings.number("query_wait_timeout", 120)
        client.waits_since = time.monotonic()
        try:
            while True:
                left = give_up - time.monotonic()
                if left <= 0:
                    raise Goodbye("query_wait_timeout")
                if not self.held and (server := self._idle(client.user)):
                    return server
                if not self.held and self._room(client.user) and (server := await self._open(client)):
                    return server
                with contextlib.suppress(TimeoutError):
                    retry = self.router.settings.number("server_login_retry", 15)
                    async with asyncio.timeout(min(left, retry)), self.changed:
                        await self.changed.wait()
        finally:
            client.waits_since = None

    def _idle(self, user: str) -> Server | None:
        return next((one for one in self.servers if one.user == user and one.client is None), None)

    def _room(self, user: str) -> bool:
        return sum(one.user == user for one in self.servers) + self.opening.get(user, 0) < self.size

    async def _open(self, client: Client) -> Server | None:
        """None where nothing answers there: it is tried again until the client's patience is over."""
        user = client.user
        self.opening[user] = self.opening.get(user, 0) + 1
        generation = self.generation
        try:
            line = await Line.open(self.host or "127.0.0.1", self.port)
            database = self.pairs.get("dbname", self.name)
            welcome = await login(line, {"user": user, "database": database}, client.proof)
        except (OSError, EOFError):
            return None
        finally:
            self.opening[user] -= 1
        if generation != self.generation or self.held:
            line.close()
            return None
        server = Server(self, user, line)
        server.welcome = self.welcome[user] = welcome
        self.servers.append(server)
        self.router.begin(server.read())
        return server

    def free(self, server: Server) -> None:
        """The transaction is over."""
        if server.client is not None:
            server.client.server = None
        server.client = None
        if server.generation != self.generation or self.held:
            self.drop(server)
        self.router.tell(self.changed)

    def drop(self, server: Server) -> None:
        server.line.close()
        if server in self.servers:
            self.servers.remove(server)
        self.router.tell(self.changed)


class Client:
    """One who came to us: lets himself be known, then gives transactions."""

    def __init__(self, router: Router, line: Line) -> None:
        self.router = router
        self.line = line
        self.user = self.name = ""
        self.database: Database | None = None
        self.proof: Scram | None = None
        self.server: Server | None = None
        self.expected = 0  # how many ReadyForQuery the server still owes
        self.partial = False  # messages without their Sync
        self.waits_since: float | None = None
        self.since = time.time()

    async def serve(self) -> None:
        try:
            await self._serve()
        except Goodbye as reason:
            self.line.send(b"E", error("FATAL", reason.text, reason.state))
        except (OSError, EOFError):
            pass
        finally:
            if self.database is not None and self in self.database.clients:
                self.database.clients.remove(self)
            if self.server is not None:  # in a transaction that nobody will end
                self.server.client = None
                self.server.database.drop(self.server)
            self.line.close()

    def leave(self, why: str) -> None:
        self.server = None
        self.line.send(b"E", error("FATAL", why, "08P01"))
        self.line.close()

    async def _serve(self) -> None:
        asked = await self.line.startup()
        known = KNOWN_PARAMETERS | set(self.router.settings.options.get("ignore_startup_parameters", "").split(","))
        for name in asked:
            if name.lower() not in known:
                raise Goodbye(f"unsupported startup parameter: {name}")
        self.user = asked.get("user", "")
        self.name = asked.get("database") or self.user
        if self.name == CONSOLE:
            await self._authenticate(self.router.settings.users.get(self.user))
            if self.user not in self.router.settings.options.get("admin_users", "").split(","):
                raise Goodbye("not allowed")
            self.line.send_raw(
                parameters({"server_version": f"{VERSION.split()[1]}/bouncer", "client_encoding": "UTF8"})
            )
            await self._console()
            return
        database = self.router.databases.get(self.name)
        if database is not None and database.disabled:
            raise Goodbye(f'database "{self.name}" is disabled')
        secret = self.router.settings.users.get(self.user)
        if secret is None and database is not None:
            secret = await self._looked_up(database)
        await self._authenticate(secret)
        if database is None:
            raise Goodbye(f"no such database: {self.name}")
        self.database = database
        database.clients.append(self)
        if self.user not in database.welcome:
            self.server = await database.server_for(self)
            self.server.client = self
            database.free(self.server)
        self.line.send_raw(database.welcome[self.user])
        await self._transactions(database)

    async def _looked_up(self, database: Database) -> str:
        """What the server knows of this user's password, asked as ``auth_user``."""
        asking = Client(self.router, self.line)
        asking.user = database.pairs.get("auth_user", "")
        asking.proof = Scram(self.router.settings.users.get(asking.user, ""))
        server = await database.server_for(asking)
        query = self.router.settings.options["auth_query"].replace("$1", "'" + self.user.replace("'", "''") + "'")
        asking.line = answers = Line.captured()
        asking.expected, server.client, asking.server = 1, asking, server
        server.line.send(b"Q", query.encode() + b"\0")
        while asking.server is not None and not server.line.closed:
            await asyncio.sleep(0.001)
        found = [body for kind, body in answers.taken if kind == b"D"]
        if not found:
            raise Goodbye("no such user")
        return str(rows(found[0])[1] or "")

    async def _authenticate(self, secret: str | None) -> None:
        verifier = Verifier(secret if secret is not None else secrets.token_hex(8))
        self.proof = await verifier.check(self.line, known=secret is not None)

    async def _transactions(self, database: Database) -> None:
        while True:
            kind, body = await self.line.read()
            if kind == b"X":
                return
            if self.server is None:
                server = await database.server_for(self)
                self.server, server.client = server, self
            self.partial = kind in (b"P", b"B", b"D", b"E", b"C", b"H") or (self.partial and kind not in (b"S", b"Q"))
            self.expected += kind in (b"Q", b"S", b"F")
            self.server.line.send(kind, body)
            await self.server.line.drain()

    def answered(self, status: bytes) -> bool:
        """Whether the transaction is over with this ReadyForQuery."""
        self.expected -= 1
        return self.expected <= 0 and status == b"I" and not self.partial

    # The console

    async def _console(self) -> None:
        self.line.send(b"Z", b"I")
        while True:
            kind, body = await self.line.read()
            if kind == b"X":
                return
            if kind != b"Q":
                raise Goodbye("extended query protocol not supported by admin console")
            command = body.rstrip(b"\0").decode().strip().rstrip(";")
            try:
                await self._obey(command)
            except Goodbye as reason:
                self.line.send(b"E", error("ERROR", reason.text, reason.state))
            self.line.send(b"Z", b"I")

    async def _obey(self, command: str) -> None:
        match = re.fullmatch(r'(\w+)(?:\s+("(?:[^"]|"")*"|[\w]+))?', command)
        verb, word = (match[1].upper(), match[2]) if match else ("", None)
        name = word[1:-1].replace('""', '"') if word and word[0] == '"' else word
        if verb == "SHOW" and name and name.upper() in self.router.shown:
            columns, values = self.router.shown[name.upper()]()
            self.line.send_raw(row_description(columns, values))
            self.line.send(b"C", b"SHOW\0")
        elif verb in ("PAUSE", "RESUME", "RECONNECT", "WAIT_CLOSE", "KILL", "DISABLE", "ENABLE", "RELOAD"):
            await self.router.do(verb, name)
            self.line.send(b"C", verb.encode() + b"\0")
        else:
            raise Goodbye(f"invalid command '{command}', use SHOW HELP;")


Table = tuple[list[tuple[str, int]], list[list[Any]]]


class Router:
    """The whole of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = Settings(path)
        self.databases: dict[str, Database] = {}
        self.paused = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.shown: dict[str, Callable[[], Table]] = {
            "VERSION": lambda: ([("version", TEXT)], [[VERSION]]),
            "CONFIG": self._config,
            "DATABASES": self._databases,
            "POOLS": self._pools,
            "SERVERS": self._servers,
            "CLIENTS": self._clients,
        }
        self._take()

    def _take(self) -> None:
        for name in self.databases.keys() - self.settings.databases.keys():
            self.databases.pop(name).kill()
        for name, pairs in self.settings.databases.items():
            if name in self.databases:
                self.databases[name].take(pairs)
            else:
                self.databases[name] = Database(self, name, pairs)

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def tell(self, condition: asyncio.Condition) -> None:
        async def notify() -> None:
            async with condition:
                condition.notify_all()

        self.begin(notify())

    async def do(self, verb: str, name: str | None) -> None:
        print(f"LOG {verb} command issued", file=sys.stderr, flush=True)
        if verb == "RELOAD":
            try:
                self.settings = Settings(self.path)
            except (
                ValueError,
                KeyError,
                OSError,
            ) as failure:  # as the real one: it says so in its log, and goes on as before
                print(f"config file loading failed: {failure}", file=sys.stderr, flush=True)
                return
            self._take()
            return
        if name is None and verb in ("PAUSE", "RESUME", "RECONNECT", "WAIT_CLOSE"):
            await self._all(verb)
            return
        database = self.databases.get(name or "")
        if database is None:
            raise Goodbye(f"no such database: {name}")
        if verb == "RESUME" and not database.paused:
            raise Goodbye(f"database {name} is not paused")
        if verb == "PAUSE":
            database.pause()
            await database.drained()
        elif verb == "WAIT_CLOSE":
            await database.settled()
        elif verb == "KILL":
            database.pause()
            database.kill()
        elif verb == "RESUME":
            database.paused = False
        elif verb == "RECONNECT":
            database.reconnect()
        else:
            database.disabled = verb == "DISABLE"
        self.tell(database.changed)

    async def _all(self, verb: str) -> None:
        if verb == "RESUME" and not self.paused:
            raise Goodbye("pooler is not paused/suspended")
        if verb in ("PAUSE", "RESUME"):
            self.paused = verb == "PAUSE"
        for database in list(self.databases.values()):
            if verb == "WAIT_CLOSE":
                await database.settled()
            elif verb != "RESUME":
                database.reconnect()
            if verb == "PAUSE":
                await database.drained()
            self.tell(database.changed)

    # What is shown

    def _config(self) -> Table:
        names: list[tuple[str, int]] = [("key", TEXT), ("value", TEXT), ("default", TEXT), ("changeable", TEXT)]
        values = {"conffile": str(self.path), **self.settings.options}
        return names, [[key, value, None, "yes"] for key, value in sorted(values.items())]

    def _databases(self) -> Table:
        names = ["name", "host", "port", "database", "force_user", "pool_size", "min_pool_size", "reserve_pool"]
        names += ["pool_mode", "max_connections", "current_connections", "paused", "disabled"]
        texts = {"name", "host", "database", "force_user", "pool_mode"}
        own = [
            CONSOLE,
            None,
            int(self.settings.number("listen_port", 0)),
            CONSOLE,
            CONSOLE,
            2,
            0,
            0,
            "statement",
            0,
            0,
            0,
            0,
        ]
        lines = [
            [one.name, one.host, one.port, one.pairs.get("dbname", one.name), None, one.size, 0, 0, None, 0,
             len(one.servers), int(one.paused), int(one.disabled)]
            for one in self.databases.values()
        ]  # fmt: skip
        return [(name, TEXT if name in texts else NUMBER) for name in names], sorted([*lines, own])

    def _pools(self) -> Table:
        names = [
            "database",
            "user",
            "cl_active",
            "cl_waiting",
            "cl_active_cancel_req",
            "cl_waiting_cancel_req",
            "sv_active",
        ]
        names += [
            "sv_active_cancel",
            "sv_being_canceled",
            "sv_idle",
            "sv_used",
            "sv_tested",
            "sv_login",
            "maxwait",
            "maxwait_us",
        ]
        lines: list[list[Any]] = []
        for one in self.databases.values():
            users = {client.user for client in one.clients} | {server.user for server in one.servers}
            for user in sorted(users):
                clients = [client for client in one.clients if client.user == user]
                servers = [server for server in one.servers if server.user == user]
                waits = [time.monotonic() - client.waits_since for client in clients if client.waits_since is not None]
                busy = sum(server.client is not None for server in servers)
                longest = max(waits, default=0.0)
                numbers = [len(clients) - len(waits), len(waits), 0, 0, busy, 0, 0, len(servers) - busy, 0, 0, 0]
                lines.append([one.name, user, *numbers, int(longest), int(longest % 1 * 1e6), "transaction"])
        columns = [(name, TEXT if name in ("database", "user") else NUMBER) for name in names]
        return [*columns, ("pool_mode", TEXT)], lines

    def _servers(self) -> Table:
        return LINE_COLUMNS, [
            _shown("S", server, one, "active" if server.client else "idle", [one.host, one.port],
                   int(server.generation != one.generation))
            for one in self.databases.values() for server in one.servers
        ]  # fmt: skip

    def _clients(self) -> Table:
        return LINE_COLUMNS, [
            _shown("C", client, one, "waiting" if client.waits_since is not None else "active", client.line.peer, 0)
            for one in self.databases.values() for client in one.clients
        ]  # fmt: skip

    async def run(self) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await Client(self, Line(reader, writer)).serve()

        options = self.settings.options
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await asyncio.start_server(serve, options["listen_addr"], int(options["listen_port"]), backlog=128)
        await stop.wait()


def _shown(kind: str, one: Server | Client, database: Database, state: str, place: list[Any], close: int) -> list[Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(one.since))
    return [kind, one.user, database.name, state, *place, "", 0, since, since, 0, 0, close, hex(id(one)), "", 0, "", ""]


async def main() -> None:
    await Router(Path(sys.argv[1])).run()


if __name__ == "__main__":
    asyncio.run(main())
