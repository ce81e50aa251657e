# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Other clients of the lab's servers, who work on what is theirs while a control works on what is its own.

Each speaks to its service by itself and remembers what it last wrote there, which is the truth about what must stand.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import redis

from tests import dumps

PATIENCE = 10.0
ROTATED = dumps.ROTATED


class Foreign:
    """One other client. ``edit`` makes one change of what is its own, ``found`` reads that, ``written`` is what it wrote last;
    ``rest`` is what it sees of everything else. ``steady`` is False where it could itself overwrite what we write at the same
    moment, since the service has nothing to compare with: then it edits only where the control is held."""

    steady = True
    pauses = (0.002, 0.03)  # between two edits, at least and at most

    def __init__(self, lab: Any) -> None:
        self.lab = lab
        self.random = random.Random(7)
        self.number = 0
        self.written: Any = None
        self.incident = "*"  # whose evidence is looked at

    @property
    def edits(self) -> list[Callable[[], None]]:
        raise NotImplementedError

    def found(self) -> Any:
        raise NotImplementedError

    def rest(self) -> Any:
        raise NotImplementedError

    def edit(self) -> None:
        """The kinds of edits in turn, so that each comes up however few there are."""
        self.number += 1
        self.edits[self.number % len(self.edits)]()

    def holds(self) -> None:
        assert self.found() == self.written

    def close(self) -> None:
        """Its connections, and what would be in the way of others."""


# --- the edge


