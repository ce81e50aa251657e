# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The route of a database in the pool: its plans, and a run on the lab's pool, from the primary to the standby and back."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import strategies as st

from lab.files import write
from lab.parts.pool import SETTINGS
from tests.foreign import PoolFile
from tests.rows import Case, Reach, Row, Spoil, State

INCIDENT = "INC-2026-1120-001"
MARK = f"{INCIDENT}/1"
PRIMARY, STANDBY, ELSEWHERE = "192.0.2.10:5432", "192.0.2.11:5433", "192.0.2.12:5432"


def options(state: str = "enabled", mark: str | None = None, number: int = 1, **changed: Any) -> dict[str, Any]:
    own = {
        "routes": [{"database": "divan", "host": "192.0.2.11", "port": 5433}],
        "state": state,
        "conffile": None,
        "transaction_patience": 3.0,
        "previous": {"mark": mark} if mark else None,
    }
    return {**own, "incident_id": INCIDENT, "mark": f"{INCIDENT}/{number}", "round": number, **changed}


def line(route: str | None, running: str, mark: str | None = None, **more: Any) -> dict[str, Any]:
    """As the file and the pool say it; what the pool has not taken up has a holder only."""
    own = {"route": route, "running": running, "holder": mark, "original": PRIMARY if mark else None}
    settled = (route == running and not more.get("paused")) or route == PRIMARY
    return {**own, "mark": mark if settled else None, "fallback": False, "paused": False, **more}


def facts(*lines: Any, **more: Any) -> dict[str, Any]:
    return {"routes": {"divan": line(*lines, **more)}}


CREATE, DELETE = ("create", f"mark {MARK} at divan"), ("delete", f"mark {MARK} at divan")
ROUTE, SWITCH = ("update", "route of divan"), ("run", "switch of divan")
OPEN, LED = facts(PRIMARY, PRIMARY), facts(STANDBY, STANDBY, MARK)
SHUT = facts("closed", "closed", MARK)
NOWHERE = [{"database": "divan", "host": None, "port": 5432}]

PLANS = [
    Case("a primary's clients", options(), OPEN, [CREATE, ROUTE, SWITCH], LED),
    Case("nothing to do", options(), LED, [], LED),
    Case("cut off after the mark", options(), facts(PRIMARY, PRIMARY, MARK), [ROUTE, SWITCH], LED),
    Case("cut off before the switch", options(), facts(STANDBY, PRIMARY, MARK), [SWITCH], LED),
    Case("cut off while it held", options(), facts(STANDBY, PRIMARY, MARK, paused=True), [SWITCH], LED),
    Case("cut off before RESUME", options(), facts(STANDBY, STANDBY, MARK, paused=True), [SWITCH], LED),
    Case("led there before", options(), facts(STANDBY, STANDBY), [CREATE], facts(STANDBY, STANDBY, MARK, original=STANDBY)),
    Case("taken up by nobody yet", options(), facts(STANDBY, PRIMARY), [CREATE, SWITCH], facts(STANDBY, STANDBY, MARK, original=STANDBY)),
    Case("a person led them elsewhere", options(), facts(ELSEWHERE, ELSEWHERE, MARK), [ROUTE, SWITCH], LED),
    Case("a second round", options(number=2), LED, [("create", f"mark {INCIDENT}/2 at divan")], facts(STANDBY, STANDBY, f"{INCIDENT}/2")),
    Case("closed", options(routes=NOWHERE), OPEN, [CREATE, ROUTE, SWITCH], SHUT),
    Case("closed already", options(routes=NOWHERE), SHUT, [], SHUT),
    Case("closed with a line for all", options(routes=NOWHERE), facts(PRIMARY, PRIMARY, fallback=True), raises="cannot be closed"),
    Case("no line of its own", options(), facts(None, "closed"), raises="no line of its own"),
    Case("paused by a person", options(), facts(PRIMARY, PRIMARY, paused=True), raises="paused by somebody else"),
    Case("another incident's", options(), facts(STANDBY, STANDBY, "INC-2026-0101-007/1"), raises="INC-2026-0101-007/1"),
    Case("not ours to lift", options("disabled"), facts(STANDBY, STANDBY, "INC-2026-0101-007/1"), raises="INC-2026-0101-007/1"),
    Case("an id that ours begins", options(), facts(STANDBY, STANDBY, f"{INCIDENT}9/1"), raises=f"{INCIDENT}9/1"),
    Case("undo", options("disabled"), LED, [ROUTE, SWITCH, DELETE], OPEN),
    Case("undo of a closed one", options("disabled"), SHUT, [ROUTE, SWITCH, DELETE], OPEN),
    Case("undo cut off before the switch", options("disabled"), facts(PRIMARY, STANDBY, MARK), [SWITCH, DELETE], OPEN),
    Case("undo cut off before RESUME", options("disabled"), facts(PRIMARY, PRIMARY, MARK, paused=True), [SWITCH, DELETE], OPEN),
    Case("undo cut off before the mark", options("disabled"), facts(PRIMARY, PRIMARY, MARK), [DELETE], OPEN),
    Case("undo of a second round", options("disabled", MARK, 2), facts(STANDBY, STANDBY, f"{INCIDENT}/2"), [CREATE], LED),
    Case("undo twice", options("disabled"), OPEN, [], OPEN),
    Case("nothing of ours, and paused", options("disabled"), facts(PRIMARY, PRIMARY, paused=True), []),
    Case("back again under its mark", options(mark=MARK, number=2), OPEN, [CREATE, ROUTE, SWITCH], LED),
    Case("no database", options(routes=[]), OPEN, raises="at least one database"),
    Case("one twice", options(routes=NOWHERE * 2), OPEN, raises="each once"),
    Case("the console", options(routes=[{"database": "pgbouncer", "host": "x", "port": 1}]), OPEN, raises="name of a database"),
    Case("a name with a space", options(routes=[{"database": "a b", "host": "x", "port": 1}]), OPEN, raises="name of a database"),
    Case("a host with more", options(routes=[{"database": "divan", "host": "x port=1", "port": 1}]), OPEN, raises="host is a name"),
    Case("no patience", options(transaction_patience=0.0), OPEN, raises="transaction_patience"),
]  # fmt: skip


