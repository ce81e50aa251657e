# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""Third-party libraries: one way to import them and to say which one is missing."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
from types import ModuleType

from ansible.module_utils.basic import missing_required_lib

from ._errors import MissingLibrary


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


@functools.cache  # what is there stays there, and looking its version up costs as much as a request
def require(name: str, distribution: str, minimum: str) -> ModuleType:
    """Import ``name``; the error names ``distribution``, the version that is needed and the one that was found."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise MissingLibrary(missing_required_lib(f"{distribution}>={minimum}")) from None
    found = importlib.metadata.version(distribution)
    if _numbers(found) < _numbers(minimum):
        raise MissingLibrary(
            f"{missing_required_lib(f'{distribution}>={minimum}')} Found version {found} at {module.__file__}."
        )
    return module
