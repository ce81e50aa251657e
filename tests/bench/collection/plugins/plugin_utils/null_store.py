# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A store that keeps nothing, ``null:``: what a run would take without a case. It exists here only."""

from __future__ import annotations

import pathlib
from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils import _case, _store


class NullStore(_store.FileStore):
    """Every incident is known, no stream has an entry, and every entry is taken."""

    def names(self, prefix: str) -> list[str]:
        return []

    def get(self, key: str) -> bytes | None:
        return b"{}" if key.endswith("/00000001.json") else None

    def create(self, key: str, data: bytes) -> bool:
        return True

    def exclusive(self, key: str, patience: float) -> Any:
        return _store.S3Store.exclusive(self, key, patience)  # type: ignore[arg-type]


def install() -> None:
    real = _store.open_store

    def open_store(params: dict[str, Any], context: Any) -> Any:
        if params.get("case_store") == "null:":
            return NullStore(str(pathlib.Path("/nonexistent")), context)
        return real(params, context)

    _case.open_store = open_store
