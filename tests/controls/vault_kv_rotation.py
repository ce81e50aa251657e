# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""vault_kv_rotation: its pure plan, and one run against the lab's Vault."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import urllib.parse
from typing import Any

from hypothesis import strategies as st

from tests.contract.rotation_walk import Consumer
from tests.foreign import Secrets
from tests.rows import Case, Reach, Row, State

MARK = "INC-2026-1120-001/1"
URL = "https://app.example.com/api/me"
OLD = "old versions of secret/app/backend"


def options(**changed: Any) -> dict[str, Any]:
    own = {
        "state": "retired",
        "engine_mount_point": "secret",
        "path": "app/backend",
        "fields": ["JWT_SECRET"],
        "format": "urlsafe",
        "bytes": 32,
        "new_values": None,
        "proof": [{"field": "JWT_SECRET", "kind": "jwt", "url": URL}],
    }
    return {**own, "mark": MARK, "incident_id": MARK[:-2], **changed}


def facts(state: str, **changed: Any) -> dict[str, Any]:
    return {
        "state": state,
        "fields": ["JWT_SECRET"],
        "version": 7 if state in ("unrotated", "staged") else 8,
        "replaces": 7,
        "pending": {"unrotated": "absent", "retired": "destroyed"}.get(state, "stored"),
        "old_versions": "destroyed" if state == "retired" else "readable",
        "mark": MARK if state == "retired" else None,
        "conflict": None,
        **changed,
    }


STAGE = ("create", "pending JWT_SECRET of secret/app/backend")
PROMOTE = ("update", "JWT_SECRET of secret/app/backend")
PROVE = ("run", "proof that the old JWT_SECRET are refused")
FORGET = ("delete", "pending JWT_SECRET of secret/app/backend")
DESTROY = ("delete", OLD)

PLANS = [
    Case("stage", options(state="staged"), facts("unrotated"), [STAGE], facts("staged")),
    Case("stage and make current", options(state="current"), facts("unrotated"), [STAGE, PROMOTE], facts("current")),
    Case("all at once", options(), facts("unrotated"), [STAGE, PROMOTE, PROVE, FORGET, DESTROY], facts("retired")),
    Case("make current", options(state="current"), facts("staged"), [PROMOTE], facts("current")),
    Case("retire", options(), facts("current"), [PROVE, FORGET, DESTROY], facts("retired")),
    Case(
        "a sibling was written after us",
        options(),
        facts("current", version=11),
        [PROVE, FORGET, DESTROY],
        facts("retired", version=11),
    ),
    Case("killed after the proof", options(), facts("current", mark=MARK), [FORGET, DESTROY], facts("retired")),
    Case(
        "killed before the last change",
        options(),
        facts("current", mark=MARK, pending="destroyed"),
        [DESTROY],
        facts("retired"),
    ),
    Case(
        "what others destroyed needs no destroying",
        options(),
        facts("current", old_versions="destroyed"),
        [PROVE, FORGET],
        facts("retired"),
    ),
    Case("nothing to do", options(), facts("retired"), [], facts("retired")),
    Case("no way back", options(state="staged"), facts("current"), [], facts("current")),
    Case("done, and the secret is gone since", options(), facts("retired", version=0, fields=[]), [], None),
    Case(
        "conflict",
        options(),
        facts("current", conflict="version 9 was written by x"),
        raises="version 9 was written by x",
    ),
    Case(
        "no such field",
        options(fields=["OTHER"], proof=[]),
        facts("unrotated", fields=[]),
        raises="proof names no check for OTHER",
    ),
    Case(
        "no such field, staged",
        options(state="staged", fields=["JWT_SECRET", "O"]),
        facts("unrotated"),
        raises="no readable O",
    ),
    Case("no such secret", options(), facts("unrotated", version=0, fields=[]), raises="no readable JWT_SECRET"),
    Case("too short", options(bytes=16), facts("unrotated"), raises="bytes must be at least 32"),
    Case("no fields", options(fields=[]), facts("unrotated"), raises="fields is empty"),
    Case("a value for another field", options(new_values={"X": "y"}), facts("unrotated"), raises="new_values"),
    Case("an empty value", options(new_values={"JWT_SECRET": ""}), facts("unrotated"), raises="new_values"),
    Case(
        "a proof of another field",
        options(state="current", proof=[{"field": "X", "kind": "jwt", "url": URL}]),
        facts("unrotated"),
        raises="proof names a field that is not in fields",
    ),
]


