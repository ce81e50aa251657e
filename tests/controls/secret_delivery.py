# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""secret_delivery: its pure plan, and one run from the lab's Vault to the application's env file over SSH."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import urllib.request
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.contract.rotation_walk import Consumer
from tests.controls.vault_kv_rotation import ask, connection, forget
from tests.foreign import EnvFile
from tests.rows import Case, Reach, Row, State

FIELDS = ("JWT_SECRET", "WEBHOOK_SECRET")
FILE = "/etc/app/app.env"


def options(**changed: Any) -> dict[str, Any]:
    own = {
        "engine_mount_point": "secret",
        "path": "app/backend",
        "fields": {"JWT_SECRET": "JWT_SECRET", "WEBHOOK_SECRET": "HOOK"},
        "version": None,
        "destination": "env_file",
        "env_file": FILE,
        "reload": ["/usr/bin/systemctl", "reload", "app"],
        "proof_url": "https://app.example.com/internal/secret-proof",
        "proof_patience": 10.0,
    }
    return {**own, "mark": "INC-2026-1120-001/1", **changed}


def facts(jwt: str, hook: str, consumer: str) -> dict[str, Any]:
    return {"version": 8, "fields": {"JWT_SECRET": jwt, "HOOK": hook}, "consumer": consumer}


DONE = facts("current", "current", "current")
RELOAD = ("run", f"reload of the consumer of {FILE}")

PLANS = [
    Case(
        "both", options(), facts("stale", "stale", "stale"), [("update", f"HOOK, JWT_SECRET in {FILE}"), RELOAD], DONE
    ),
    Case("one is new", options(), facts("current", "absent", "stale"), [("update", f"HOOK in {FILE}"), RELOAD], DONE),
    Case("killed before the reload", options(), facts("current", "current", "stale"), [RELOAD], DONE),
    Case("the consumer is down", options(), facts("current", "current", "unreachable"), [RELOAD], DONE),
    Case("nothing to do", options(), DONE, [], DONE),
    Case(
        "not in Vault",
        options(),
        facts("stale", "unknown", "stale"),
        raises="secret/app/backend has no readable WEBHOOK_SECRET",
    ),
    Case("no fields", options(fields={}), DONE, raises="fields must map"),
    Case("one name twice", options(fields={"A": "X", "B": "X"}), DONE, raises="fields must map"),
    Case("no name", options(fields={"A": "X=1\nY"}), DONE, raises="a name in an env file"),
    Case("a relative path", options(env_file="app.env"), DONE, raises="env_file must be a full path"),
    Case("no reload", options(reload=[]), DONE, raises="reload is empty"),
]


