# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The revocation of sessions: its plans, and a run against the lab's cache."""

from __future__ import annotations

import datetime
import json
import time
from typing import Any

import redis

from ansible_collections.firebreak.incident.plugins.modules.redis_session_revocation import mark_key
from tests.foreign import Keys
from tests.rows import Case, Reach, Row

INCIDENT = "INC-2026-1120-001"
TEMPLATE = "session:refresh:{user}:{id}"
T = "2026-11-20T03:00:00Z"
OWN: dict[str, Any] = {
    "key_template": TEMPLATE,
    "scope": "users",
    "users": ["17", "42"],
    "issued_before": T,
    "issued_at": "iat",
    "batch": 1000,
    "deadline": 60,
}
SAMPLED = {"keys": 900, "sessions": 4, "sampled_sessions": 4, "without_time": 1}
UNTIMED = {**SAMPLED, "without_time": 4}


def _params(**own: Any) -> dict[str, Any]:
    return {**OWN, "incident_id": INCIDENT, "mark": f"{INCIDENT}/1", "round": 1, "expires": None, **own}


def _facts(entry: dict[str, Any] | None = None, **estimate: int) -> dict[str, Any]:
    return {"revoked": entry, "estimate": {**SAMPLED, **estimate}}


def _entry(issued_before: str | None = T, scope: str = "users", users: int | None = 2) -> dict[str, Any]:
    return {"issued_before": issued_before, "scope": scope, "users": users}


def _steps(whose: str, when: str = f", begun before {T}", **own: Any) -> list[tuple[str, str]]:
    return [("revoke", f"{whose}: {TEMPLATE}{when}"), ("create", f"mark {mark_key(_params(**own))}")]


EVERYBODY: dict[str, Any] = {"scope": "all", "users": None}
STAFF: dict[str, Any] = {"protected": {"accounts": ["1"]}}
TWO = "sessions of 2 users"
ALWAYS: dict[str, Any] = {"issued_before": None}

PLANS = [
    Case("not revoked yet", _params(), _facts(), _steps(TWO), {"revoked": _entry()}),
    Case("revoked in this round", _params(), _facts(_entry()), [], {"revoked": _entry()}),
    Case("the same users, otherwise ordered", _params(users=["42", "17", "17"]), _facts(), _steps(TWO)),
    Case("the same time, written otherwise", _params(issued_before="2026-11-20T04:00:00+01:00"), _facts(_entry()), []),
    Case("the same time as a number", _params(issued_before="1795143600"), _facts(_entry()), []),
    Case("an earlier time is covered", _params(issued_before="2026-11-19T00:00:00Z"), _facts(_entry()), []),
    Case("a later time is not", _params(), _facts(_entry("2026-11-19T00:00:00Z")), _steps(TWO), {"revoked": _entry()}),
    Case("whenever begun", _params(**ALWAYS), _facts(), _steps(TWO, ""), {"revoked": _entry(None)}),
    Case("whenever begun, again", _params(**ALWAYS), _facts(_entry(None)), []),
    Case("everybody", _params(**EVERYBODY), _facts(), _steps("all sessions", **EVERYBODY),
         {"revoked": _entry(scope="all", users=None)}),
    Case("everybody but who is protected", _params(**EVERYBODY, **STAFF), _facts(),
         _steps("all sessions but those of 1 protected account", **EVERYBODY, **STAFF),
         {"revoked": _entry(scope="all", users=None)}),
    Case("everybody, where nobody can tell who is protected", _params(**EVERYBODY, **STAFF, key_template="s:{id}"), _facts(),
         raises="key_template: without {user}"),
    Case("one user", _params(users=["1"]), _facts(), _steps("sessions of 1 user", users=["1"])),
    Case("another round", _params(mark=f"{INCIDENT}/2"), _facts(), _steps(TWO, mark=f"{INCIDENT}/2")),
    Case("no sampled session tells its time", _params(), {"revoked": None, "estimate": UNTIMED}, raises="issued_at"),
    Case("none does, and none has to", _params(**ALWAYS), {"revoked": None, "estimate": UNTIMED}, _steps(TWO, "")),
    Case("a time without its zone", _params(issued_before="2026-11-20T03:00:00"), _facts(), raises="issued_before"),
    Case("a word for a time", _params(issued_before="yesterday"), _facts(), raises="issued_before"),
    Case("a user with a separator", _params(users=["1:2"]), _facts(), raises="users"),
    Case("an empty user", _params(users=[""]), _facts(), raises="users"),
    Case("no user", _params(users=[]), _facts(), raises="users"),
    Case("a template for every key", _params(key_template="{user}:{id}"), _facts(), raises="key_template"),
    Case("a template of one key", _params(key_template="session"), _facts(), raises="key_template"),
    Case("a template without users", _params(key_template="session:{id}"), _facts(), raises="key_template"),
    Case("an unknown placeholder", _params(key_template="s:{user}:{x}"), _facts(), raises="key_template"),
    Case("too large a batch", _params(batch=1001), _facts(), raises="batch"),
]  # fmt: skip


