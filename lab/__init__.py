# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real servers on loopback, for drills and tests. ``python -m lab`` is the way in."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class LabError(Exception):
    """The lab cannot do what was asked; the text says why and what helps."""


def directory() -> Path:
    """Where the lab lives: ``LAB_DIR``, else ``.lab`` in the checkout."""
    return Path(os.environ.get("LAB_DIR") or ROOT / ".lab").resolve()