def connection(lab: Any) -> dict[str, Any]:
    """The options that the inventory gives to the controls of this host."""
    values = lab.hostvars("pg1").items()
    own = {key.removeprefix("firebreak_"): value for key, value in values if key.startswith("firebreak_pgbouncer_")}
    return {key: value for key, value in own.items() if key != "pgbouncer_routes"}


def client(lab: Any, user: str = "app", database: str = "divan", **more: Any) -> psycopg.Connection[Any]:
    """A client of the pool, as anybody is one."""
    known = lab.hostvars("pg1")
    if user == "app":
        lines = (lab.dir / "app" / "app.env").read_text().splitlines()
        password = next(one.removeprefix("DATABASE_PASSWORD=") for one in lines if one.startswith("DATABASE_PASSWORD="))
    else:
        password = known["firebreak_pgbouncer_password"]
    return psycopg.connect(
        host="127.0.0.1",
        port=known["firebreak_pgbouncer_port"],
        dbname=database,
        user=user,
        password=password,
        autocommit=True,
        prepare_threshold=None,
        connect_timeout=10,
        **more,
    )


def console(lab: Any) -> psycopg.Connection[Any]:
    return client(lab, "firebreak", "pgbouncer", cursor_factory=psycopg.ClientCursor)


def settings_file(lab: Any) -> Path:
    return Path(lab.dir) / "run" / "pool1" / "pgbouncer.ini"


def untouched(lab: Any, state: State | None = None) -> str:
    """The file as the lab has written it, with the line and the others' lines of this state."""
    state = state or {}
    ports = ports_of(lab)
    port = lab.hostvars("pg1")["firebreak_pgbouncer_port"]
    text = SETTINGS.format(port=port, users=settings_file(lab).with_name("userlist.txt"), **ports)
    usual = LINES[0].format(port=ports["primary"])
    assert text.count(f"{usual}\n") == 1
    own = state.get("line", LINES[0]).format(port=ports["primary"])
    mark = f";firebreak {state['mark']} {own}\n" if state.get("mark") else ""
    text = text.replace(f"{usual}\n", f"{mark}{own}\n")
    more = [one.format(port=ports["primary"]) for one in state.get("others", OTHERS[:1])]
    text = text.replace("[pgbouncer]", "".join(f"{one}\n" for one in more) + "\n[pgbouncer]")
    return text if state.get("last end", True) else text.rstrip("\n")


