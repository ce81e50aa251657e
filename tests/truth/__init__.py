# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The truth harness: what must hold for every control and every playbook, whoever wrote it.

A file is a property, ``test_<property>.py``; each of its tests takes a control's row or a playbook as a parameter, so
that the id says which one. A test that tries many points says so with ``record_property("tried", n)``, and where more
points exist than were tried with ``record_property("of", n)``. ``make test`` runs the short form, ``make test-full``
the whole one.
"""

from __future__ import annotations

import os
from typing import TypeVar

FULL = os.environ.get("FIREBREAK_TRUTH") == "full"
Amount = TypeVar("Amount", int, float, list[int])


def budget(short: Amount, full: Amount) -> Amount:
    """How many examples, or how many seconds, this form of the harness has."""
    return full if FULL else short