def ask(lab: Any, method: str, path: str, body: Any = None) -> Any:
    """Vault, spoken to without any of our code."""
    where = urllib.parse.urlsplit(lab.env["VAULT_ADDR"])
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=10)
    try:
        headers = {"X-Vault-Token": lab.env["VAULT_TOKEN"]}
        connection.request(method, f"/v1/{path}", None if body is None else json.dumps(body), headers)
        text = connection.getresponse().read()
        return json.loads(text) if text else {}
    finally:
        connection.close()


def digests(lab: Any, path: str) -> dict[str, str]:
    data = ask(lab, "GET", f"secret/data/{path}")["data"]["data"]
    return {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in data.items()}


def connection(lab: Any, host: str) -> dict[str, Any]:
    known = lab.hostvars(host)
    return {"vault_url": known["firebreak_vault_url"], "vault_token": known["firebreak_vault_token"]}


def forget(lab: Any, path: str) -> None:
    """A secret with all that was pending for it."""
    found, folders = [path], ["_pending/"]
    while folders:
        folder = folders.pop()
        for name in (ask(lab, "LIST", f"secret/metadata/{folder}").get("data") or {}).get("keys", []):
            if name.endswith("/"):
                folders.append(folder + name)
            elif f"/{path}/" in folder + name:
                found.append(folder + name)
    for one in found:
        ask(lab, "DELETE", f"secret/metadata/{one}")


GENERATED = "generated/rotated"
SECRETS = ("JWT_SECRET", "WEBHOOK_SECRET")


