# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""The line of a database in PgBouncer's own file, on the host that has it.

The mark is a comment before the line: ``;firebreak INC-2026-1120-001/1`` and the line as it was, to the byte, so that
a password in it leaves neither the file nor the host, and the way back needs nothing else.
"""

from __future__ import annotations

from typing import Any

from ._errors import FirebreakError
from ._host_file import HostFile

CLOSED = "closed"
_WHY = {
    65: "its lines for this database are not understood: there must be one, after our comment where there is one",
    67: "its line for this database is not there any more",
}

# ``do`` is mark (with ``mark``), route (with ``host`` and ``port``), close, lift, or unmark. Other lines stay to the byte.
_EDIT = r"""
src == "wanted" {
    at = index($0, "="); name = substr($0, 1, at - 1)
    if (name == "") whole = 1; else want[name] = substr($0, at + 1)
    next
}
# The pairs of a connection string: value, and where it stands in the line.
function parse(text,    n, p, q, key, value, from, c) {
    split("", is); split("", start); split("", long)
    n = length(text); p = index(text, "=") + 1
    while (1) {
        while (p <= n && substr(text, p, 1) ~ /[ \t]/) p++
        if (p > n) return 1
        q = p; while (q <= n && substr(text, q, 1) !~ /[= \t]/) q++
        key = substr(text, p, q - p)
        while (q <= n && substr(text, q, 1) ~ /[ \t]/) q++
        if (substr(text, q, 1) != "=" || key in is) return 0
        q++; while (q <= n && substr(text, q, 1) ~ /[ \t]/) q++
        from = q; value = ""
        if (substr(text, q, 1) == "\047") {
            for (q++; ; q++) {
                if (q > n) return 0
                c = substr(text, q, 1)
                if (c == "\047") { if (substr(text, q + 1, 1) == "\047") q++; else { q++; break } }
                value = value c
            }
        } else {
            while (q <= n && substr(text, q, 1) !~ /[ \t]/) q++
            value = substr(text, from, q - from)
        }
        is[key] = value; start[key] = from; long[key] = q - from; p = q
    }
}
function set(text, key, value) {
    if (!parse(text)) return text
    if (!(key in is)) return text " " key "=" value
    return substr(text, 1, start[key] - 1) value substr(text, start[key] + long[key])
}
function led(text, host, port) { return set(set(text, "host", host), "port", port) }
function place(text,    host, port) {
    if (!parse(text)) { wrong = 65; exit }
    host = ("host" in is) ? is["host"] : ""; port = ("port" in is) ? is["port"] : "5432"
    if (host port !~ /^[A-Za-z0-9_.,:\/@-]*$/) { host = "?"; port = "?" }
    return host ":" port
}
function named(text) {
    if (!match(text, /^[ \t]*[A-Za-z0-9_.-]+[ \t]*=/)) return ""
    text = substr(text, 1, RLENGTH - 1); gsub(/[ \t]/, "", text)
    return text
}
function emit(text) { if (mode == "write") { printf "%s%s", separator, text; separator = "\n" } }
function before_it(text) { emit(";firebreak " want["mark"] " " text) }
{
    line = $0; end = ""
    if (line ~ /\r$/) { end = "\r"; line = substr(line, 1, length(line) - 1) }
    if (line ~ /^[ \t]*\[/) elsewhere = line !~ /^[ \t]*\[databases\]/
    if (elsewhere) { emit($0); next }
    if (line ~ /^[ \t]*\*[ \t]*=/) fallback = 1
    if (line ~ /^;firebreak [^ ]+ /) {
        held = substr(line, 12); mark = substr(held, 1, index(held, " ") - 1); held = substr(held, index(held, " ") + 1)
        if (named(held) == want["database"]) {
            if (marked || lines) { wrong = 65; exit }
            marked = mark; original = held
            if (want["do"] == "mark") { before_it(held end); next }
            if (want["do"] != "unmark") emit($0)
            if (want["do"] == "route") emit(led(held, want["host"], want["port"]) end)
            if (want["do"] == "lift") emit(held end)
            next
        }
    }
    if (named(line) == want["database"]) {
        if (lines++) { wrong = 65; exit }
        current = line
        if (marked && (want["do"] == "route" || want["do"] == "close" || want["do"] == "lift")) next
        if (!marked && want["do"] == "mark") before_it($0)
    }
    emit($0)
}
END {
    if (wrong) exit wrong
    if (!whole) exit 74
    if (want["do"] != "" && !(want["do"] == "mark" ? lines || marked : marked)) exit 67
    if (mode == "write") { if (newline) printf "%s", separator; exit }
    if (fallback) print "fallback"
    if (lines) print "route", place(current); else if (marked) print "route closed"
    if (marked) {
        print "mark", marked; print "original", place(original)
        if (lines && current != original) {
            host = place(current); port = host; sub(/:[^:]*$/, "", host); sub(/^.*:/, "", port)
            if (current != led(original, host, port)) print "edited"
        }
    }
}
"""


def look(host: Any, conffile: str, database: str, seconds: float) -> dict[str, Any]:
    """Where the file leads the database's clients, where it did before, and under which mark; ``seen`` identifies the file."""
    seen, lines = _file(host, conffile, seconds).compare({"database": database})
    told = {name: rest for name, _space, rest in (line.partition(" ") for line in lines)}
    if told.keys() - {"fallback", "route", "mark", "original", "edited"}:
        raise FirebreakError("conffile: the host's answer is not understood", effect="none")
    return {"seen": seen, **told}


def change(host: Any, conffile: str, database: str, seen: str, told: dict[str, str], seconds: float) -> None:
    """One step, written at once or not at all, and only onto the file that was seen."""
    _file(host, conffile, seconds).replace(seen, {"database": database, **told})


def _file(host: Any, conffile: str, seconds: float) -> HostFile:
    return HostFile(host, "conffile", conffile, _EDIT, _WHY, seconds)
