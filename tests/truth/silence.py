# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A play that says no secret itself, as talkative as Ansible can be, and the search through all that came of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ansible.parsing.vault import VaultLib, VaultSecret

from lab import ROOT
from tests.helpers_search import CommandLines, Search

INCIDENT = "{{ opened.incident_id }}"
VAULT_PASSWORD = "the vault's own password"


def surroundings(home: Path) -> dict[str, str]:
    """Ansible as talkative as it can be, and every file of it under ``home``."""
    return {
        "ANSIBLE_ACTION_PLUGINS": str(ROOT / "tests" / "leaky" / "action"),
        "ANSIBLE_LIBRARY": str(ROOT / "tests" / "leaky" / "library"),
        "ANSIBLE_CALLBACKS_ENABLED": "lockstep,witness,junit,tree",
        "ANSIBLE_CALLBACK_TREE_DIR": str(home / "tree"),
        "ANSIBLE_CACHE_PLUGIN": "jsonfile",
        "ANSIBLE_CACHE_PLUGIN_CONNECTION": str(home / "facts"),
        "ANSIBLE_DISPLAY_ARGS_TO_STDOUT": "true",
        "ANSIBLE_DISPLAY_TRACEBACK": "always",
        "ANSIBLE_LOG_PATH": str(home / "ansible.log"),
        "ANSIBLE_RETRY_FILES_ENABLED": "true",
        "ANSIBLE_RETRY_FILES_SAVE_PATH": str(home / "retry"),
        "JUNIT_OUTPUT_DIR": str(home / "junit"),
        "PYTHONPATH": str(ROOT),
        "TEST_WITNESS": str(home / "witness.jsonl"),
    }


class Variables:
    """A task's options as variables in an encrypted file, so that the play itself says no secret."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._file, self._inline, self._password = folder / "given.json", folder / "inline.yml", folder / "password"
        self._vault = VaultLib([("default", VaultSecret(VAULT_PASSWORD.encode()))])
        self._given: list[Any] = []
        self._texts: list[str] = []

    def hidden(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options, each as a variable; what is about the play itself stays."""
        return {name: value if value == INCIDENT else self.variable(value) for name, value in options.items()}

    def variable(self, value: Any) -> str:
        if isinstance(value, str) and not self._texts:  # the first is encrypted by itself: each takes a while
            self._texts.append(value)
            return "{{ inline }}"
        self._given.append(value)
        return f"{{{{ given[{len(self._given) - 1}] }}}}"

    def words(self) -> list[str]:
        self._password.write_text(VAULT_PASSWORD)
        self._file.write_bytes(self._vault.encrypt(json.dumps({"given": self._given})))
        lines = self._vault.encrypt(self._texts[0]).decode().splitlines()
        self._inline.write_text("\n".join(["inline: !vault |", *(f"  {line}" for line in lines)]))
        return ["--vault-password-file", str(self._password), "-e", f"@{self._file}", "-e", f"@{self._inline}"]


def told_apart(search: Callable[[set[str]], Search], secrets: set[str], public: set[str]) -> tuple[str, list[str]]:
    """One search for both: where what is no secret was found, and the hits of what is one."""
    public = {*public, "--foreground"}
    seen = search({*secrets, *public})
    return " ".join(hit for hit in seen.hits if seen.found(hit) in public), [
        hit for hit in seen.hits if seen.found(hit) not in public
    ]


def found(secrets: set[str], console: Path, results: dict[str, Any], lines: CommandLines, store: str) -> Search:
    """The search through the console, the results, the home of a play, its case store and what could be seen of processes."""
    search = Search(secrets)
    search.look("console", console.read_bytes())
    search.look("results", json.dumps(results).encode())
    for line in lines.seen:
        search.look("command line", line)
    for seen in lines.environments:
        search.look("environment", seen)
    search.look_below(console.parent, [console])
    search.look_below(Path(store.removeprefix("file://")))
    return search
