# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""Secrets: where they are known, how they are kept out of everything, and how one is handed on in memory."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import urllib.parse
import warnings
from collections.abc import Collection, Iterable, Iterator, MutableMapping
from typing import Any, NoReturn

SHORTEST_SUBSTRING = 6
# A password that is no longer than this, and equals a public option, is a name (user "postgres", password "postgres").
LONGEST_NAME = 12
# A word. As a secret it is the weakest, and most in need of being replaced; in a text of ours it stands for itself.
PLAIN_WORD = re.compile("[A-Za-z_]{1,11}")
HIDDEN = "********"
# Who asks, as an address (a URL) or a connection string may say: ``user:password``, or one long word, which is a token.
ASKED_AS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://([^/?#\s]*)@")
ASKED_WITH = re.compile(r"(?i)\bpassword\s*=\s*('(?:[^'\\]|\\.)*'|[^\s&]+)")
SHORTEST_TOKEN = 16
OUTPUTS = (1, 2)


class Held(MutableMapping[str, Any]):
    """Values that may pass from one step of a control to the next in memory, and nowhere else."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._values[key] = value

    def __delitem__(self, key: str) -> None:
        del self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def _refuse(self, *_args: Any) -> NoReturn:
        raise TypeError("held values do not leave memory")

    __repr__ = __str__ = __format__ = __reduce_ex__ = __copy__ = __deepcopy__ = _refuse


class Secrets:
    """The secret values that this task knows."""

    def __init__(self, public: Iterable[str] = ()) -> None:
        self._values: set[str] = set()
        self._embedded: set[str] = set()
        # What equals a public option may stand in an entry, or nothing could be contained. Shown it is only as a name.
        self._public = {str(value) for value in public}

    def add(self, value: Any) -> Any:
        if isinstance(value, bytes):
            self.add(value.decode("utf-8", "replace"))
        elif isinstance(value, str) and value and not (value in self._public and len(value) <= LONGEST_NAME):
            self._values.add(value)
        return value

    def add_embedded(self, structure: Any) -> None:
        """Hide what stands as a password in an address. Entries may hold it: a rule can be about such an address."""
        self._embedded.update(_embedded(structure))

    def censor(self, result: Any) -> Any:
        """The same structure of plain JSON types, with every secret replaced, in keys too."""
        # The longest first: a secret that holds another one must not be left with its rest.
        values = sorted(self._values | self._embedded, key=len, reverse=True)
        return _clean(json.loads(json.dumps(result, default=str)), values)

    def found_in(self, structure: Any) -> bool:
        """Whether a secret stands in this structure, whole or as a part of a longer text. Where a secret is a plain word,
        nobody can tell: it is hidden in results, but nothing is refused because of it."""
        values = {value for value in self._values - self._public if not PLAIN_WORD.fullmatch(value)}
        return any(_holds(text, values) for text in _texts(structure))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What a library prints, warns of or logs by itself may hold anything: nobody gets it."""
    kept = {output: os.dup(output) for output in OUTPUTS}
    logged = logging.root.manager.disable
    try:
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
            warnings.catch_warnings(),
        ):
            for output in OUTPUTS:
                os.dup2(nowhere.fileno(), output)
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
            yield
    finally:
        logging.disable(logged)
        for output, was in kept.items():
            os.dup2(was, output)
            os.close(was)


def texts_of(structure: Any) -> set[str]:
    """All texts that are no words by chance, for a message about options that were given wrongly."""
    return {text for text in _texts(structure) if len(text) >= SHORTEST_SUBSTRING}


def _embedded(structure: Any) -> Iterator[str]:
    for text in _texts(structure):
        for asked in ASKED_AS.findall(text):
            _user, named, password = asked.partition(":")
            password = password if named else asked if len(asked) >= SHORTEST_TOKEN else ""
            yield from {password, urllib.parse.unquote(password)} - {""}
        for password in ASKED_WITH.findall(text):
            yield password.strip("'") or password


def _holds(text: str, values: Collection[str]) -> bool:
    return text in values or any(len(value) >= SHORTEST_SUBSTRING and value in text for value in values)


def _texts(structure: Any) -> Iterator[str]:
    if isinstance(structure, dict):
        for key, value in structure.items():
            yield str(key)
            yield from _texts(value)
    elif isinstance(structure, (list, tuple)):
        for value in structure:
            yield from _texts(value)
    elif isinstance(structure, str):
        yield structure


def _clean(structure: Any, values: Collection[str]) -> Any:
    if isinstance(structure, dict):
        return {_clean(key, values): _clean(value, values) for key, value in structure.items()}
    if isinstance(structure, list):
        return [_clean(value, values) for value in structure]
    if isinstance(structure, str):
        return _clean_text(structure, values)
    # A secret that was given where a number is expected comes back as a number.
    return (
        HIDDEN
        if not isinstance(structure, bool) and structure is not None and _holds(str(structure), values)
        else structure
    )


def _clean_text(text: str, values: Collection[str]) -> str:
    """A short secret is replaced where it stands alone only: as a part of other words it tells nothing, and would hide them."""
    if text in values:
        return HIDDEN
    for value in values:
        if len(value) >= SHORTEST_SUBSTRING:
            text = text.replace(value, HIDDEN)
    return text