class Lab(Row):
    control = "vault_kv_rotation"
    host = "vault"
    touches = ("vault",)
    reversible = False

    def params(self, lab: Any) -> dict[str, Any]:
        own = {"path": "app/backend", "fields": ["JWT_SECRET", "WEBHOOK_SECRET"], "state": "current"}
        return {**own, **connection(lab, self.host)}

    def states(self) -> st.SearchStrategy[State]:
        leaf = st.one_of(st.none(), st.booleans(), st.integers(-3, 2**40), st.floats(0, 1), st.text(max_size=4))
        sibling = st.one_of(leaf, st.lists(leaf, max_size=2), st.dictionaries(st.text(max_size=3), leaf, max_size=2))
        names = st.sampled_from(
            [["JWT_SECRET"], ["JWT_SECRET"], ["WEBHOOK_SECRET", "JWT_SECRET"], ["API", "JWT_SECRET"]]
        )
        options = {
            "fields": st.one_of(names, names, names, st.sampled_from([[], ["ABSENT"], ["JWT_SECRET", "JWT_SECRET"]])),
            "state": st.sampled_from(["staged", "current"]),
        }
        more = {"format": st.sampled_from(["hex", "base64", "urlsafe"]), "bytes": st.sampled_from([32, 48, 16])}
        held = {
            "JWT_SECRET": st.sampled_from(["old-jwt", "a", "secret", "current"]),
            "WEBHOOK_SECRET": st.just("old-hook"),
        }
        return st.fixed_dictionaries(
            {
                "options": st.fixed_dictionaries(options, optional=more),
                "data": st.fixed_dictionaries({**held, "API": st.sampled_from(["x", 7, None, {"a": "b"}])}),
                "siblings": st.dictionaries(st.text("abc_é", min_size=1, max_size=4), sibling, max_size=4),
            },
            optional={
                "earlier": st.integers(0, 5),
                "max_versions": st.sampled_from([0, 2, 4, 1]),
                "cas_required": st.booleans(),
                "custom": st.dictionaries(st.sampled_from(["owner", "x y"]), st.sampled_from(["a", "ü"])),
                "deleted": st.sampled_from(["the first", "the first", "the newest"]),
                "destroyed": st.sampled_from(["the first", "the first", "the newest"]),
                "absent": st.sampled_from([False, False, True]),
            },
        )

    def bring(self, lab: Any, state: State) -> None:
        """The usual state is the lab's own secret, as it is."""
        forget(lab, GENERATED)
        if "data" not in state or state.get("absent"):
            return
        held = {"max_versions": state.get("max_versions", 0), "cas_required": state.get("cas_required", False)}
        ask(lab, "POST", f"secret/metadata/{GENERATED}", {**held, "custom_metadata": state.get("custom", {})})
        for number in range(state.get("earlier", 0) + 1):
            body = {"options": {"cas": number}, "data": {**state["siblings"], "n": number, **state["data"]}}
            assert "errors" not in ask(lab, "POST", f"secret/data/{GENERATED}", body)
        newest = state.get("earlier", 0) + 1
        for verb, word in (("delete", "deleted"), ("destroy", "destroyed")):
            if word in state:
                versions = [1 if state[word] == "the first" else newest]
                ask(lab, "POST", f"secret/{verb}/{GENERATED}", {"versions": versions})

    def asked(self, lab: Any, state: State) -> dict[str, Any]:
        return {**self.params(lab), **({"path": GENERATED} if "data" in state else {}), **state.get("options", {})}

    def refusal(self, lab: Any, state: State) -> str | None:
        if "data" not in state:
            return None
        asked, newest = state["options"], state.get("earlier", 0) + 1
        gone = state.get("absent") or any(
            word in state and (state[word] == "the newest" or newest == 1) for word in ("deleted", "destroyed")
        )
        if state.get("max_versions") == 1 and not state.get("absent"):
            return f"max_versions of secret/{GENERATED} is 1"
        if not asked["fields"]:
            return "fields is empty"
        if asked.get("bytes") == 16:
            return "bytes must be at least 32"
        lacking = sorted(set(asked["fields"]) if gone else set(asked["fields"]) - set(state["data"]))
        return f"has no readable {', '.join(lacking)}" if lacking else None

    def effect(self, lab: Any, state: State, before: dict[str, Any], seen: dict[str, Any]) -> None:
        asked = self.asked(lab, state)
        path, old, new = f"secret/{asked['path']}", before["vault"], seen["vault"]
        (claim,) = new["secrets"].keys() - old["secrets"].keys()
        fields = sorted(set(asked["fields"]))
        assert re.fullmatch(rf"secret/_pending/INC-[\d-]+/1/{asked['path']}/{','.join(fields)}", claim)
        values = new["secrets"].pop(claim)["data"]["values"]
        assert sorted(values) == fields and len(set(values.values())) == len(fields)
        assert all(len(value) >= 43 for value in values.values())
        if asked["state"] == "current":
            one, other = old["secrets"][path], new["secrets"].pop(path)
            del old["secrets"][path]
            assert other["data"] == {**one["data"], **values}
            versions = [int(number) for number in one["metadata"]["versions"]]
            kept = {
                number: told for number, told in other["metadata"]["versions"].items() if int(number) <= max(versions)
            }
            assert kept == {number: one["metadata"]["versions"][number] for number in kept}
            assert other["metadata"]["current_version"] == max(versions) + 1
            moved = ("versions", "current_version", "oldest_version", "updated_time", "last_updated_by")
            for name in other["metadata"].keys() - {*moved}:
                assert other["metadata"][name] == one["metadata"][name], name
        assert new == old

    def observe(self, lab: Any) -> dict[str, Any]:
        metadata = ask(lab, "GET", "secret/metadata/app/backend")["data"]
        return {
            "version": metadata["current_version"],
            "destroyed": {number: entry["destroyed"] for number, entry in metadata["versions"].items()},
            "values": digests(lab, "app/backend"),
            "others": {path: digests(lab, path) for path in ("app/frontend", "billing/gateway")},
        }

    def contained(self, lab: Any, before: dict[str, Any], seen: dict[str, Any]) -> None:
        rotated = {name for name, digest in seen["values"].items() if digest != before["values"][name]}
        assert rotated == {"JWT_SECRET", "WEBHOOK_SECRET"}
        assert seen["values"].keys() == before["values"].keys()
        assert seen["version"] == before["version"] + 1
        # The oldest version falls out of a full history, and none is destroyed.
        assert all(gone == before["destroyed"].get(version, False) for version, gone in seen["destroyed"].items())
        assert seen["others"] == before["others"]

    def reach(self, lab: Any) -> Reach:
        return Reach()

    def foreign(self, lab: Any) -> Secrets:
        return Secrets(lab)

    def secrets(self, lab: Any) -> list[str]:
        values = ask(lab, "GET", "secret/data/app/backend")["data"]["data"].values()
        return [*values, lab.env["VAULT_TOKEN"]]


