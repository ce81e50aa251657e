# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""The steps of a rotation in a KV version 2 engine. Each can be repeated after a crash at any point.

The pending entry is claim, lock and value in one: ``{mark, base, values}``, created where nothing was. ``base`` is the
version that is replaced. At the end the record ``{mark, base, fields, done, salt, digest}`` is written over it, and the
versions with values are destroyed. Where a rotation stands follows from this entry and the secret; there is no other
record.

After the end a stolen value can come back: a reconciler or `kv rollback` writes it as a new version. So the record tells
our values from all others by a digest of the new ones, never of the old: a generated value has 256 bits and cannot be
guessed from it. A provider's may be shorter, hence a salt for each record, scrypt, and one digest for all fields together.
Whatever else stands in these fields later is a conflict, be it stolen, a provider's or the next rotation's: this one does
not know, and says who wrote it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from typing import Any

from ._errors import Refused, Unproven
from ._plan import Facts
from ._proof import prove_rotation
from ._vault import Client, contains, same, undestroyed

STATES = ("unrotated", "staged", "current", "retired")
# Versions that others may have written since the new value was staged: each is read.
MOST_EDITS = 20


def read(client: Client, params: dict[str, Any]) -> Facts:
    """Where this rotation stands, from the secret and from the pending entry. Values stay in ``client.held``."""
    mount, path = params["engine_mount_point"], params["path"]
    secret = client.read_secret(mount, path) or {"version": 0, "data": None}
    pending = client.read_secret(mount, _pending_path(params)) or {"version": 0, "data": {}}
    entry = pending["data"] or {}
    current = {name: value for name, value in (secret["data"] or {}).items() if name in params["fields"]}
    known = (current, entry.get("values") or {}, params["new_values"] or {})
    for value in (value for values in known for value in values.values()):
        client.secret(str(value))
    client.held.update(values=entry.get("values"), entry_version=pending["version"], base=entry.get("base"))

    base = _replaced(client, params, secret, current, entry)
    metadata = client.read_metadata(mount, path)
    old = [version for version in undestroyed(metadata) if version <= base]
    done = bool(entry.get("done"))
    copies = _copies(client, params, pending["version"]) if done else [pending["version"]] if entry else []
    conflict = _conflict(client, params, secret, current, pending, base)
    facts = {
        "state": _state(entry, base, secret["version"], bool(copies or old)),
        "fields": sorted(current),
        "version": secret["version"],
        "replaces": base,
        "pending": "stored" if copies else "destroyed" if done else "absent",
        "old_versions": "readable" if old else "destroyed",
        "mark": params["mark"] if done else None,
        "conflict": conflict,
        "estimate": {"old_versions": len(old)},
    }
    if not conflict and STATES.index(facts["state"]) < STATES.index(params["state"]):
        client.require_capabilities(_capabilities(params))
        if metadata and secret["version"] == base:
            _require_two_versions(client, params, metadata)
        _refuse_known_values(params, *known)
    return facts


def _require_two_versions(client: Client, params: dict[str, Any], metadata: dict[str, Any]) -> None:
    if client.versions_kept(params["engine_mount_point"], metadata) < 2:
        raise Refused(
            f"max_versions of {name_of(params)} is 1, by its metadata or by the mount's configuration: Vault would forget "
            "the old value when the new one is written, and nobody could prove that it is refused; set it to 2 or more"
        )


def stage(client: Client, params: dict[str, Any], base: int) -> None:
    given = params["new_values"] or {}
    values = {name: client.secret(given.get(name) or _generated(params)) for name in fields_of(params)}
    client.held["values"] = values
    _write_claim(client, params, base)


def promote(client: Client, params: dict[str, Any], base: int) -> None:
    if client.held["base"] != base:
        _write_claim(client, params, base)
    client.patch_secret(params["engine_mount_point"], params["path"], client.held["values"], base)


def prove(client: Client, params: dict[str, Any], base: int) -> None:
    """The record is written after all proofs and before anything is destroyed: no crash loses an old value untried."""
    old = (client.read_secret(params["engine_mount_point"], params["path"], base) or {}).get("data") or {}
    if absent := sorted(set(params["fields"]) - set(old)):
        raise Unproven(f"the old {', '.join(absent)} cannot be read any more, so nobody can try it", effect="none")
    for proof in params["proof"]:
        before, after = client.secret(str(old[proof["field"]])), client.held["values"][proof["field"]]
        prove_rotation(client, proof, before, after)
    record = {"mark": params["mark"], "base": base, "fields": fields_of(params), "done": True}
    salt = secrets.token_hex(16)
    _write_entry(client, params, {**record, "salt": salt, "digest": _digest(client.held["values"], salt)})


def forget(client: Client, params: dict[str, Any], _base: int) -> None:
    copies = _copies(client, params, client.held["entry_version"])
    client.destroy_versions(params["engine_mount_point"], _pending_path(params), copies)