def ports_of(lab: Any) -> dict[str, int]:
    hosts = {"primary": "pg1", "standby": "pg2"}
    return {name: lab.hostvars(host)["firebreak_postgresql_port"] for name, host in hosts.items()}


def reset(lab: Any, state: State | None = None) -> None:
    write(settings_file(lab), untouched(lab, state), (state or {}).get("mode", 0o600))
    with console(lab) as pool:
        for row in pool.execute("SHOW DATABASES").fetchall():
            if row[11]:
                pool.execute(f'RESUME "{row[0]}"')
        pool.execute("RELOAD")
        if state and state.get("paused"):
            pool.execute("PAUSE divan")


def where(session: psycopg.Connection[Any]) -> list[Any]:
    return list(session.execute("SELECT pg_is_in_recovery(), inet_server_port()").fetchone() or ())


LINES = (
    "divan = host=127.0.0.1 port={port} auth_user=pooler",
    "divan=port={port} host=127.0.0.1 auth_user=pooler pool_size=5",
    "  divan =  dbname='divan' auth_user=pooler host='127.0.0.1'   port='{port}' application_name='it''s it' ",
)
# The same lines, led elsewhere.
LED_LINES = (LINES[0], LINES[1], LINES[2].replace("'127.0.0.1'", "127.0.0.1").replace("'{port}'", "{port}"))
OTHERS = (
    "archive = host=127.0.0.1 port=1 password='it''s old'",
    "; divan = host=192.0.2.1",
    ";firebreak",
    "# divan = by hand",
    "divan_2 = host=127.0.0.1 port={port}",
    "* = host=127.0.0.1 port={port}",
)
MARKED = "INC-2020-0101-001/1"


