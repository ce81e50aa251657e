# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Good users, about ten requests a second through the edge: are they served while an incident is contained?

A user who is signed out logs in again. Only who cannot get in any more was refused.
"""

from __future__ import annotations

import collections
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import files
from .actor import Client, Ledger, Unreachable

EVERY = 0.6  # for each of six users
OUTCOMES = ("served", "signed_out", "refused", "errors")


class User:
    """A browser: an access token, a refresh token, and a password in somebody's head."""

    def __init__(self, person: dict[str, Any], url: str, source: str) -> None:
        self._login = {"email": person["email"], "password": person["password"]}
        self._client = Client(url, source)
        self._tokens: dict[str, str] = {}
        self._turn = itertools.count(1)
        self._known = False

    def act(self) -> tuple[str, int]:
        """One thing that a user wants: what came of it, and the last status."""
        if not self._tokens:
            return self._log_in()
        if next(self._turn) % 5 == 0:
            status = self._refresh()
            return ("served", status) if status == 200 else self._log_in(status)
        status = self._read()
        if status == 401 and self._refresh() == 200:
            status = self._read()
        return ("served", status) if status == 200 else self._log_in(status)

    def _read(self) -> int:
        return self._client.send("GET", "/api/me", Authorization=f"Bearer {self._tokens['access_token']}")[0]

    def _refresh(self) -> int:
        status, body = self._client.send("POST", "/api/auth/refresh", {"refresh_token": self._tokens["refresh_token"]})
        if status == 200:
            self._tokens = body
        return status

    def _log_in(self, before: int = 0) -> tuple[str, int]:
        """Blocked (403) is no reason to log in again; a lost session (401) is."""
        if before not in (0, 401):
            return "refused", before
        was_in, self._tokens = bool(self._tokens), {}
        status, body = self._client.send("POST", "/api/auth/login", self._login)
        if status != 200:
            return "refused", status
        self._tokens = body
        return ("signed_out" if was_in else "served"), status


class Crowd:
    def __init__(self, users: list[User]) -> None:
        self._users = users
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self._ledger = Ledger("crowd", self.summary)

    def run(self) -> None:
        self._ledger.run([self._loop(number, user) for number, user in enumerate(self._users)])

    def _loop(self, number: int, user: User) -> Callable[[], None]:
        def loop() -> None:
            self._ledger.stop.wait(number * EVERY / len(self._users))
            while not self._ledger.stop.is_set():
                self._act(number, user)
                self._ledger.stop.wait(EVERY)

        return loop

    def _act(self, number: int, user: User) -> None:
        began = time.monotonic()
        try:
            outcome, code = user.act()
            status = str(code)
        except Unreachable as error:
            outcome, status = "errors", str(error)
        seconds = round(time.monotonic() - began, 4)
        with self._ledger.lock:
            self._counts[self._phase(), outcome] += 1
            self._ledger.add(user=number, outcome=outcome, status=status, seconds=seconds)

    def _phase(self) -> str:
        marks = self._ledger.marks()
        return "after" if "end" in marks else "during" if "start" in marks else "before"

    def summary(self) -> dict[str, Any]:
        """Called with the ledger's lock held."""
        phases = {
            phase: {outcome: self._counts[phase, outcome] for outcome in OUTCOMES}
            for phase in ("before", "during", "after")
        }
        return {"users": len(self._users), "phases": phases}


def main() -> None:
    env = os.environ
    people = files.read_json(Path(env["LAB_DIR"]) / "run" / "crowd.json")
    Crowd([User(person, env["LAB_EDGE_URL"], f"127.0.2.{40 + number}") for number, person in enumerate(people)]).run()


if __name__ == "__main__":
    main()
