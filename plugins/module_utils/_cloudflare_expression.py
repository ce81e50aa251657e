# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""Expressions of Cloudflare's rule language: written from options, and read for whom they can hit."""

from __future__ import annotations

import re
from typing import Any

from ._errors import Refused

LONGEST = 4096
SELECTORS = {
    "ip_lists": "[a-z0-9_]{1,50}",
    "countries": "[A-Z][A-Z0-9]",
    "hosts": "[a-z0-9.-]+",
    "paths": r"/[^\"\\\s]*",
    "except_ip_lists": "[a-z0-9_]{1,50}",
}
# What can make an expression match more than what it names.
_WIDENING = re.compile(r"\b(?:not|ne|or|xor|true|lt|le|gt|ge|continent|is_in_european_union)\b|!|\|\||\^\^|[<>]")
_NEGATED = re.compile(r"(?:\bnot|!)\s*ip\.src\s+in\s+\{[^}]*\}")
_ADDRESSES = re.compile(r"\bip\.src\s+(?:in|eq|==)\s+(\{[^}]*\}|[0-9a-fA-F.:/]+)")
_COUNTRY = re.compile(r"\bip\.(?:src|geoip)\.country\b")
_COUNTRIES = re.compile(r"\bip\.(?:src|geoip)\.country\s+(?:in|eq|==)\s+(\{[^}]*\}|\"[^\"]*\")")


def expression_of(params: dict[str, Any]) -> str:
    """The given expression, or one in which all given selectors must match."""
    text = str(params.get("expression") or "").strip() or _from_selectors(params)
    if not text or len(text) > LONGEST:
        raise Refused(
            f"expression: say what the rule matches, in at most {LONGEST} characters, or with {', '.join(SELECTORS)}"
        )
    return text


def _from_selectors(params: dict[str, Any]) -> str:
    lists, countries, hosts, paths, others = (_chosen(params, selector) for selector in SELECTORS)
    clients = [f"ip.src in ${name}" for name in lists]
    if countries:
        clients.append(f"ip.src.country in {_set(countries)}")
    groups = [clients, [f"http.host in {_set(hosts)}"] if hosts else []]
    groups.append([f'starts_with(http.request.uri.path, "{path}")' for path in paths])
    return " and ".join([*(_any(tests) for tests in groups if tests), *(f"not ip.src in ${name}" for name in others)])


def _chosen(params: dict[str, Any], selector: str) -> list[str]:
    values = [str(value) for value in params.get(selector) or []]
    for number, value in enumerate(values, 1):
        if not re.fullmatch(SELECTORS[selector], value):
            raise Refused(f"{selector}: number {number} is not of the form {SELECTORS[selector]}")
    return values


def _any(tests: list[str]) -> str:
    return tests[0] if len(tests) == 1 else f"({' or '.join(tests)})"


def _set(values: list[str]) -> str:
    return "{" + " ".join(f'"{value}"' for value in values) + "}"


def reach(params: dict[str, Any], rule: dict[str, Any]) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """What the rule covers, and whether it can hit every visitor, as far as its text tells."""
    if rule["action"] == "log" or not rule["enabled"]:
        return {}, ()
    if not params.get("expression"):
        narrow = params.get("ip_lists") or params.get("countries") or params.get("paths")
        return {"countries": list(params.get("countries") or [])}, () if narrow else ("every_visitor",)
    text = rule["expression"]
    narrow = re.search(r"\bip\.(?:src|geoip)\b", text) and not _WIDENING.search(re.sub(r'"(?:\\.|[^"\\])*"', "", text))
    # A country that is changed or compared in another way than by being named is not known.
    narrow = narrow and len(_COUNTRY.findall(text)) == len(_COUNTRIES.findall(text))
    named = " ".join(_ADDRESSES.findall(_NEGATED.sub("", text))).translate(str.maketrans("{}", "  "))
    covers = {
        "addresses": [each for each in named.split() if not each.startswith("$")],
        "countries": re.findall("[A-Z][A-Z0-9]", " ".join(_COUNTRIES.findall(text))),
    }
    return covers, () if narrow else ("every_visitor",)


def with_known_lists(text: str, known: set[str] | None) -> str:
    """For a dry run, which comes before the list that an earlier task would create."""
    if known is None:
        return text
    return re.sub(r"\$([a-z0-9_]+)(?![a-z0-9_.])", lambda name: name[0] if name[1] in known else "{192.0.2.1}", text)
