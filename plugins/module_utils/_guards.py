# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""Guards: what no control may do, whoever asks. Pure functions; each raises ``Refused`` or returns what was overridden.

The engine calls them on every plan, in check mode too, so that a dry run refuses what the real run refuses.
"""

from __future__ import annotations

import datetime
import ipaddress
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from ._errors import Refused
from ._plan import Plan

# A block wider than these needs break glass: 65,536 IPv4 addresses, or a provider's usual IPv6 allocation.
WIDEST_PREFIX = {4: 16, 6: 32}
MOST_COUNTRIES = 20
# What can be overridden for a day: a name that is none of these is a slip of the pen.
OVERRIDABLE = ("all_login_roles", "all_sessions", "every_visitor", "evidence", "store", "wide_block")
Network: TypeAlias = "ipaddress.IPv4Network | ipaddress.IPv6Network"

# IPv6 addresses that spell an IPv4 one, and how many bits stand before it: IPv4-mapped, NAT64, 6to4.
EMBEDDED = (
    (ipaddress.IPv6Network("::ffff:0:0/96"), 96),
    (ipaddress.IPv6Network("64:ff9b::/96"), 96),
    (ipaddress.IPv6Network("2002::/16"), 16),
)


def site(params: Mapping[str, Any], addresses: list[str], environment: Mapping[str, str]) -> None:
    """The lab never reaches production, and production never takes the lab's settings."""
    name = params.get("site")
    if not name:
        raise Refused(
            "site: every inventory sets firebreak_site (for example production, or lab on loopback)", guard="site"
        )
    if name == "lab":
        for address in addresses:
            if not is_loopback(address):
                raise Refused(
                    "site: lab talks to loopback only, and an address of a service is none; see the options of this host",
                    guard="site",
                )
    elif environment.get("FIREBREAK_LAB"):
        raise Refused(f"site: {name} refuses to run while FIREBREAK_LAB is set; unset it", guard="site")
    elif not params.get("owner"):
        raise Refused("owner: name who owns this control (firebreak_owner)", guard="expiry")
    elif not any((params.get("protected") or {}).values()):
        raise Refused(
            "protected: name what no control may cover (firebreak_protected: the responders' addresses, roles, accounts)",
            guard="protected",
        )


def host_of(address: str) -> str:
    """The host of a URL or of a plain address."""
    return (urllib.parse.urlsplit(address).hostname or "") if "//" in address else address.strip("[]")


