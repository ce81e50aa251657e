# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The revocation of sessions: its plans, and a run against the lab's cache."""

from __future__ import annotations

import datetime
import json
import time
from typing import Any

import redis
from hypothesis import strategies as st

from ansible_collections.firebreak.incident.plugins.modules.redis_session_revocation import mark_key
from tests.foreign import Keys
from tests.rows import Case, Reach, Row, State

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


# Users with names that a pattern could take for another's.
USERS = ("g1", "g11", "G1", "g1*", "*", "?", "[g]1", "\\", "ü", "a b", "g-1", "17x")
IDS = ("a", "b*", "*", "ü", "x-y", "a b", "0")
MOMENT = 1795143600
# When a session began, before the moment or after it, as its value may tell.
BEGAN: dict[str, tuple[str, bool]] = {
    "long before": (json.dumps({"iat": MOMENT - 86400}), True),
    "before": (json.dumps({"iat": MOMENT - 0.5, "x": "ü"}), True),
    "in milliseconds": (json.dumps({"iat": (MOMENT - 1) * 1000}), True),
    "as text": (json.dumps({"iat": "2026-11-20T02:59:59Z"}), True),
    "at the moment": (json.dumps({"iat": MOMENT}), False),
    "after": (json.dumps({"iat": MOMENT + 1}), False),
    "after, as text": (json.dumps({"iat": "2026-11-20T05:00:00+01:00"}), False),
    "untold": (json.dumps({"user": "x"}), True),
    "no JSON": ('"', True),
    "a list": ("[]", True),
}
TEMPLATES = (TEMPLATE, "s.{user}.{id}", "t:{id}:of:{user}")
# Keys of others, and almost sessions.
FOREIGN = (
    "session:refresh:g1",
    "session:refresh:g1:a:b",
    "xsession:refresh:g1:a",
    "session:refresh::a",
    "s.g1.",
    "cache:g1",
)


class Lab(Row):
    control = "redis_session_revocation"
    host = "cache1"
    touches = ("redis",)
    reversible = False
    moment = int(time.time()) - 600
    usual = {"like the lab's": True}
    _made: tuple[str, ...] = ()

    def params(self, lab: Any) -> dict[str, Any]:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        return {
            **connection(lab),
            "users": ["17", "42"],
            "issued_before": str(self.moment),
            "break_glass": [{"guard": "evidence", "reason": "the export is another test's", "date": today}],
        }

    def states(self) -> st.SearchStrategy[State]:
        session = st.fixed_dictionaries(
            {
                "user": st.sampled_from(USERS),
                "id": st.sampled_from(IDS),
                "began": st.sampled_from(sorted(BEGAN)),
                "expires": st.sampled_from([None, 4000000000, 4000000001]),
            }
        )
        usual = st.lists(st.sampled_from(USERS), min_size=1, max_size=4)
        options = {
            "users": st.one_of(
                usual, usual, usual, st.lists(st.sampled_from([*USERS, "1", "", "a:b", "a.b"]), max_size=2)
            ),
            "issued_before": st.sampled_from([None, str(MOMENT), "2026-11-20T04:00:00+01:00"]),
        }
        more = {
            "scope": st.sampled_from(["users", "users", "users", "all"]),
            "batch": st.sampled_from([100, 1000, 0]),
            "issued_at": st.sampled_from(["iat", "iat", "nowhere"]),
            "key_template": st.sampled_from([*TEMPLATES, "{user}", "session"]),
            "expires": st.just("2099-01-01T00:00:00Z"),
        }
        return st.fixed_dictionaries(
            {
                "sessions": st.lists(session, max_size=12),
                "foreign": st.lists(st.sampled_from(FOREIGN), unique=True),
                "hash": st.booleans(),
                "options": st.fixed_dictionaries(options, optional=more),
            }
        )

    def bring(self, lab: Any, state: State) -> None:
        """In the usual state user 17 has old and young sessions beside others whose names are alike. No mark is there."""
        with server(lab) as cache:
            for name in (*self._made, *cache.scan_iter("firebreak:*")):
                cache.delete(name)
            if "sessions" not in state:
                for name, began in (("17:old", -5), ("17:young", 5), ("42:old", -5), ("170:old", -5), ("17:a:b", -5)):
                    value = json.dumps({"user_id": name, "iat": self.moment + began})
                    cache.set(f"session:refresh:{name}", value, ex=86400)
                return
            sessions = {self._key(state, one): one for one in state["sessions"]}
            self._made = (*sessions, *FOREIGN, self._odd(state))
            for name, one in sessions.items():
                cache.set(name, BEGAN[one["began"]][0], exat=one["expires"])
            for name in state["foreign"]:
                cache.set(name, "x", exat=4000000000)
            if state["hash"]:
                cache.hset(self._odd(state), "a", "b")

    @staticmethod
    def _key(state: State, session: dict[str, Any]) -> str:
        given = state["options"].get("key_template", TEMPLATE)
        given = given if given in TEMPLATES else TEMPLATE
        return str(given.replace("{user}", session["user"]).replace("{id}", session["id"]))

    def _odd(self, state: State) -> str:
        """A key that has a session's name and is none."""
        return self._key(state, {"user": "g1", "id": "hash"})

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

    def asked(self, lab: Any, state: State) -> dict[str, Any]:
        options = {**self.params(lab), **state.get("options", {})}
        return {name: value for name, value in options.items() if value is not None}

    def refusal(self, lab: Any, state: State) -> str | None:
        if "options" not in state:
            return None
        asked = self.asked(lab, state)
        shape, everybody = asked.get("key_template", TEMPLATE), asked.get("scope") == "all"
        if shape in ("{user}", "session"):
            return "key_template: it begins with fixed text"
        separators = set(shape) & set(":.")
        if not everybody and (not asked["users"] or any(not user or set(user) & separators for user in asked["users"])):
            return "users: name at least one"
        if asked.get("batch") == 0:
            return "batch, deadline: batch is 1 to 1000"
        theirs = [one for one in state["sessions"] if everybody or one["user"] in asked["users"]]
        present = {self._key(state, one): one for one in theirs}
        told = {one["began"] for one in present.values()} - {"untold", "no JSON", "a list"}
        odd = state["hash"] and (everybody or "g1" in asked["users"])
        others = shape == TEMPLATE and (everybody or "1" in asked["users"])  # the lab has some
        timed = asked.get("issued_at", "iat") == "iat" and (told or others)
        if "issued_before" in asked and (present or odd or others) and not timed:
            return "issued_at: no sampled session has this field"
        if not everybody and "1" in asked["users"]:
            return "protected: accounts 1 may not be covered"
        return "breadth: this needs break glass for all_sessions" if everybody else None

    def effect(self, lab: Any, state: State, before: dict[str, Any], seen: dict[str, Any]) -> None:
        before, seen = before["redis"], seen["redis"]
        new = seen.keys() - before.keys()
        assert len(new) == 1 and all(name.startswith("firebreak:revocation:INC-") for name in new)
        if "sessions" not in state:
            return
        asked = self.asked(lab, state)
        theirs = {self._key(state, one): one for one in state["sessions"] if one["user"] in asked["users"]}
        gone = {name for name, one in theirs.items() if "issued_before" not in asked or BEGAN[one["began"]][1]}
        gone |= {self._odd(state)} if state["hash"] and "g1" in asked["users"] else set()
        kept = {name: value for name, value in before.items() if name not in gone}
        assert {name: value for name, value in seen.items() if name not in new} == kept