NAMED = re.compile(r"([ \t]*(?:export[ \t]+)?)([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
GENERATED = "generated/delivered"
# Lines as people write them, with and without the names that are delivered.
LINES = (
    "# JWT_SECRET=old",
    "",
    "JWT_SECRET=old",
    'JWT_SECRET="old with spaces"',
    "JWT_SECRET='old'",
    "export JWT_SECRET=old",
    "  export  HOOK=old#x",
    "HOOK=",
    "HOOK=a=b",
    "JWT_SECRET_OLD=x",
    "XJWT_SECRET=x",
    "PATH=$PATH:/x",
    "ÜNI=ü",
    "JWT_SECRET = spaced",
    "no name here",
)
CURRENT = {"JWT_SECRET": "current-of-jwt", "HOOK": "current,of:hook+/=%~@"}


def unquoted(value: str) -> tuple[str, str]:
    quote = value[:1] if value[:1] in ("'", '"') and value[:1] else ""
    return quote, value[1:-1] if quote else value


class FileConsumer(Consumer):
    """An application that works with the values of the file that it read last."""

    def __init__(self) -> None:
        super().__init__()
        self.read: Path | None = None

    @property
    def values(self) -> dict[str, str]:
        found = dict.fromkeys(CURRENT, "")
        for line in self.read.read_bytes().decode().split("\n") if self.read else []:
            if named := NAMED.fullmatch(line.removesuffix("\r")):
                found[named[2]] = unquoted(named[3])[1]
        return found

    @values.setter
    def values(self, given: dict[str, str]) -> None:
        """They are the file's."""


def delivered(text: str, wanted: dict[str, str]) -> str:
    """The file with these values: each where its name stands, and as its last lines where it does not."""
    lines, left = [], dict(wanted)
    for line in text.split("\n"):
        bare, end = (line[:-1], "\r") if line.endswith("\r") else (line, "")
        named = NAMED.fullmatch(bare)
        if named and named[2] in wanted:
            left.pop(named[2], None)
            quote, _value = unquoted(named[3])
            line = f"{named[1]}{named[2]}={quote}{wanted[named[2]]}{quote}{end}"
        lines.append(line)
    if left and lines[-1] == "":
        lines.pop()
    return "\n".join([*lines, *(f"{name}={value}" for name, value in left.items()), *([""] if left else [])])


class Lab(Row):
    control = "secret_delivery"
    host = "app"
    touches = ("files",)
    reversible = False
    _consumer: FileConsumer | None = None

    def params(self, lab: Any) -> dict[str, Any]:
        delivered = lab.hostvars(self.host)["firebreak_secrets_delivered"][0]
        own = {
            "path": "app/backend",
            "fields": {name: name for name in FIELDS},
            "env_file": delivered["env_file"],
            "reload": delivered["reload"],
            "proof_url": delivered["proof_url"],
        }
        return {**own, **connection(lab, self.host)}

    def states(self) -> st.SearchStrategy[State]:
        line = st.one_of(
            st.sampled_from(LINES), st.sampled_from([f"{name}={value}" for name, value in CURRENT.items()])
        )
        odd = st.sampled_from(["line\nend", 'q"', "a b", "$x", "", 5, True, {"a": 1}, None])
        value = st.one_of(*[st.just("plain") for _n in range(6)], odd)
        return st.fixed_dictionaries(
            {
                "lines": st.lists(line, max_size=6),
                "end": st.sampled_from(["\n", "\r\n"]),
                "last end": st.booleans(),
                "mode": st.sampled_from([0o600, 0o640, 0o644, 0o755]),
                "link": st.booleans(),
                "consumer": st.sampled_from(["has nothing", "has the file"]),
            },
            optional={
                "broken": st.sampled_from(["missing", "folder", 'JWT_SECRET="open', "HOOK='open"]),
                "value": value,
                "fields": st.sampled_from([["JWT_SECRET"], ["HOOK"], ["JWT_SECRET", "OTHER"]]),
            },
        )

    def bring(self, lab: Any, state: State) -> None:
        """In the usual state: new values in Vault that nobody was told of."""
        file = self._generated(lab)
        for one in (file, file.with_name("generated.link")):
            one.rmdir() if one.is_dir() else one.unlink(missing_ok=True)
        forget(lab, GENERATED)
        if "lines" not in state:
            data = {**self._vault(lab), **{name: secrets.token_hex(32) for name in FIELDS}}
            ask(lab, "POST", "secret/data/app/backend", {"data": data})
            return
        broken = state.get("broken")
        if broken == "folder":
            file.mkdir()
        elif broken != "missing":
            file.write_bytes(self._text(state).encode())
            file.chmod(state["mode"])
        if state["link"]:
            file.with_name("generated.link").symlink_to(file.name)
        ask(lab, "POST", f"secret/data/{GENERATED}", {"data": self._wanted(state)})
        if self._consumer is None:
            self._consumer = FileConsumer().__enter__()
        self._consumer.read = Path(lab.dir) / "generated.loaded"
        told = file.read_bytes() if file.is_file() and state["consumer"] == "has the file" else b""
        self._consumer.read.write_bytes(told)

    @staticmethod
    def _generated(lab: Any) -> Path:
        return Path(lab.dir) / "app" / "generated.env"

    @staticmethod
    def _wanted(state: State) -> dict[str, Any]:
        return {**CURRENT, **({"JWT_SECRET": state["value"]} if state.get("value", "plain") != "plain" else {})}

    @staticmethod
    def _text(state: State) -> str:
        lines = [*state["lines"], *([state["broken"]] if state.get("broken", "m f")[0] in "JH" else [])]
        return state["end"].join(lines) + (state["end"] if state["last end"] and lines else "")

    def asked(self, lab: Any, state: State) -> dict[str, Any]:
        if "lines" not in state:
            return self.params(lab)
        file, consumer = self._generated(lab), self._consumer
        assert consumer and consumer.read
        return {
            "path": GENERATED,
            "fields": {name: name for name in state.get("fields", ["JWT_SECRET", "HOOK"])},
            "env_file": str(file.with_name("generated.link") if state["link"] else file),
            "reload": ["cp", str(file), str(consumer.read)],
            "proof_url": f"{consumer.url}/internal/secret-proof",
            "proof_patience": 1.0,
            **connection(lab, self.host),
        }

    def refusal(self, lab: Any, state: State) -> str | None:
        if "lines" not in state:
            return None
        names = state.get("fields", ["JWT_SECRET", "HOOK"])
        value, broken = state.get("value", "plain"), state.get("broken")
        if "JWT_SECRET" in names and isinstance(value, str) and value != "plain":
            return "fields: the value for JWT_SECRET has characters"
        if broken in ("missing", "folder"):
            return "env_file cannot be used: it does not exist or is no file"
        if broken and broken.split("=")[0] in names:
            return "env_file cannot be used: a value in it goes over several lines"
        lacking = ["JWT_SECRET"] if "JWT_SECRET" in names and not isinstance(value, (str, int)) else []
        lacking += ["JWT_SECRET"] if value is True and "JWT_SECRET" in names else []
        lacking += ["OTHER"] if "OTHER" in names else []
        return f"has no readable {', '.join(lacking)}" if lacking else None

    def effect(self, lab: Any, state: State, before: dict[str, Any], seen: dict[str, Any]) -> None:
        if "lines" not in state:
            return
        names = state.get("fields", ["JWT_SECRET", "HOOK"])
        wanted = {name: str(self._wanted(state)[name]) for name in names}
        text = before["files"]["generated.env"].pop("text")
        assert seen["files"]["generated.env"].pop("text") == delivered(text, wanted)
        assert seen == before
        assert self._consumer and {name: self._consumer.values[name] for name in names} == wanted

    def observe(self, lab: Any) -> dict[str, Any]:
        file, wanted = self._file(lab), self._vault(lab)
        values = dict(line.split("=", 1) for line in file.read_text().splitlines() if "=" in line)
        others = "".join(
            line for line in file.read_text().splitlines(keepends=True) if line.split("=")[0] not in FIELDS
        )
        return {
            "in the file": {name: values[name] == wanted[name] for name in FIELDS},
            "in use": {name: self._uses(lab, name, wanted[name]) for name in FIELDS},
            "others": hashlib.sha256(others.encode()).hexdigest(),
            "mode": file.stat().st_mode,
            "beside it": sorted(entry.name for entry in file.parent.iterdir()),
        }

    def contained(self, lab: Any, before: dict[str, Any], seen: dict[str, Any]) -> None:
        assert before["in the file"] == before["in use"] == dict.fromkeys(FIELDS, False)
        assert seen["in the file"] == seen["in use"] == dict.fromkeys(FIELDS, True)
        assert all(seen[name] == before[name] for name in ("others", "mode", "beside it"))

    def reach(self, lab: Any) -> Reach:
        return Reach()

    def foreign(self, lab: Any) -> EnvFile:
        return EnvFile(lab)

    def secrets(self, lab: Any) -> list[str]:
        return [*(str(self._vault(lab)[name]) for name in FIELDS), lab.env["VAULT_TOKEN"]]

    def _file(self, lab: Any) -> Path:
        return Path(lab.hostvars(self.host)["firebreak_secrets_delivered"][0]["env_file"])

    @staticmethod
    def _vault(lab: Any) -> dict[str, Any]:
        data: dict[str, Any] = ask(lab, "GET", "secret/data/app/backend")["data"]["data"]
        return data

    @staticmethod
    def _uses(lab: Any, name: str, value: str) -> bool:
        nonce = secrets.token_hex(16)
        with urllib.request.urlopen(f"{lab.app_direct_url}/internal/secret-proof?name={name}&nonce={nonce}") as answer:
            said = json.load(answer)["hmac"]
        return bool(said == hmac.new(value.encode(), bytes.fromhex(nonce), hashlib.sha256).hexdigest())
