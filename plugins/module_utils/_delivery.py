# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""An env file on a host: compare some names with their values, and replace it.

A value travels towards the host only: the host compares, and says which names are current, stale or absent.
"""

from __future__ import annotations

import re
from typing import Any

from ._errors import FirebreakError, Refused
from ._host_file import HOST_SECONDS, HostFile

# What every reader of env files (a shell, systemd, Docker, dotenv libraries) takes as it stands.
PLAIN = re.compile(r"[A-Za-z0-9_.,:/@%+=~-]+")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# Other lines stay to the byte.
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


def compare(
    host: Any, env_file: str, values: dict[str, str], seconds: float = HOST_SECONDS
) -> tuple[str, dict[str, str]]:
    """What identifies this state of the file, and of each name whether it is current, stale or absent."""
    seen, lines = _file(host, env_file, seconds).compare(_plain(values))
    standings = dict(line.split() for line in lines)
    if standings.keys() != values.keys():
        raise FirebreakError("env_file: the host's answer is not understood", effect="none")
    return seen, standings


def replace(host: Any, env_file: str, seen: str, values: dict[str, str], seconds: float = HOST_SECONDS) -> None:
    """Give these names their values, unless the file is not the one that was seen."""
    _file(host, env_file, seconds).replace(seen, _plain(values))


def _file(host: Any, env_file: str, seconds: float) -> HostFile:
    return HostFile(host, "env_file", env_file, _EDIT, {65: "a value in it goes over several lines"}, seconds)


def _plain(values: dict[str, str]) -> dict[str, str]:
    for name, value in values.items():
        if not PLAIN.fullmatch(value):
            raise Refused(f"fields: the value for {name} has characters that readers of env files take differently")
    return values