class Lab(Row):
    control = "pgbouncer_route"
    host = "pg1"
    touches = ("pool",)
    # A line of somebody else's in the same file, and somebody who is connected all the time.
    usual = {"line": LINES[0], "others": list(OTHERS[:1])}

    def params(self, lab: Any) -> dict[str, Any]:
        return {"routes": lab.hostvars("pg1")["firebreak_pgbouncer_routes"], **connection(lab)}

    def prepare(self, lab: Any) -> None:
        super().prepare(lab)
        self.begun = client(lab)
        assert where(self.begun) == [False, lab.hostvars("pg1")["firebreak_postgresql_port"]]

    def states(self) -> st.SearchStrategy[State]:
        standby = {"host": "127.0.0.1"}
        routes = st.sampled_from(
            [None, None, None, [{"database": "divan"}], [{"database": "nowhere", **standby}], [{"database": "divan_2"}]]
        )
        return st.fixed_dictionaries(
            {
                "line": st.sampled_from(LINES),
                "others": st.lists(st.sampled_from(OTHERS), max_size=4, unique=True),
                "last end": st.booleans(),
                "mode": st.sampled_from([0o600, 0o640, 0o444]),
            },
            optional={
                "routes": routes,
                "paused": st.sampled_from([False, False, True]),
                "mark": st.sampled_from(["", "", MARKED]),
            },
        )

    def bring(self, lab: Any, state: State) -> None:
        reset(lab, state)

    def asked(self, lab: Any, state: State) -> dict[str, Any]:
        return {**self.params(lab), **({"routes": state["routes"]} if state.get("routes") else {})}

    def refusal(self, lab: Any, state: State) -> str | None:
        (route,) = self.asked(lab, state)["routes"]
        name = route["database"]
        if name == "divan" and state.get("mark"):
            return f"divan is led elsewhere under {MARKED}"
        if name == "divan" and state.get("paused"):
            return "divan is paused by somebody else"
        if name == "nowhere" or (name == "divan_2" and OTHERS[4] not in state["others"]):
            return f"routes: {name} has no line of its own"
        if not route.get("host") and OTHERS[5] in state["others"]:
            return f"routes: {name} cannot be closed"
        return None

    def effect(self, lab: Any, state: State, before: dict[str, Any], seen: dict[str, Any]) -> None:
        before, seen = before["pool"], seen["pool"]
        (route,) = self.asked(lab, state)["routes"]
        name, ports = route["database"], ports_of(lab)
        line = (state.get("line", LINES[0]) if name == "divan" else OTHERS[4]).format(port=ports["primary"])
        led = (
            dict(zip(LINES, LED_LINES, strict=True)).get(state.get("line", LINES[0]), "").format(port=ports["standby"])
        )
        (comment,) = [
            one for one in seen["file"].splitlines() if one.startswith(";firebreak INC-") and MARKED not in one
        ]
        assert comment.endswith(f"/1 {line}")
        instead = f"{comment}\n{led}\n" if route.get("host") else f"{comment}\n"
        assert seen["file"] == before["file"].replace(f"\n{line}\n", f"\n{instead}", 1)
        assert seen["mode"] == before["mode"]
        if route.get("host"):
            before["routes"][name][1] = ports["standby"]
        else:
            del before["routes"][name]
        assert seen["routes"] == before["routes"]

    def spoils(self, lab: Any) -> dict[str, Spoil]:
        def edit(change: Callable[[str], str]) -> Callable[[], None]:
            def make() -> None:
                file = settings_file(lab)
                file.write_text(change(file.read_text()))

            return make

        def there(pattern: str, times: int = 1) -> Callable[[], bool]:
            return lambda: len(re.findall(pattern, settings_file(lab).read_text(), re.MULTILINE)) == times

        ours = r"^;firebreak INC-\S+ divan.*\n"
        return {
            "led elsewhere": Spoil(
                edit(lambda text: re.sub(r"(?m)^(divan = .*port=)\d+", r"\g<1>1", text)), there(r"^divan = .*port=1 ")
            ),
            "given more": Spoil(
                edit(lambda text: re.sub(r"(?m)^(divan = .*)$", r"\1 pool_size=3", text)), there("size=3$")
            ),
            "put back": Spoil(
                edit(lambda text: re.sub(r"(?m)^(;firebreak INC-\S+ )(.*)\ndivan = .*$", r"\1\2\n\2", text)),
                there(ours),
                conflict=False,
            ),
            "unmarked": Spoil(edit(lambda text: re.sub(f"(?m){ours}", "", text)), there(ours, 0), theirs=True),
            "another's mark": Spoil(
                edit(lambda text: re.sub(r";firebreak INC-\S+", f";firebreak {MARKED}", text)),
                there(f"^;firebreak {MARKED}"),
                theirs=True,
            ),
        }

    def observe(self, lab: Any) -> dict[str, Any]:
        file = settings_file(lab)
        with console(lab) as pool:
            rows = pool.execute("SHOW DATABASES").fetchall()
        return {
            "file": file.read_text(),
            "mode": stat.filemode(file.stat().st_mode),
            "beside it": sorted(entry.name for entry in file.parent.iterdir()),
            "databases": {row[0]: [row[1], row[2], row[3], row[11], row[12]] for row in rows},
            "a new client": None if any(row[11] for row in rows) else self._arrives(lab),
        }

    @staticmethod
    def _arrives(lab: Any) -> list[Any]:
        with client(lab) as session:
            return where(session)

    def contained(self, lab: Any, before: dict[str, Any], seen: dict[str, Any]) -> None:
        primary, standby = (lab.hostvars(name)["firebreak_postgresql_port"] for name in ("pg1", "pg2"))
        line = f"divan = host=127.0.0.1 port={primary} auth_user=pooler\n"
        led = line.replace(str(primary), str(standby))
        comment, _space, rest = seen["file"].partition(line)
        assert (comment + rest.removeprefix(led)) == before["file"].replace(line, comment.rpartition("\n")[2])
        assert comment.rpartition("\n")[2].startswith(";firebreak INC-")
        assert seen["databases"]["divan"] == ["127.0.0.1", standby, "divan", 0, 0]
        others = ({**one["databases"], "divan": 0} for one in (before, seen))
        assert next(others) == next(others)
        assert all(seen[name] == before[name] for name in ("mode", "beside it"))
        assert seen["a new client"] == where(self.begun) == [True, standby]  # nobody had to connect again
        with client(lab) as session:
            session.execute("SET default_transaction_read_only = off")
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                session.execute("UPDATE users SET note = 'tampered' WHERE id = 1")

    def secrets(self, lab: Any) -> list[str]:
        words = (settings_file(lab).with_name("userlist.txt")).read_text().split('"')
        return [word for word in words if len(word) > 20]

    def foreign(self, lab: Any) -> PoolFile:
        return PoolFile(lab)

    def reach(self, lab: Any) -> Reach:
        return Reach()
