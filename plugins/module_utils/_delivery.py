# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""An env file on a host: compare some names with their values, and replace it.

A value travels as standard input, towards the host only. What a command prints is shown by Ansible at -vvv, so nothing of
the file comes back: the host compares, and says which names are current, stale or absent.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

from ._errors import FirebreakError, Refused

# What every reader of env files (a shell, systemd, Docker, dotenv libraries) takes as it stands.
PLAIN = re.compile(r"[A-Za-z0-9_.,:/@%+=~-]+")
HOST_SECONDS = 30.0
LATE = 124  # as timeout(1) says it
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_WHY = {
    65: "a value in it goes over several lines",
    66: "it does not exist or is no file",
    73: "no file can be made beside it",
    74: "the values did not arrive whole",
    75: "somebody else changed it at the same time",
    77: "it cannot be read",
    LATE: "the host did not end it in time",
}

# Standard input is NAME=VALUE for each name and a last line "=", which says that it is whole. Other lines stay to the byte.
_EDIT = r"""
src == "wanted" {
    at = index($0, "="); name = substr($0, 1, at - 1)
    if (name == "") whole = 1; else { order[++count] = name; want[name] = substr($0, at + 1) }
    next
}
{
    line = $0; end = ""; out = $0
    if (line ~ /\r$/) { end = "\r"; line = substr(line, 1, length(line) - 1) }
    if (match(line, /^[ \t]*(export[ \t]+)?[A-Za-z_][A-Za-z0-9_]*=/)) {
        head = substr(line, 1, RLENGTH); value = substr(line, RLENGTH + 1)
        name = substr(head, 1, RLENGTH - 1); sub(/^[ \t]*(export[ \t]+)?/, "", name)
        if (name in want) {
            quote = substr(value, 1, 1); if (quote != "\"" && quote != "\047") quote = ""
            if (quote != "" && (length(value) < 2 || substr(value, length(value)) != quote)) { wrong = 65; exit }
            old = quote == "" ? value : substr(value, 2, length(value) - 2)
            found[name] = 1; if (old "" != want[name] "") stale[name] = 1
            out = head quote want[name] quote end
        }
    }
    if (mode == "write") { printf "%s%s", separator, out; separator = "\n" }
}
END {
    if (wrong) exit wrong
    if (!whole) exit 74
    if (mode == "write" && newline) { printf "%s", separator; separator = "" }
    for (i = 1; i <= count; i++) {
        name = order[i]
        if (mode == "compare") print name, (name in found) ? (name in stale) ? "stale" : "current" : "absent"
        else if (!(name in found)) { printf "%s%s=%s\n", separator, name, want[name]; separator = "" }
    }
}
"""

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


def compare(
    host: Any, env_file: str, values: dict[str, str], seconds: float = HOST_SECONDS
) -> tuple[str, dict[str, str]]:
    """What identifies this state of the file, and of each name whether it is current, stale or absent."""
    status, output, _errors = _run(host, _COMPARE, [env_file], values, seconds, effect="none")
    if status:
        raise FirebreakError(f"env_file cannot be used: {_why(status)}", effect="none")
    seen, *lines = output.decode("ascii", "replace").splitlines()
    standings = dict(line.split() for line in lines if line)
    if standings.keys() != values.keys():
        raise FirebreakError("env_file: the host's answer is not understood", effect="none")
    return seen.strip(), standings


def replace(host: Any, env_file: str, seen: str, values: dict[str, str], seconds: float = HOST_SECONDS) -> None:
    """Give these names their values, keeping mode and owner, unless the file is not the one that was seen."""
    status, _output, _errors = _run(host, _REPLACE, [env_file, seen], values, seconds, effect="unknown")
    if status:
        effect = "none" if status in _WHY and status != LATE else "unknown"
        raise FirebreakError(f"env_file could not be replaced: {_why(status)}", effect=effect)


def run_command(host: Any, command: list[str], what: str, seconds: float = HOST_SECONDS) -> None:
    status, _output, _errors = _guarded(host, command, b"", seconds, "unknown")
    if status:
        why = "did not end in time" if status == LATE else f"ended with status {status}"
        raise FirebreakError(f"{what} {why}")


def _run(host: Any, script: str, arguments: list[str], values: dict[str, str], seconds: float, effect: str) -> Any:
    for name, value in values.items():
        if not PLAIN.fullmatch(value):
            raise Refused(f"fields: the value for {name} has characters that readers of env files take differently")
    stdin = "".join(f"{name}={value}\n" for name, value in values.items()) + "=\n"
    command = ["/bin/sh", "-c", _OPEN + script, "firebreak", _EDIT, *arguments]
    return _guarded(host, command, stdin.encode(), seconds, effect)


def _guarded(host: Any, command: list[str], stdin: bytes, seconds: float, effect: str) -> Any:
    """The host itself ends what takes too long: a command that hangs there would hang here."""
    if host is None:
        raise Refused("this control works on a host over its connection: it runs in its action, not with async")
    try:
        return host.run(shlex.join(["timeout", f"{max(seconds, 1.0):.0f}", *command]), stdin)
    except FirebreakError as error:
        raise FirebreakError(error.msg, effect=effect) from None


def _why(status: int) -> str:
    return _WHY.get(status, f"the host answered with status {status}")