class Retired(Lab):
    """The last state: the consumer has the new values, the old ones are proved refused and destroyed."""

    touches = ("vault", "postgresql")  # where the application notes who tried

    def params(self, lab: Any) -> dict[str, Any]:
        proof = [
            {"field": "JWT_SECRET", "kind": "jwt", "url": f"{lab.app_direct_url}/api/me", "claims": {"sub": "1"}},
            {"field": "WEBHOOK_SECRET", "kind": "webhook", "url": f"{lab.app_direct_url}/hooks/payment"},
        ]
        return {**super().params(lab), "state": "retired", "proof": proof}

    _consumer: Consumer | None = None
    _state: State = {}

    def states(self) -> st.SearchStrategy[State]:
        """Those in which the values could be replaced, and with them the consumer's."""
        fields = st.sampled_from([["JWT_SECRET"], ["WEBHOOK_SECRET"], ["WEBHOOK_SECRET", "JWT_SECRET"]])
        usable = (
            super()
            .states()
            .filter(lambda state: super(Retired, self).refusal(None, self._first(state, ["JWT_SECRET"])) is None)
        )
        return st.builds(self._first, usable, fields)

    @staticmethod
    def _first(state: State, fields: list[str]) -> State:
        """The state, with the options of the step before. A word of ours as the old value is hidden from where it is read on."""
        data = {**state["data"], "JWT_SECRET": "old-jwt"}
        return {**state, "data": data, "options": {"fields": fields, "state": "current"}}

    def bring(self, lab: Any, state: State) -> None:
        super().bring(lab, state)
        self._state = state
        if self._consumer is None:
            self._consumer = Consumer().__enter__()

    def asked(self, lab: Any, state: State) -> dict[str, Any]:
        if "data" not in state:
            return self.params(lab)
        assert self._consumer
        token = {"field": "JWT_SECRET", "kind": "jwt", "url": f"{self._consumer.url}/api/me", "claims": {"sub": "1"}}
        hook = {"field": "WEBHOOK_SECRET", "kind": "webhook", "url": f"{self._consumer.url}/hooks/payment"}
        fields = state["options"]["fields"]
        proof = [one for one in (token, hook) if one["field"] in fields]
        return {**super().params(lab), "path": GENERATED, "fields": fields, "state": "retired", "proof": proof}

    def refusal(self, lab: Any, state: State) -> str | None:
        return None

    def effect(self, lab: Any, state: State, before: dict[str, Any], seen: dict[str, Any]) -> None:
        asked = self.asked(lab, state)
        path = f"secret/{asked['path']}"
        claims = [name for name in before["vault"]["secrets"] if name.startswith("secret/_pending/")]
        changed = [name for name in claims if before["vault"]["secrets"][name] != seen["vault"]["secrets"][name]]
        (claim,) = changed
        for dump in (before, seen):
            dump["postgresql"] = {**dump["postgresql"], "rows": {**dump["postgresql"]["rows"]}, "sequences": []}
            del dump["postgresql"]["rows"]["public.audit_logs"]
            entry = dump["vault"]["secrets"].pop(claim)
            versions = dump["vault"]["secrets"][path]["metadata"]["versions"]
            if dump is seen:
                assert entry["data"]["done"] and "values" not in entry["data"]
                newest = max(int(number) for number in versions)
                assert {number: told["destroyed"] for number, told in versions.items()} == {
                    number: int(number) < newest for number in versions
                }
            dump["vault"]["secrets"][path]["metadata"] = {
                name: value
                for name, value in dump["vault"]["secrets"][path]["metadata"].items()
                if name not in ("versions", "updated_time", "last_updated_by")
            }
        assert seen == before

    def begin(self, lab: Any, execute: Any) -> None:
        if "data" in self._state:
            assert self._consumer
            execute(self.host, self.control, {**super().params(lab), "path": GENERATED, **self._state["options"]})
            self._consumer.values = ask(lab, "GET", f"secret/data/{GENERATED}")["data"]["data"]
            return
        execute(self.host, self.control, super().params(lab))
        delivered = lab.hostvars("app")["firebreak_secrets_delivered"][0]
        names = ("path", "fields", "env_file", "reload", "proof_url")
        own = {name: delivered[name] for name in names}
        execute("app", "secret_delivery", {**own, **connection(lab, "app")})

    def contained(self, lab: Any, before: dict[str, Any], seen: dict[str, Any]) -> None:
        assert {**seen, "destroyed": 0} == {**before, "destroyed": 0}
        current = str(seen["version"])
        assert seen["destroyed"] == {number: number != current for number in before["destroyed"]}
        assert not before["destroyed"][current]