def is_loopback(address: str) -> bool:
    host = host_of(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def network(text: str) -> Network:
    """An address or network; IPv4 written as IPv4-mapped IPv6 is IPv4."""
    parsed = ipaddress.ip_network(text.strip(), strict=False)
    if isinstance(parsed, ipaddress.IPv6Network) and parsed.prefixlen >= 96:
        mapped = parsed.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.ip_network(f"{mapped}/{parsed.prefixlen - 96}")
    return parsed


def _networks(option: str, texts: list[str]) -> list[Network]:
    result = []
    for text in texts:
        try:
            result.append(network(str(text)))
        except ValueError:
            raise Refused(f"{option}: {text} is no address or network in CIDR form", guard="protected") from None
    return result


def _hits(block: Network) -> list[Network]:
    """The block, and the IPv4 addresses whose machines it also hits: their IPv6 spellings lie in it."""
    found: list[Network] = [block]
    if isinstance(block, ipaddress.IPv4Network):
        return found
    for spellings, skipped in EMBEDDED:
        if spellings.subnet_of(block):
            found.append(ipaddress.IPv4Network("0.0.0.0/0"))
        elif block.subnet_of(spellings):
            address = int(block.network_address) >> (96 - skipped) & 0xFFFFFFFF
            found.append(ipaddress.IPv4Network((address, min(block.prefixlen - skipped, 32))))
    return found


def protected(
    plan: Plan,
    protect: Mapping[str, Any] | None,
    seen: Sequence[Mapping[str, Any]] | None = None,
    host: str | None = None,
) -> None:
    """Nothing protected may be covered by a block, a lock or a revocation; nor what the systems see of this run itself.

    An address counts wherever it was seen, a role on the system that knows it.
    """
    protect = dict(protect or {})
    for look in seen or ():
        for kind in ("addresses", "tokens", *(("roles",) if look.get("host") == host else ())):
            protect[kind] = [*(protect.get(kind) or []), *(look.get(kind) or [])]
    kept = [(one, piece) for one in _networks("protected", protect.get("addresses") or []) for piece in _hits(one)]
    for block in _networks("addresses", list(plan.covers.get("addresses", []))):
        for piece in _hits(block):
            for one, address in kept:
                if piece.version == address.version and piece.overlaps(address):
                    raise Refused(
                        f"protected: {block} covers {one}, which is protected{_seen_by(str(one), seen)}; take it out of "
                        "the list",
                        guard="protected",
                    )
    for kind in ("countries", "roles", "accounts", "tokens", "keys"):
        both = sorted(
            {_fold(kind, x) for x in plan.covers.get(kind, [])} & {_fold(kind, x) for x in protect.get(kind) or []}
        )
        if both:
            raise Refused(f"protected: {kind} {', '.join(both)} may not be covered by a control", guard="protected")


def _seen_by(address: str, seen: Sequence[Mapping[str, Any]] | None) -> str:
    """Which systems see this run come from there."""
    single = address.removesuffix("/32").removesuffix("/128")
    hosts = sorted(str(one.get("host")) for one in seen or () if single in (one.get("addresses") or ()))
    return f" (as {', '.join(hosts)} sees it, this run comes from there)" if hosts else ""


def _fold(kind: str, value: Any) -> str:
    return str(value).upper() if kind == "countries" else str(value)


def breadth(plan: Plan, glass: Mapping[str, str]) -> list[dict[str, str]]:
    """What is wider than an incident usually needs wants a reason, today's, given on the command line."""
    wide = list(plan.wide)
    for block in _networks("addresses", list(plan.covers.get("addresses", []))):
        if block.prefixlen < WIDEST_PREFIX[block.version]:
            wide.append("wide_block")
    if len(plan.covers.get("countries", [])) > MOST_COUNTRIES:
        wide.append("wide_block")
    overridden = []
    for guard in dict.fromkeys(wide):
        if guard not in glass:
            raise Refused(
                f"breadth: this needs break glass for {guard}; give "
                f'-e \'{{"firebreak_break_glass": [{{"guard": "{guard}", "reason": "..", "date": "<today, UTC>"}}]}}\'',
                guard="breadth",
            )
        overridden.append({"guard": guard, "reason": glass[guard]})
    return overridden


def break_glass(entries: list[Mapping[str, Any]] | None, now: float) -> dict[str, str]:
    """Today's overrides, by guard. One of another day is refused, so that none stays behind in a file."""
    today = datetime.datetime.fromtimestamp(now, datetime.UTC).date().isoformat()
    result = {}
    for entry in entries or []:
        if str(entry.get("date")) != today:
            raise Refused(
                f"break_glass: the date of {entry.get('guard')} is not today's ({today}, UTC); give it with -e",
                guard="breadth",
            )
        if entry.get("guard") not in OVERRIDABLE:
            raise Refused(
                f"break_glass: {entry.get('guard')} is no guard; there are {', '.join(OVERRIDABLE)}", guard="breadth"
            )
        if not str(entry.get("reason") or "").strip():
            raise Refused(f"break_glass: {entry.get('guard')} has no reason", guard="breadth")
        result[str(entry["guard"])] = str(entry["reason"])
    return result


def unattended(plan: Plan, is_unattended: bool) -> None:
    """A run without a person changes only what can be undone."""
    if not is_unattended:
        return
    for change in plan.changes:
        if change.undo is None:
            raise Refused(
                f"unattended: {change.action} {change.target} cannot be undone; a person runs this", guard="unattended"
            )


def irreversible(plan: Plan) -> bool:
    return any(change.undo is None for change in plan.changes)
