# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""An env file on a host: read it, give some names new values, replace it. A value travels as standard input only."""

from __future__ import annotations

import base64
import re
import shlex
from typing import Any

from ._errors import FirebreakError, Refused

# What every reader of env files (a shell, systemd, Docker, dotenv libraries) takes as it stands.
PLAIN = re.compile(rb"[A-Za-z0-9_.,:/@%+=~-]+")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_WHY = {
    66: "it does not exist or is no file",
    74: "the content did not arrive whole",
    75: "somebody else changed it at the same time",
    77: "it cannot be read",
}

# Inode, size and times tell whether somebody else wrote in between. Base64, since a connection may decode what it passes on.
_READ = """set -eu
f=$(readlink -f -- "$1") && [ -f "$f" ] || exit 66
[ -r "$f" ] || exit 77
s=$(stat -c '%i %s %y %z' -- "$f"); echo "$s"; base64 < "$f"
[ "$s" = "$(stat -c '%i %s %y %z' -- "$f")" ] || exit 75
"""

# Beside it, so that the rename is atomic; never the old file with half a content, never a mode wider than the old one's.
_REPLACE = """set -eu
umask 077
f=$(readlink -f -- "$1") && [ -f "$f" ] || exit 66
t="$f.firebreak"; o=$(stat -c '%u:%g' -- "$f")
rm -f -- "$t"; trap 'rm -f -- "$t"' EXIT; trap 'exit 74' HUP INT TERM
set -C; cat > "$t"
[ "$(wc -c < "$t")" -eq "$3" ] || exit 74
[ "$(stat -c '%u:%g' -- "$t")" = "$o" ] || chown -- "$o" "$t"
chmod -- "$(stat -c '%a' -- "$f")" "$t"
sync -- "$t" 2>/dev/null || sync
[ "$(stat -c '%i %s %y %z' -- "$f")" = "$2" ] || exit 75
mv -f -- "$t" "$f"; trap - EXIT
sync -- "$(dirname -- "$f")" 2>/dev/null || sync
"""


def read_file(host: Any, env_file: str) -> tuple[str, bytes]:
    """What identifies this state of the file, and its content."""
    status, output, _errors = _run(host, _READ, [env_file], effect="none")
    _demand(status, "env_file cannot be used", effect="none")
    seen, _newline, content = output.decode("ascii", "replace").partition("\n")
    return seen.strip(), base64.b64decode(content)


def replace_file(host: Any, env_file: str, seen: str, content: bytes) -> None:
    """Replace the file whole, keeping mode and owner, unless it is not the one that was read."""
    status, _output, _errors = _run(host, _REPLACE, [env_file, seen, str(len(content))], content)
    _demand(status, "env_file could not be replaced", effect="none" if status in _WHY else "unknown")


def run_command(host: Any, command: list[str], what: str) -> None:
    status, _output, _errors = _guarded(host, shlex.join(command), b"", "unknown")
    if status:
        raise FirebreakError(f"{what} ended with status {status}")


def values_of(content: bytes, name: str) -> list[bytes]:
    """The values that a file gives to a name, without quotes."""
    return [_bare(match["value"]) for match in map(_line(name), content.split(b"\n")) if match]


def with_values(content: bytes, values: dict[str, bytes]) -> bytes:
    """The same content with these values; each other line stays as it is, to the byte."""
    for name, value in values.items():
        lines, found = content.split(b"\n"), False
        for number, line in enumerate(lines):
            if match := _line(name)(line):
                lines[number] = match["head"] + _written(name, value, match["value"]) + match["end"]
                found = True
        content = b"\n".join(lines)
        if not found:
            content += b"" if not content or content.endswith(b"\n") else b"\n"
            content += name.encode() + b"=" + _written(name, value, b"") + b"\n"
    return content


def _line(name: str) -> Any:
    return re.compile(rb"(?P<head>\s*(?:export\s+)?%s=)(?P<value>.*?)(?P<end>\r?)" % name.encode(), re.DOTALL).fullmatch


def _quote_of(value: bytes) -> bytes:
    return value[:1] if value[:1] in (b'"', b"'") else b""


def _bare(value: bytes) -> bytes:
    quote = _quote_of(value)
    return value[1:-1] if quote and len(value) > 1 and value.endswith(quote) else value


def _written(name: str, value: bytes, old: bytes) -> bytes:
    """The value in the quotes that stand there already; readers of env files do not agree on more."""
    quote = _quote_of(old)
    if quote and (len(old) < 2 or not old.endswith(quote)):
        raise Refused(f"env_file: the value of {name} goes over several lines")
    if not PLAIN.fullmatch(value):
        raise Refused(f"fields: the value for {name} has characters that readers of env files take differently")
    return quote + value + quote


def _run(host: Any, script: str, arguments: list[str], stdin: bytes = b"", effect: str = "unknown") -> Any:
    return _guarded(host, shlex.join(["/bin/sh", "-c", script, "firebreak", *arguments]), stdin, effect)


def _guarded(host: Any, command: str, stdin: bytes, effect: str) -> Any:
    if host is None:
        raise Refused("this control works on a host over its connection: it runs in its action, not with async")
    try:
        return host.run(command, stdin)
    except FirebreakError as error:
        raise FirebreakError(error.msg, effect=effect) from None


def _demand(status: int, what: str, effect: str) -> None:
    if status:
        raise FirebreakError(f"{what}: {_WHY.get(status, f'the host answered with status {status}')}", effect=effect)
