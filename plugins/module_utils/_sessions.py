# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""Which keys are sessions, whose they are, and since when: pure functions over names and values."""

from __future__ import annotations

import datetime
import json
import re
import secrets
from typing import Any

from ._errors import Refused

PLACEHOLDER = re.compile(r"\{(\w*)\}")
# Times of JavaScript are in milliseconds. As seconds this is the year 5138.
FIRST_MILLISECONDS = 1e11
BETWEEN_TEXT = secrets.token_hex(8)
BETWEEN = f',"{BETWEEN_TEXT}",'.encode()


class Template:
    """The names of session keys, as ``session:refresh:{user}:{id}``.

    A placeholder stands for one or more characters without a separator. Separators are the characters of the template that
    are neither letters nor digits. So user 1 is never user 11, and a name with more parts is somebody else's.
    """

    def __init__(self, text: str, users: list[str] | None, spared: list[str] | None = None) -> None:
        parts = PLACEHOLDER.split(text)
        literals, names = parts[::2], parts[1::2]
        if not literals[0] or not names or not {*names} <= {"user", "id"} or len({*names}) != len(names):
            raise Refused("key_template: it begins with fixed text and holds {user}, {id} or both, each once")
        separators = sorted({char for char in "".join(literals) if not char.isalnum()})
        if users is not None and "user" not in names:
            raise Refused("key_template: without {user} it does not tell whose a session is; scope=users needs that")
        if users == [] or any(not user or set(user) & set(separators) for user in users or []):
            raise Refused("users: name at least one; none is empty or holds a separator of key_template")
        if users is None and spared and "user" not in names:
            raise Refused(
                "key_template: without {user} it does not tell which sessions are of protected accounts",
                guard="protected",
            )
        self.prefix = literals[0].encode()
        self._spared = {user.encode() for user in spared or []}
        self._users = None if users is None else {user.encode() for user in users}
        one = f"[^{re.escape(''.join(separators))}]+" if separators else ".+"
        pattern = "".join(
            re.escape(part) if place % 2 == 0 else f"(?P<{part}>{one})" for place, part in enumerate(parts)
        )
        self._pattern = re.compile(pattern.encode(), re.DOTALL)
        only = users[0] if users and len(users) == 1 else None
        self.match = "".join(
            _escaped(part) if place % 2 == 0 else _escaped(only) if part == "user" and only else "*"
            for place, part in enumerate(parts)
        ).encode()

    def pick(self, keys: list[bytes]) -> list[bytes]:
        """The keys that are sessions of these users; of all, those of ``spared`` are none."""
        whole = self._pattern.fullmatch
        if self._users is None and self._spared:
            return [key for key in keys if (found := whole(key)) and found["user"] not in self._spared]
        if self._users is None:
            return [key for key in keys if whole(key)]
        return [key for key in keys if (found := whole(key)) and found["user"] in self._users]


def _escaped(text: str) -> str:
    """Literal in a glob of Redis."""
    return re.sub(r"([\\*?\[\]])", r"\\\1", text)


def epoch(option: str, text: str) -> float:
    """Seconds since 1970, from such a number or from ISO 8601 with a time zone."""
    moment = _moment(text)
    if moment is None:
        raise Refused(f"{option}: give seconds since 1970, or ISO 8601 with a time zone as in 2026-11-20T03:00:00Z")
    return round(moment, 6)  # what ISO 8601 can say, so that the time in a mark is the time that was asked for


def iso(moment: float) -> str:
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat().replace("+00:00", "Z")


def _moment(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return _from_iso(value)
    if isinstance(value, bool) or not 0 <= number < 1e15:
        return None
    return number / 1000 if number >= FIRST_MILLISECONDS else number


def _from_iso(value: Any) -> float | None:
    try:
        moment = datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return moment.timestamp() if moment.tzinfo else None


def issued(values: list[bytes | None], field: str) -> list[float | None]:
    """When each session began; None where the value does not tell."""
    present = [value or b"null" for value in values]
    try:  # one call for a page takes half the time of one for each value
        documents = json.loads(b"[" + BETWEEN.join(present) + b"]")
    except ValueError:
        documents = []
    # A broken value may swallow its neighbour; then the texts between them are not where they belong.
    whole = len(documents) == 2 * len(values) - 1 and documents[1::2].count(BETWEEN_TEXT) == len(values) - 1
    documents = documents[::2] if whole else [_document(value) for value in present]
    return [_moment(document.get(field)) if isinstance(document, dict) else None for document in documents]


def _document(value: bytes) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return None


def begun_before(keys: list[bytes], values: list[bytes | None], field: str, moment: float) -> list[bytes]:
    """The sessions that began before it. One that does not tell its time cannot be shown to be younger."""
    times = issued(values, field)
    return [key for key, time in zip(keys, times, strict=True) if time is None or time < moment]