class Edge(Foreign):
    """Rules in the same ruleset, at every place of it, and entries of lists; with ``shared``, in the list that we add to."""

    pauses = (0.1, 0.4)  # the service does one operation on lists at a time

    def __init__(self, lab: Any, shared: str | None = None, entries: int = 2000) -> None:
        super().__init__(lab)
        known = lab.hostvars("cf")
        self.account, self.zone = known["firebreak_cloudflare_account_id"], known["firebreak_cloudflare_zone_id"]
        self.rules_at = f"/zones/{self.zone}/rulesets/{self._entry_point()['id']}/rules"
        self.rules = [rule for rule in self._entry_point()["rules"] if not _is_ours(rule.get("ref"))]
        lists_at = f"/accounts/{self.account}/rules/lists"
        listed = {each["name"]: each["id"] for each in self._ask("GET", lists_at)}
        if shared and shared not in listed:
            made = self._ask("POST", lists_at, {"name": shared, "kind": "ip", "description": "of somebody else"})
            listed[shared] = made["id"]
        self.lists = listed if shared else {name: listed[name] for name in listed if not name.startswith("attackers")}
        self.entries = {name: self._items(place) for name, place in self.lists.items()}
        self.busy = shared or "scanners"
        if shared:
            # Networks within, around and beside those of the row.
            new = {f"198.18.{n % 256}.{(n // 256) * 16}/28": f"ticket {n}" for n in range(entries)}
            new |= {"198.18.0.0/17": "wide", "2001:db8:bad:7::/64": "narrow", "198.51.100.64/26": "around"}
            self._add(new)
        self.written = self._written()

    def _written(self) -> Any:
        return {"rules": self.rules, "entries": self.entries}

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        """The service's own API; while it is busy with somebody else's operation it is asked again."""
        place = urllib.parse.urlsplit(self.lab.env["LAB_CLOUDFLARE_URL"])
        give_up = time.monotonic() + PATIENCE
        while True:
            connection = http.client.HTTPConnection(place.netloc, timeout=10)
            headers = {"Authorization": f"Bearer {self.lab.env['LAB_CLOUDFLARE_TOKEN']}"}
            connection.request(method, place.path + path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            content = json.loads(answer.read() or b"{}")
            connection.close()
            if answer.status != 429 or time.monotonic() > give_up:
                break
            time.sleep(0.01)
        assert answer.status == 200, (method, path, content)
        self.cursor = ((content.get("result_info") or {}).get("cursors") or {}).get("after")
        return content["result"]

    def _entry_point(self) -> Any:
        return self._ask("GET", f"/zones/{self.zone}/rulesets/phases/http_request_firewall_custom/entrypoint")

    def _items(self, place: str) -> dict[str, str | None]:
        dump = dumps.edge(self.lab)["lists"]
        known = next(each for each in dump if each["id"] == place)
        return {item["ip"]: item.get("comment") for item in known["items"] if not _is_ours(item.get("comment"))}

    @property
    def edits(self) -> list[Callable[[], None]]:
        return [self._change, self._list, self._insert, self._move, self._unlist, self._remove]

    def edit(self) -> None:
        super().edit()
        self.written = self._written()

    def _rule(self) -> dict[str, Any]:
        path = f'http.request.uri.path eq "/foreign-{self.number}"'
        return {"action": "block", "expression": path, "description": f"by hand {self.number}", "enabled": True}

    def _read(self, rule_id: str) -> Any:
        return next(rule for rule in self._entry_point()["rules"] if rule["id"] == rule_id)

    def _change(self) -> None:
        place = self.random.randrange(3, len(self.rules))
        rule_id = self.rules[place]["id"]
        answer = self._ask("PATCH", f"{self.rules_at}/{rule_id}", self._rule())
        self.rules[place] = next(rule for rule in answer["rules"] if rule["id"] == rule_id)

    def _place(self) -> tuple[int, dict[str, str]]:
        """A place among its own rules, and how that is said."""
        place = self.random.randrange(len(self.rules) + 1)
        if place == 0:
            return place, {"before": ""}
        return (place, {"after": ""}) if place == len(self.rules) else (place, {"before": self.rules[place]["id"]})

    def _insert(self) -> None:
        place, position = self._place()
        known = {rule["id"] for rule in self.rules}
        ref = f"foreign_{self.number}"
        answer = self._ask("POST", self.rules_at, {**self._rule(), "ref": ref, "position": position})
        new = next(rule for rule in answer["rules"] if rule["ref"] == ref and rule["id"] not in known)
        self.rules.insert(place, new)

    def _move(self) -> None:
        rule = self.rules.pop(self.random.randrange(3, len(self.rules)))
        place, position = self._place()
        self._ask("PATCH", f"{self.rules_at}/{rule['id']}", {"position": position})
        self.rules.insert(place, rule)

    def _remove(self) -> None:
        rule = self.rules.pop(self.random.randrange(3, len(self.rules)))
        self._ask("DELETE", f"{self.rules_at}/{rule['id']}")

    def _operate(self, method: str, body: Any) -> None:
        base = f"/accounts/{self.account}/rules/lists"
        asked = self._ask(method, f"{base}/{self.lists[self.busy]}/items", body)["operation_id"]
        give_up = time.monotonic() + PATIENCE
        while (state := self._ask("GET", f"{base}/bulk_operations/{asked}"))["status"] in ("pending", "running"):
            assert time.monotonic() < give_up
            time.sleep(0.01)
        assert state["status"] == "completed", state

    def _add(self, new: dict[str, str]) -> None:
        self._operate("POST", [{"ip": ip, "comment": comment} for ip, comment in new.items()])
        self.entries[self.busy].update(new)

    def _list(self) -> None:
        """New entries, and other comments for old ones."""
        known = [ip for ip in self.entries[self.busy] if "/" in ip or self.busy == "scanners"]
        old = self.random.sample(known, min(5, len(known)))
        new = [f"198.19.{self.number % 250}.{n}" for n in range(5)]
        self._add(dict.fromkeys((*old, *new), f"ticket {self.number}"))

    def _unlist(self) -> None:
        gone = self.random.sample(sorted(self.entries[self.busy]), 3)
        dump = next(each for each in dumps.edge(self.lab)["lists"] if each["id"] == self.lists[self.busy])
        self._operate("DELETE", {"items": [{"id": item["id"]} for item in dump["items"] if item["ip"] in gone]})
        for ip in gone:
            del self.entries[self.busy][ip]

    def found(self) -> Any:
        rules = [rule for rule in self._entry_point()["rules"] if not _is_ours(rule.get("ref"))]
        return {"rules": rules, "entries": {name: self._items(place) for name, place in self.lists.items()}}

    def rest(self) -> Any:
        """Our rule, and our entries and lists, without what the service makes up."""
        dump = dumps.edge(self.lab)
        fields = ("ref", "action", "expression", "enabled", "description")
        rules = [rule for each in dump["rulesets"] for rule in each["rules"] if _is_ours(rule.get("ref"))]
        items = [(each["name"], item) for each in dump["lists"] for item in each["items"]]
        return {
            "rules": [{name: rule.get(name) for name in fields} for rule in rules],
            "lists": sorted([each["name"], each.get("description")] for each in dump["lists"]),
            "entries": sorted((name, item["ip"]) for name, item in items if _is_ours(item.get("comment"))),
        }


def _is_ours(text: Any) -> bool:
    return bool(re.match(r"(firebreak_)?INC-", str(text or "")))


# --- PostgreSQL


class Database(Foreign):
    """Roles, a database, the server's configuration, and other settings of the very roles that a lock is about."""

    PARAMETERS = ("log_min_duration_statement", "deadlock_timeout", "cursor_tuple_fraction")

    def __init__(self, lab: Any, shared: tuple[str, ...] = ()) -> None:
        super().__init__(lab)
        self.session: Any = None
        self.shared = shared
        for name in ("foreign_a", "foreign_b", "foreign_reader"):
            if not self._ask("SELECT 1 FROM pg_roles WHERE rolname = %s", name):
                self._run(f"CREATE ROLE {name} LOGIN")
        if not self._ask("SELECT 1 FROM pg_database WHERE datname = 'foreign_db'"):
            self._run("CREATE DATABASE foreign_db TEMPLATE template0")
        self.written = self.found()

    def _connect(self) -> Any:
        if self.session is None or self.session.closed:
            known = self.lab.hostvars("pg1")
            self.session = psycopg.connect(
                host="127.0.0.1",
                port=known["firebreak_postgresql_port"],
                dbname="divan",
                user="postgres",
                password=self.lab.env["PGPASSWORD"],
                options="-c default_transaction_read_only=off",
                autocommit=True,
                connect_timeout=5,
            )
        return self.session

    def _ask(self, query: Any, *values: Any) -> list[Any]:
        """A fence ends this session, and two writers of one role's row cannot both win: then it is said again."""
        give_up = time.monotonic() + PATIENCE
        while True:
            try:
                done = self._connect().execute(query, values or None)
                return done.fetchall() if done.description else []
            except (psycopg.OperationalError, psycopg.errors.InternalError_):
                if time.monotonic() > give_up:
                    raise
                if self.session is not None and self.session.broken:
                    self.session.close()

    def _run(self, statement: str) -> None:
        self._ask(statement)

    @property
    def edits(self) -> list[Callable[[], None]]:
        edits = [self._role, self._parameter, self._setting, self._come_and_go, self._database, self._comment]
        return [*edits, self._sibling] if self.shared else edits

    def _role(self) -> None:
        until, limit = f"2031-01-{1 + self.number % 28:02d}", self.number % 90 + 1
        self._run(f"ALTER ROLE foreign_a VALID UNTIL '{until} 00:00:00+00' CONNECTION LIMIT {limit}")
        self.written["roles"]["foreign_a"][2:4] = [limit, f"{until} 00:00:00+00"]

    def _sibling(self) -> None:
        name = self.random.choice(self.shared)
        limit = self.number % 90 + 1
        self._run(f"ALTER ROLE {name} CONNECTION LIMIT {limit}")
        self.written["siblings"][name]["limit"] = limit
        self._run(f"ALTER ROLE {name} SET statement_timeout = '{self.number}s'")
        settings = self.written["siblings"][name]["settings"]
        settings["statement_timeout"] = f"{self.number}s"

    def _parameter(self) -> None:
        name = self.random.choice(self.PARAMETERS)
        value = {"cursor_tuple_fraction": f"0.{self.number % 9 + 1}"}.get(name, f"{self.number % 500 + 1}s")
        if self.random.random() < 0.3:
            self._run(f"ALTER SYSTEM RESET {name}")
            self.written["configuration"].pop(name, None)
        else:
            self._run(f"ALTER SYSTEM SET {name} = '{value}'")
            self.written["configuration"][name] = f"'{value}'"

    def _setting(self) -> None:
        self._run(f"ALTER ROLE foreign_b SET work_mem = '{64 + self.number}kB'")
        self.written["settings"]["foreign_b"] = [f"work_mem={64 + self.number}kB"]

    def _come_and_go(self) -> None:
        there = [name for name in self.written["roles"] if name.startswith("foreign_new_")]
        for name in there[2:]:
            self._run(f"DROP ROLE IF EXISTS {name}")
            del self.written["roles"][name]
        name = f"foreign_new_{self.number}"
        self._run(f"DROP ROLE IF EXISTS {name}; CREATE ROLE {name} NOLOGIN")
        self.written["roles"][name] = [False, False, -1, None, None]

    def _database(self) -> None:
        self._run(f"ALTER DATABASE foreign_db CONNECTION LIMIT {self.number}")
        self.written["database"] = [[self.number, True]]

    def _comment(self) -> None:
        self._run(f"COMMENT ON ROLE foreign_reader IS 'reader {self.number}'")
        self.written["roles"]["foreign_reader"][4] = f"reader {self.number}"

    def found(self) -> Any:
        roles = self._ask(
            "SELECT rolname, rolcanlogin, rolsuper, rolconnlimit, (rolvaliduntil AT TIME ZONE 'UTC')::text || '+00',"
            " shobj_description(oid, 'pg_authid') FROM pg_authid WHERE starts_with(rolname, 'foreign_') ORDER BY 1"
        )
        settings = self._ask(
            "SELECT rolname, rolconfig FROM pg_roles WHERE rolconfig IS NOT NULL AND rolname <> ALL (%s)",
            list(self.shared),
        )
        limits = self._ask("SELECT rolname, rolconnlimit FROM pg_roles WHERE rolname = ANY (%s)", list(self.shared))
        database = self._ask("SELECT datconnlimit, datallowconn FROM pg_database WHERE datname = 'foreign_db'")
        return {
            "roles": {row[0]: list(row[1:]) for row in roles},
            "settings": {name: kept for name, config in settings if (kept := [c for c in config if not _is_fence(c)])},
            "siblings": {row[0]: {"limit": row[1], "settings": self._settings(row[0])} for row in limits},
            "database": [list(row) for row in database],
            "configuration": {k: v for k, v in self._lines().items() if not _is_fence(k)},
        }

    def _settings(self, role: str) -> dict[str, str]:
        rows = self._ask("SELECT unnest(rolconfig) FROM pg_roles WHERE rolname = %s", role)
        pairs = dict(row[0].split("=", 1) for row in rows)
        return {name: value for name, value in pairs.items() if not name.startswith("firebreak.")}

    def _lines(self) -> dict[str, str]:
        path = Path(self.lab.dir) / "run" / "pg1" / "postgresql.auto.conf"
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        parsed = [line.split(" = ", 1) for line in lines]
        assert len({name for name, _value in parsed}) == len(parsed)
        return dict(parsed)

    def rest(self) -> Any:
        roles = self._ask(
            "SELECT rolname, rolcanlogin, rolsuper, (SELECT array_agg(c) FROM unnest(rolconfig) c"
            " WHERE starts_with(c, 'firebreak.')) FROM pg_roles WHERE NOT starts_with(rolname, 'foreign_') ORDER BY 1"
        )
        users = self._ask("SELECT md5(string_agg(u::text, ',' ORDER BY id)) FROM users u")
        fence = {name: value for name, value in self._lines().items() if _is_fence(name)}
        evidence = sorted(path.name for path in Path(self.lab.dir).rglob(f"{self.incident}/evidence/pg1/*/*.json"))
        triggers = self._ask(
            "SELECT evtname, evtenabled, obj_description(oid, 'pg_event_trigger') FROM pg_event_trigger"
        )
        told = {"users": users[0][0], "fence": fence, "evidence": evidence, "triggers": sorted(map(list, triggers))}
        return {"roles": [list(row) for row in roles], **told}

    def close(self) -> None:
        if self.session is not None:
            self.session.close()


def _is_fence(name: str) -> bool:
    return name == "default_transaction_read_only" or name.startswith("firebreak.")


# --- Valkey


class Keys(Foreign):
    """Keys whose names are almost those of the sessions that are revoked, and quite others; of several types, some expiring."""

    NAMES = (
        "session:refresh:170:{n}",
        "session:refresh:17:a:{n}",
        "session:refresh:1:7:{n}",
        "session:refresh2:17:{n}",
        "Session:refresh:17:{n}",
        "session:refresh:017:{n}",
        "x:session:refresh:17:{n}",
        "session:access:17:{n}",
        "firebreak:other:{n}",
        "queue:{n}",
    )

    def __init__(self, lab: Any) -> None:
        super().__init__(lab)
        known = lab.hostvars("cache1")
        self.client = redis.Redis(
            port=known["firebreak_redis_port"], password=known["firebreak_redis_password"], decode_responses=True
        )
        self.expiry = int(time.time()) + 86400
        self.written = {}
        with self.client.pipeline(transaction=False) as many:
            for n in range(300):
                for name in self.NAMES:
                    self._set(many, f"foreign-{n}", name, f"from the start {n}")
            many.execute()

    def _set(self, where: Any, n: str, name: str, value: str) -> None:
        key = name.format(n=n)
        where.set(key, json.dumps({"user_id": "17", "iat": 1, "v": value}), exat=self.expiry)
        self.written[key] = [json.dumps({"user_id": "17", "iat": 1, "v": value}), self.expiry]

    @property
    def edits(self) -> list[Callable[[], None]]:
        return [self._write, self._hash, self._drop, self._expire]

    def _write(self) -> None:
        self._set(self.client, f"foreign-{self.number % 400}", self.random.choice(self.NAMES), f"edit {self.number}")

    def _hash(self) -> None:
        key = f"session:refresh:17:foreign-{self.number % 7}:hash"
        self.client.hset(key, f"field{self.number % 5}", str(self.number))
        fields = self.written.setdefault(key, [{}, -1])[0]
        fields[f"field{self.number % 5}"] = str(self.number)

    def _drop(self) -> None:
        key = self.random.choice(sorted(self.written))
        self.client.delete(key)
        del self.written[key]

    def _expire(self) -> None:
        key = self.random.choice(sorted(self.written))
        self.client.expireat(key, self.expiry + self.number)
        self.written[key][1] = self.expiry + self.number

    def _keys(self) -> list[str]:
        return sorted(str(key) for key in self.client.scan_iter(count=1000))

    def found(self) -> Any:
        names = [key for key in self._keys() if "foreign-" in key]
        with self.client.pipeline(transaction=False) as many:
            for key in names:
                (many.hgetall if key.endswith(":hash") else many.get)(key)
                many.expiretime(key)
            answers = many.execute()
        return {key: [answers[2 * n], answers[2 * n + 1]] for n, key in enumerate(names)}

    def rest(self) -> Any:
        raw = redis.Redis(connection_pool=None, **self._address())
        with raw:
            names = [key for key in self._keys() if "foreign-" not in key]
            marks = [key.split(":")[:2] for key in names if key.startswith("firebreak:")]
            values = {key: hashlib.sha256(raw.dump(key) or b"").hexdigest() for key in names if "firebreak:" not in key}
        return {"keys": values, "marks": marks}

    def _address(self) -> dict[str, Any]:
        known = self.lab.hostvars("cache1")
        return {"port": known["firebreak_redis_port"], "password": known["firebreak_redis_password"]}

    def close(self) -> None:
        for key in self.written:
            self.client.delete(key)
        self.client.close()


# --- Vault


class Secrets(Foreign):
    """Other fields of the very secret that is rotated, and other secrets, written by their owner."""

    PATH = "app/backend"
    pauses = (0.1, 0.5)  # a person's; each edit of the same secret makes our write a stale one

    def __init__(self, lab: Any) -> None:
        super().__init__(lab)
        # Whoever writes that often lets the server keep as many versions.
        self._ask("POST", f"secret/metadata/{self.PATH}", {"max_versions": 200})
        self.others = {"foreign/one": {"A": "1"}}
        self._ask("POST", "secret/data/foreign/one", {"data": self.others["foreign/one"]})
        self.first = {name: self._data(self.PATH)[name] for name in ROTATED}
        self.written = self.found()

    def _ask(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        where = urllib.parse.urlsplit(self.lab.env["VAULT_ADDR"])
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=10)
        headers = {"X-Vault-Token": self.lab.env["VAULT_TOKEN"], "Content-Type": kind}
        connection.request(method, f"/v1/{path}", None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        assert answer.status in (200, 204, 404), (method, path, answer.status)
        return json.loads(text) if text else {}

    def _data(self, path: str) -> dict[str, Any]:
        return dict((self._ask("GET", f"secret/data/{path}").get("data") or {}).get("data") or {})

    @property
    def edits(self) -> list[Callable[[], None]]:
        return [self._sibling, self._other, self._new_field, self._new_secret]

    def _patch(self, values: dict[str, Any]) -> None:
        """The server merges: what the others write at the same moment stays."""
        self._ask("PATCH", f"secret/data/{self.PATH}", {"data": values}, "application/merge-patch+json")

    def _sibling(self) -> None:
        name = self.random.choice(("BOT_TOKEN", "SENTRY_DSN"))
        self._patch({name: f"by somebody else {self.number}"})
        self.written["siblings"][name] = f"by somebody else {self.number}"

    def _new_field(self) -> None:
        name = f"FOREIGN_{self.number % 3}"
        if name in self.written["siblings"]:
            self._patch({name: None})
            del self.written["siblings"][name]
        else:
            self._patch({name: str(self.number)})
            self.written["siblings"][name] = str(self.number)

    def _other(self) -> None:
        self._ask("POST", "secret/data/foreign/one", {"data": {"A": str(self.number)}})
        self.written["others"]["foreign/one"] = {"A": str(self.number)}

    def _new_secret(self) -> None:
        path = f"foreign/new-{self.number % 3}"
        if path in self.written["others"]:
            self._ask("DELETE", f"secret/metadata/{path}")
            del self.written["others"][path]
        else:
            self._ask("POST", f"secret/data/{path}", {"data": {"B": str(self.number)}})
            self.written["others"][path] = {"B": str(self.number)}

    def found(self) -> Any:
        siblings = {name: value for name, value in self._data(self.PATH).items() if name not in ROTATED}
        listed = self._ask("LIST", "secret/metadata/foreign")["data"]["keys"]
        paths = ["app/frontend", "billing/gateway", *(f"foreign/{name}" for name in listed)]
        return {"siblings": siblings, "others": {path: self._data(path) for path in sorted(paths)}}

    def rest(self) -> Any:
        """Which values are still those of the start, and how many versions still hold another value than the current ones."""
        now = self._data(self.PATH)
        versions = self._ask("GET", f"secret/metadata/{self.PATH}")["data"]["versions"]
        readable = [number for number, entry in versions.items() if not entry["destroyed"]]
        old = 0
        for number in readable:
            data = (self._ask("GET", f"secret/data/{self.PATH}?version={number}").get("data") or {}).get("data") or {}
            old += any(data.get(name) != now[name] for name in ROTATED)
        return {"as at the start": [name for name in ROTATED if now[name] == self.first[name]], "old": old > 0}

    def close(self) -> None:
        self._patch(dict.fromkeys(name for name in self.written["siblings"] if name.startswith("FOREIGN_")))
        self._ask("POST", f"secret/metadata/{self.PATH}", {"max_versions": 0})


# --- the host


class EnvFile(Foreign):
    """Other lines of the env file, comments among them. Whoever edits a file writes the whole of it, so this one edits where the
    control is held, now by a new file in its place and now in place."""

    steady = False

    def __init__(self, lab: Any) -> None:
        super().__init__(lab)
        self.path = Path(lab.hostvars("app")["firebreak_secrets_delivered"][0]["env_file"])
        self.start = self.path.read_bytes()
        self.first = self._values()
        self.written = self.found()

    def _lines(self) -> list[bytes]:
        return self.path.read_bytes().splitlines(keepends=True)

    @staticmethod
    def _is_rotated(line: bytes) -> bool:
        return line.split(b"=")[0].decode() in ROTATED

    def _values(self) -> dict[str, str]:
        pairs = [line.decode().rstrip("\n").split("=", 1) for line in self._lines() if self._is_rotated(line)]
        return {name: hashlib.sha256(value.encode()).hexdigest() for name, value in pairs}

    @property
    def edits(self) -> list[Callable[[], None]]:
        return [self._replace, self._in_place]

    def _edited(self) -> list[bytes]:
        lines = [line for line in self._lines() if not line.startswith(b"FOREIGN=")]
        return [f"# seen by hand {self.number}\n".encode(), *lines, f"FOREIGN={self.number}\n".encode()][-30:]

    def _replace(self) -> None:
        lines = self._edited()
        beside = self.path.with_name(".app.env.by-hand")
        beside.write_bytes(b"".join(lines))
        beside.chmod(self.path.stat().st_mode & 0o777)
        os.replace(beside, self.path)
        self.written = [line for line in lines if not self._is_rotated(line)]

    def _in_place(self) -> None:
        lines = self._edited()
        with self.path.open("r+b") as file:
            file.write(b"".join(lines))
            file.truncate()
        self.written = [line for line in lines if not self._is_rotated(line)]

    def found(self) -> Any:
        return [line for line in self._lines() if not self._is_rotated(line)]

    def rest(self) -> Any:
        with contextlib.suppress(FileNotFoundError):
            mode = self.path.stat().st_mode
        beside = sorted(path.name for path in self.path.parent.iterdir() if "firebreak" in path.name)
        same = [name for name, digest in self._values().items() if digest == self.first.get(name)]
        return {"as at the start": same, "mode": mode, "beside it": beside}

    def close(self) -> None:
        lines = [line for line in self._lines() if not line.startswith((b"FOREIGN=", b"# seen by hand"))]
        self.path.write_bytes(b"".join(lines))


class PoolFile(Foreign):
    """Other lines of the pool's file, before, within and after the databases. It edits where the control is held."""

    steady = False

    def __init__(self, lab: Any) -> None:
        super().__init__(lab)
        known = lab.hostvars("pg1")
        self.known = {key.removeprefix("firebreak_pgbouncer_"): value for key, value in known.items()}
        self.path = Path(lab.dir) / "run" / "pool1" / "pgbouncer.ini"
        self.start = self.path.read_bytes()
        self.written = self.found()

    def _lines(self) -> list[bytes]:
        return self.path.read_bytes().splitlines(keepends=True)

    @staticmethod
    def _is_ours(line: bytes) -> bool:
        return line.startswith((b";firebreak ", b"divan ="))

    def _edited(self) -> list[bytes]:
        lines = [line for line in self._lines() if b"by hand" not in line]
        place = next(number for number, line in enumerate(lines) if line.startswith(b"reports"))
        lines[place] = b"reports = host=127.0.0.1 port=%d dbname=divan\n" % (1000 + self.number)
        note = b"; by hand %d\n" % self.number
        return [
            note,
            *lines[:place],
            b"hand%d = host=127.0.0.1 password='by hand'\n" % self.number,
            *lines[place:],
            note,
        ]

    def _replace(self) -> None:
        lines = self._edited()
        beside = self.path.with_name("by-hand.ini")
        beside.write_bytes(b"".join(lines))
        beside.chmod(self.path.stat().st_mode & 0o777)
        os.replace(beside, self.path)
        self.written = [line for line in lines if not self._is_ours(line)]

    def _in_place(self) -> None:
        lines = self._edited()
        with self.path.open("r+b") as file:
            file.write(b"".join(lines))
            file.truncate()
        self.written = [line for line in lines if not self._is_ours(line)]

    @property
    def edits(self) -> list[Callable[[], None]]:
        return [self._replace, self._in_place]

    def found(self) -> Any:
        return [line for line in self._lines() if not self._is_ours(line)]

    def rest(self) -> Any:
        with psycopg.connect(
            host="127.0.0.1", port=self.known["port"], user=self.known["user"], password=self.known["password"],
            dbname="pgbouncer", autocommit=True, cursor_factory=psycopg.ClientCursor,
        ) as console:  # fmt: skip
            rows = console.execute("SHOW DATABASES").fetchall()
        led = next(list(map(str, (row[1], row[2], row[11]))) for row in rows if row[0] == "divan")
        beside = sorted(path.name for path in self.path.parent.iterdir() if path.name != "by-hand.ini")
        ours = [line.decode() for line in self._lines() if self._is_ours(line)]
        return {"led": led, "ours": ours, "mode": self.path.stat().st_mode, "beside it": beside}

    def close(self) -> None:
        self.path.write_bytes(self.start)