def destroy(client: Client, params: dict[str, Any], base: int) -> None:
    mount, path = params["engine_mount_point"], params["path"]
    versions = undestroyed(client.read_metadata(mount, path))
    client.destroy_versions(mount, path, [version for version in versions if version <= base])


def _write_claim(client: Client, params: dict[str, Any], base: int) -> None:
    _write_entry(client, params, {"mark": params["mark"], "base": base, "values": client.held["values"]})
    client.held["base"] = base


def _write_entry(client: Client, params: dict[str, Any], entry: dict[str, Any]) -> None:
    where = (params["engine_mount_point"], _pending_path(params))
    client.held["entry_version"] = client.write_secret(*where, entry, client.held["entry_version"])


def _copies(client: Client, params: dict[str, Any], record: int) -> list[int]:
    """Versions of the pending entry that still hold values after the record was written over them."""
    metadata = client.read_metadata(params["engine_mount_point"], _pending_path(params))
    return [version for version in undestroyed(metadata) if version < record]


def _replaced(
    client: Client, params: dict[str, Any], secret: dict[str, Any], current: dict[str, Any], entry: dict[str, Any]
) -> int:
    """The version that is replaced: the staged one, or a later one where only other fields were written since.

    Every version in between is looked at: one with our values says that the rotation was there and somebody took it back.
    """
    version = secret["version"]
    base: int = entry.get("base", version)
    if entry.get("done") or not 0 < version - base <= MOST_EDITS or contains(current, entry.get("values") or {}):
        return base
    for each in range(base, version):
        seen = client.read_secret(params["engine_mount_point"], params["path"], each) or {}
        fields = {name: value for name, value in (seen.get("data") or {}).items() if name in params["fields"]}
        if fields.keys() != current.keys() or not contains(fields, current):
            return base
    return version


def _state(entry: dict[str, Any], base: int, version: int, left: bool) -> str:
    if not entry:
        return "unrotated"
    if entry.get("done") and not left:
        return "retired"
    return "staged" if version == base else "current"


def _conflict(
    client: Client,
    params: dict[str, Any],
    secret: dict[str, Any],
    current: dict[str, Any],
    pending: dict[str, Any],
    base: int,
) -> str | None:
    """Who else was here: the secret holds neither the version that we replace nor our values."""
    entry, version = pending["data"], secret["version"]
    if entry is None:
        return f"its pending values were deleted at {_pending_path(params)}"
    if not entry:
        return None
    if entry.get("done"):
        when = "after the end of this rotation, with other values"
        ours = secret["data"] is None or version == entry["base"] + 1 or _is_record_of(entry, current)
    else:
        when = "in between"
        ours = version == base or contains(current, entry["values"])
    if ours:
        return None
    writer = client.writer(params["engine_mount_point"], params["path"], version)
    return f"version {version} was written by {writer} {when}"


def _is_record_of(entry: dict[str, Any], values: dict[str, Any]) -> bool:
    return same(entry.get("digest", ""), _digest(values, entry.get("salt", "")))


def _digest(values: dict[str, Any], salt: str) -> str:
    """Costs 16 MiB and some 50 ms, for us at most once a run."""
    return hashlib.scrypt(json.dumps(values, sort_keys=True).encode(), salt=salt.encode(), n=1 << 14, r=8, p=1).hex()


def _refuse_known_values(
    params: dict[str, Any], current: dict[str, Any], pending: dict[str, Any], given: dict[str, Any]
) -> None:
    for name, value in given.items():
        if pending and not same(pending.get(name, ""), value):
            raise Refused(f"new_values: another value for {name} is pending in this round")
        if not pending and name in current and same(current[name], value):
            raise Refused(f"new_values: {name} is the value in use, which is to be replaced")


def _capabilities(params: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    mount, path, pending = params["engine_mount_point"], params["path"], _pending_path(params)
    wanted: dict[str, tuple[str, ...]] = {
        f"{mount}/config": ("read",),
        f"{mount}/data/{path}": ("patch", "read"),
        f"{mount}/data/{pending}": ("create", "read", "update"),
        f"{mount}/metadata/{path}": ("read",),
        f"{mount}/metadata/{pending}": ("read",),
    }
    if params["state"] == "retired":
        wanted |= {f"{mount}/destroy/{path}": ("update",), f"{mount}/destroy/{pending}": ("update",)}
    return wanted


def _generated(params: dict[str, Any]) -> str:
    value = secrets.token_bytes(params["bytes"])
    if params["format"] == "hex":
        return value.hex()
    if params["format"] == "base64":
        return base64.b64encode(value).decode()
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def fields_of(params: dict[str, Any]) -> list[str]:
    return sorted(set(params["fields"]))


def name_of(params: dict[str, Any]) -> str:
    return f"{params['engine_mount_point']}/{params['path']}"


def _pending_path(params: dict[str, Any]) -> str:
    """The fields are part of it, so that two tasks can rotate different fields of one secret in the same round."""
    return f"_pending/{params['mark']}/{params['path']}/{','.join(fields_of(params))}"


STEPS = {"stage": stage, "promote": promote, "prove": prove, "forget": forget, "destroy": destroy}
