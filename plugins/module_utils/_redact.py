# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""Secrets: where they are known, how they are kept out of everything, and how one is handed on in memory."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, MutableMapping
from typing import Any, NoReturn

SHORTEST_SUBSTRING = 6
HIDDEN = "********"


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
        # A password that equals a public option (user "postgres", password "postgres") hides nothing; containing goes on.
        self._public = {str(value) for value in public}

    def add(self, value: Any) -> Any:
        if isinstance(value, bytes):
            self.add(value.decode("utf-8", "replace"))
        elif isinstance(value, str) and value and value not in self._public:
            self._values.add(value)
        return value

    def censor(self, result: Any) -> Any:
        """The same structure of plain JSON types, with every secret replaced, in keys too."""
        # The longest first: a secret that holds another one must not be left with its rest.
        values = sorted(self._values, key=len, reverse=True)
        return _clean(json.loads(json.dumps(result, default=str)), values)

    def found_in(self, structure: Any) -> bool:
        """Whether a secret stands in this structure, whole or as a part of a longer text."""
        return any(_holds(text, self._values) for text in _texts(structure))


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