def connection(lab: Any) -> dict[str, Any]:
    variables = lab.hostvars("cache1")
    return {name: variables[f"firebreak_{name}"] for name in ("redis_host", "redis_port", "redis_password", "redis_db")}


def server(lab: Any) -> redis.Redis:
    return redis.Redis.from_url(lab.env["REDIS_URL"])


class Lab(Row):
    control = "redis_session_revocation"
    host = "cache1"
    reversible = False
    moment = int(time.time()) - 600

    def params(self, lab: Any) -> dict[str, Any]:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        return {
            **connection(lab),
            "users": ["17", "42"],
            "issued_before": str(self.moment),
            "break_glass": [{"guard": "evidence", "reason": "the export is another test's", "date": today}],
        }

    def prepare(self, lab: Any) -> None:
        """User 17 with old and young sessions, others whose names are alike, and no mark of an earlier run."""
        with server(lab) as cache:
            for name, began in (("17:old", -5), ("17:young", 5), ("42:old", -5), ("170:old", -5), ("17:a:b", -5)):
                value = json.dumps({"user_id": name, "iat": self.moment + began})
                cache.set(f"session:refresh:{name}", value, ex=86400)
            for mark in cache.scan_iter("firebreak:*"):
                cache.delete(mark)

    def observe(self, lab: Any) -> dict[str, Any]:
        with server(lab) as cache:
            found = {key.decode(): cache.dump(key).hex() for key in sorted(cache.scan_iter(count=1000))}
            return {"keys": found, "keys_called": "cmdstat_keys" in cache.info("commandstats")}

    def contained(self, lab: Any, before: dict[str, Any], seen: dict[str, Any]) -> None:
        gone = before["keys"].keys() - seen["keys"].keys()
        assert {"session:refresh:17:old", "session:refresh:42:old"} <= gone
        assert all(key.split(":")[2] in ("17", "42") and key.count(":") == 3 for key in gone)
        assert {"session:refresh:17:young", "session:refresh:170:old", "session:refresh:17:a:b"} <= seen["keys"].keys()
        assert not [key for key in seen["keys"] if key.startswith("session:refresh:42:")]
        (mark,) = seen["keys"].keys() - before["keys"].keys()
        assert mark.startswith("firebreak:revocation:INC-")
        kept = before["keys"].keys() - gone
        assert {key: before["keys"][key] for key in kept} == {key: seen["keys"][key] for key in kept}
        assert not seen["keys_called"]

    def reach(self, lab: Any) -> Reach:
        return Reach((({"accounts": ["42"]}, {}),), {"all_sessions": {"scope": "all", "users": None}}, destroys=True)

    def foreign(self, lab: Any) -> Keys:
        return Keys(lab)

    def secrets(self, lab: Any) -> list[str]:
        return [lab.hostvars("cache1")["firebreak_redis_password"]]
