# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""The errors that cross layers. Their text names options and services' codes, never a value."""

from __future__ import annotations


class FirebreakError(Exception):
    """An honest failure.

    ``effect`` says what the failed request did: "none" (surely nothing) or "unknown" (it may have had its effect).
    ``facts`` are non-secret keys for the result of the task.
    """

    def __init__(self, msg: str, effect: str = "unknown", **facts: object) -> None:
        super().__init__(msg)
        self.msg = msg
        self.effect = effect
        self.facts = facts


class Refused(FirebreakError):
    """A guard or the input forbids it: nothing was touched."""

    def __init__(self, msg: str, guard: str = "input", **facts: object) -> None:
        super().__init__(msg, effect="none", **facts)
        self.guard = guard


class Unproven(FirebreakError):
    """The change was made, but its effect could not be shown."""


class MissingLibrary(FirebreakError):
    """A Python library is absent or too old; the text is Ansible's standard one."""

    def __init__(self, msg: str) -> None:
        super().__init__(msg, effect="none")


class StoreUnavailable(FirebreakError):
    """The case store does not answer or does not take entries."""


class Busy(FirebreakError):
    """Another run is writing for the same system."""

    def __init__(self, msg: str) -> None:
        super().__init__(msg, effect="none")
