# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""A file on a host, looked at and edited there by an awk program: nothing of the file comes back but what that program says.

What a command prints is shown by Ansible at -vvv, and such files hold secrets. The program is told what to do by standard
input, as lines NAME=VALUE and a last line "=", which says that it is whole. Its variable ``mode`` is "compare" or "write".
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ._errors import FirebreakError, Refused

HOST_SECONDS = 30.0
LATE = 124  # as timeout(1) says it
_WHY = {
    66: "it does not exist or is no file",
    73: "no file can be made beside it",
    74: "what to do with it did not arrive whole",
    75: "somebody else changed it at the same time",
    77: "it cannot be read",
    LATE: "the host did not end it in time",
}

# Inode, size and times tell whether somebody else wrote in between.
_OPEN = """set -eu
umask 077; LC_ALL=C; export LC_ALL
state() { stat -c '%i %s %y %z' -- "$f"; }
edit() { awk -v mode="$1" -v newline="$(tail -c 1 -- "$f" | wc -l)" "$edit" src=wanted - src=file "$f"; }
edit=$1; f=$(readlink -f -- "$2") && [ -f "$f" ] || exit 66
[ -r "$f" ] || exit 77
"""

_COMPARE = """s=$(state); echo "$s"; edit compare
[ "$s" = "$(state)" ] || exit 75
"""

# Beside it, so that the rename is atomic: never the old file with half a content, never a wider mode than the old one's.
# Its name is new, so that two runs never write to one file, and begins with our process: what a dead one left is swept.
_REPLACE = """o=$(stat -c '%u:%g' -- "$f")
for t in "$f".firebreak.*.??????; do
    p=${t#"$f".firebreak.}; p=${p%.??????}
    case $p in *[!0-9]*) continue;; esac
    if [ "$p" = $$ ] || [ ! -e "/proc/$p" ]; then rm -f -- "$t"; fi
done
t=$(mktemp "$f.firebreak.$$.XXXXXX") || exit 73
trap 'rm -f -- "$t"' EXIT; trap 'exit 74' HUP INT TERM
edit write > "$t"
[ "$(stat -c '%u:%g' -- "$t")" = "$o" ] || chown -- "$o" "$t"
chmod -- "$(stat -c '%a' -- "$f")" "$t"
sync -- "$t" 2>/dev/null || sync
[ "$(state)" = "$3" ] || exit 75
mv -f -- "$t" "$f"; trap - EXIT
sync -- "$(dirname -- "$f")" 2>/dev/null || sync
"""


class HostFile:
    """One file; ``option`` names it in messages, ``why`` says what the program's own statuses mean."""

    def __init__(
        self, host: Any, option: str, path: str, edit: str, why: Mapping[int, str], seconds: float = HOST_SECONDS
    ) -> None:
        self._host = host
        self._option = option
        self._path = path
        self._edit = edit
        self._why = {**_WHY, **why}
        self._seconds = seconds

    def compare(self, told: Mapping[str, str]) -> tuple[str, list[str]]:
        """What identifies this state of the file, and what the program says of it."""
        status, output, _errors = self._run(_COMPARE, [], told, effect="none")
        if status:
            raise FirebreakError(f"{self._option} cannot be used: {self._meaning(status)}", effect="none")
        seen, *lines = output.decode("ascii", "replace").splitlines()
        return seen.strip(), [line for line in lines if line]

    def replace(self, seen: str, told: Mapping[str, str]) -> None:
        """Put what the program writes in its place, keeping mode and owner, unless the file is not the one that was seen."""
        status, _output, _errors = self._run(_REPLACE, [seen], told, effect="unknown")
        if status:
            effect = "none" if status in self._why and status != LATE else "unknown"
            raise FirebreakError(f"{self._option} could not be replaced: {self._meaning(status)}", effect=effect)

    def _run(self, script: str, arguments: list[str], told: Mapping[str, str], effect: str) -> Any:
        stdin = "".join(f"{name}={value}\n" for name, value in told.items()) + "=\n"
        command = ["/bin/sh", "-c", _OPEN + script, "firebreak", self._edit, self._path, *arguments]
        return guarded(self._host, command, stdin.encode(), self._seconds, effect)

    def _meaning(self, status: int) -> str:
        return self._why.get(status, f"the host answered with status {status}")


def run_command(host: Any, command: list[str], what: str, seconds: float = HOST_SECONDS) -> None:
    status, _output, _errors = guarded(host, command, b"", seconds, "unknown")
    if status:
        why = "did not end in time" if status == LATE else f"ended with status {status}"
        raise FirebreakError(f"{what} {why}")


def guarded(host: Any, command: list[str], stdin: bytes, seconds: float, effect: str) -> Any:
    """A command on the host, which itself ends what takes too long; a failure of its connection has this effect."""
    if host is None:
        raise Refused("this control works on a host over its connection: it runs in its action, not with async")
    try:
        return host.run(shlex.join(["timeout", f"{max(seconds, 1.0):.0f}", *command]), stdin)
    except FirebreakError as error:
        raise FirebreakError(error.msg, effect=effect) from None
