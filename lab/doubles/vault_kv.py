# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Vault's versioned key-value engine."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from lab.doubles.vault_wire import Answer, Call, Clock, Refused, duration, go_duration, rfc3339

MAX_VERSIONS = 10
INVALID_PATH = (
    "Invalid path for a versioned K/V secrets engine. See the API docs for the appropriate API endpoints to use. "
    "If using the Vault CLI, use 'vault kv {}' for this operation."
)
GO_NAMES = {str: "string", bool: "bool", int: "string", float: "string"}
CUSTOM = "custom_metadata validation failed"


@dataclass
class Version:
    created: int  # nanoseconds, as all times here
    created_by: dict[str, str]
    data: str | None  # JSON; None once destroyed
    deleted: int | None = None  # may lie in the future
    deleted_by: dict[str, str] | None = None
    destroyed: bool = False

    def gone(self, now: int) -> bool:
        return self.destroyed or (self.deleted is not None and self.deleted < now)


@dataclass
class Key:
    created: int
    updated: int
    versions: dict[int, Version] = field(default_factory=dict)
    current: int = 0
    oldest: int = 0
    settings: dict[str, Any] = field(
        default_factory=lambda: {"max_versions": 0, "cas_required": False, "delete_version_after": 0}
    )
    custom: dict[str, str] | None = None
    updated_by: dict[str, str] | None = None


# None is an empty answer: 204, or for a read 404.
Handler = Callable[[Call, str], Answer | None]


class KeyValue:
    """One mount. ``answer`` is called under the server's lock."""

    type = "kv"

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.keys: dict[str, Key] = {}
        self.config: dict[str, Any] = {"max_versions": 0, "cas_required": False, "delete_version_after": 0}

    def exists(self, path: str) -> bool | None:
        """Whether a write creates or updates; None where the engine does not tell them apart."""
        area, _unused, key = path.partition("/")
        return key in self.keys if area in ("data", "metadata") else None

    def answer(self, call: Call) -> Answer | None:
        area, _unused, name = call.path.partition("/")
        handlers = self._handlers(area, name)
        if not handlers:
            return self._invalid(call)
        operation = "update" if call.operation == "create" else call.operation
        if operation not in handlers:
            raise Refused(405, "unsupported operation", wrapped=True)
        return handlers[operation](call, name)

    def _handlers(self, area: str, name: str) -> dict[str, Handler]:
        if area == "config" and not name:
            return {"read": self.read_config, "update": self.write_config}
        if area == "metadata" and (not name or name.endswith("/")):
            return {"list": self.list_keys}
        if not name or name.endswith("/"):
            return {}
        areas: dict[str, dict[str, Handler]] = {
            "data": {
                "read": self.read_data,
                "update": self.write_data,
                "patch": self.patch_data,
                "delete": self.delete_latest,
            },
            "metadata": {
                "read": self.read_metadata,
                "update": self.write_metadata,
                "patch": self.patch_metadata,
                "delete": self.delete_key,
                "list": self.list_keys,
            },
            "subkeys": {"read": self.read_subkeys},
            "delete": {"update": self.delete_versions},
            "undelete": {"update": self.undelete_versions},
            "destroy": {"update": self.destroy_versions},
        }
        return areas.get(area, {})

    @staticmethod
    def _invalid(call: Call) -> Answer:
        if call.path.rstrip("/") in ("metadata", "data", "delete", "undelete", "destroy"):
            text = "Non-listing operations on the root of a K/V v2 mount are not supported."
        else:
            verb = {"read": "get", "list": "list", "delete": "delete"}.get(call.operation, "put")
            text = INVALID_PATH.format(verb)
        return Answer(status=404, warnings=[text])

    # --- the mount's settings

    def read_config(self, call: Call, name: str) -> Answer:
        return Answer(self.config | {"delete_version_after": go_duration(self.config["delete_version_after"])})

    def write_config(self, call: Call, name: str) -> None:
        self.config |= _settings(call.data)

    # --- a key's data

    def read_data(self, call: Call, name: str) -> Answer | None:
        return self._read(call, name, "data", lambda data: data)

    def read_subkeys(self, call: Call, name: str) -> Answer | None:
        depth = _integer(call.data, "depth")
        return self._read(call, name, "subkeys", lambda data: _without_values(data, depth))

    def _read(self, call: Call, name: str, label: str, view: Any) -> Answer | None:
        key = self.keys.get(name)
        wanted = _integer(call.data, "version")
        number = wanted if wanted > 0 or not key else key.current
        version = key.versions.get(number) if key else None
        if not key or not version:
            return None
        body: dict[str, Any] = {label: None, "metadata": self._describe(key, number)}
        if version.gone(self.clock.now()):
            return Answer(body, status=404)
        if version.data is None:
            raise Refused(500, "could not find version data", wrapped=True)
        body[label] = view(json.loads(version.data, parse_int=_number, parse_float=_number))
        return Answer(body)

    def write_data(self, call: Call, name: str) -> Answer:
        if "data" not in call.data:
            raise Refused(400, "no data provided")
        data = _map(call.data, "data")
        key = self.keys.get(name) or Key(created=0, updated=0)
        self._check_and_set(call, key)
        self.keys[name] = key
        return self._publish(call, key, data)

    def patch_data(self, call: Call, name: str) -> Answer:
        if "data" not in call.data:
            raise Refused(400, "no data provided")
        patch = _map(call.data, "data") or {}
        key = self.keys.get(name)
        if not key:
            return Answer(status=404, empty=True)
        self._check_and_set(call, key)
        version = key.versions.get(key.current)
        if not version:
            return Answer(status=404, empty=True)
        if version.gone(self.clock.now()):
            return Answer(self._describe(key, key.current), status=404)
        data = json.loads(str(version.data))
        if data is None:
            raise Refused(500, "resource does not exist", wrapped=True)
        return self._publish(call, key, merge_patch(data, patch))

    def _check_and_set(self, call: Call, key: Key) -> None:
        options = _map(call.data, "options") or {}
        if "cas" in options:
            if _weak_integer(options["cas"]) != key.current:
                raise Refused(400, "check-and-set parameter did not match the current version")
        elif self.config["cas_required"] or key.settings["cas_required"]:
            raise Refused(400, "check-and-set parameter required for this call")

    def _publish(self, call: Call, key: Key, data: Any) -> Answer:
        now = self.clock.now()
        key.updated_by = call.attribution()
        key.current += 1
        key.updated = now
        key.created = key.created or now
        key.versions[key.current] = Version(now, key.updated_by, json.dumps(data), self._expiry(key, now))
        keep = max(key.settings["max_versions"], self.config["max_versions"]) or MAX_VERSIONS
        if key.current - key.oldest >= keep:
            for number in range(key.oldest, key.current - keep + 1):
                key.versions.pop(number, None)
            key.oldest = key.current - keep + 1
        return Answer(self._describe(key, key.current))

    def _expiry(self, key: Key, now: int) -> int | None:
        """When a version that begins now deletes itself: after the shorter of the two settings, 0 being none."""
        if self.config["delete_version_after"] < 0:
            return None
        set_ones = [s for s in (self.config["delete_version_after"], key.settings["delete_version_after"]) if s]
        return now + min(set_ones) * 10**9 if set_ones else None

    @staticmethod
    def _describe(key: Key, number: int) -> dict[str, Any]:
        version = key.versions[number]
        return {
            "created_time": rfc3339(version.created),
            "custom_metadata": key.custom,
            "deletion_time": rfc3339(version.deleted),
            "destroyed": version.destroyed,
            "version": number,
        }

    # --- versions deleted, brought back, destroyed

    def delete_latest(self, call: Call, name: str) -> None:
        key = self.keys.get(name)
        version = key.versions.get(key.current) if key else None
        if key and version and not version.gone(self.clock.now()):
            key.updated_by = call.attribution()
            version.deleted, version.deleted_by = self.clock.now(), key.updated_by

    def delete_versions(self, call: Call, name: str) -> None:
        key, versions = self._named_versions(call, name)
        for version in versions:
            if not version.gone(self.clock.now()):
                version.deleted, version.deleted_by = self.clock.now(), call.attribution()
        if key:
            key.updated_by = call.attribution()

    def undelete_versions(self, call: Call, name: str) -> None:
        key, versions = self._named_versions(call, name)
        for version in versions:
            if key and not version.destroyed:
                version.deleted, version.deleted_by = self._expiry(key, self.clock.now()), None
        if key:
            key.updated_by = call.attribution() | {"operation": "undelete"}

    def destroy_versions(self, call: Call, name: str) -> None:
        for version in self._named_versions(call, name, "no version number provided")[1]:
            version.destroyed, version.data = True, None

    def _named_versions(
        self, call: Call, name: str, none: str = "No version number provided"
    ) -> tuple[Key | None, list[Version]]:
        numbers = _integers(call.data.get("versions"))
        if not numbers:
            raise Refused(400, none)
        key = self.keys.get(name)
        return key, [key.versions[number] for number in numbers if number in key.versions] if key else []

    # --- a key's metadata

    def read_metadata(self, call: Call, name: str) -> Answer | None:
        key = self.keys.get(name)
        if not key:
            return None
        return Answer(
            {
                "cas_required": key.settings["cas_required"],
                "created_time": rfc3339(key.created),
                "current_version": key.current,
                "custom_metadata": key.custom,
                "delete_version_after": go_duration(key.settings["delete_version_after"]),
                "last_updated_by": key.updated_by,
                "max_versions": key.settings["max_versions"],
                "oldest_version": key.oldest,
                "updated_time": rfc3339(key.updated),
                "versions": {
                    str(number): {
                        "created_by": version.created_by,
                        "created_time": rfc3339(version.created),
                        "deleted_by": version.deleted_by,
                        "deletion_time": rfc3339(version.deleted),
                        "destroyed": version.destroyed,
                    }
                    for number, version in key.versions.items()
                },
            }
        )

    def write_metadata(self, call: Call, name: str) -> Answer | None:
        settings = _settings(call.data)
        given = "custom_metadata" in call.data
        custom = _custom(_map(call.data, "custom_metadata") or {})
        if not settings and not given:
            return None
        now = self.clock.now()
        key = self.keys.setdefault(name, Key(created=now, updated=now))
        key.settings |= settings
        if given:
            key.custom = custom or None
        return self._mandated(settings)

    def patch_metadata(self, call: Call, name: str) -> Answer | None:
        patch = _map(call.data, "custom_metadata") or {}
        _custom({field: value for field, value in patch.items() if value is not None})
        key = self.keys.get(name)
        if not key:
            return Answer(status=404, empty=True)
        settings = _settings(call.data)
        key.settings |= settings
        if "custom_metadata" in call.data:
            key.custom = _custom(merge_patch(key.custom or {}, patch)) or None
        return self._mandated(settings)

    def _mandated(self, settings: dict[str, Any]) -> Answer | None:
        if self.config["cas_required"] and settings.get("cas_required") is False:
            text = '"cas_required" set to false, but is mandated by backend config. This value will be ignored.'
            return Answer(warnings=[text])
        return None

    def delete_key(self, call: Call, name: str) -> None:
        self.keys.pop(name, None)

    def list_keys(self, call: Call, name: str) -> Answer:
        prefix = name if not name or name.endswith("/") else f"{name}/"
        below = [key.removeprefix(prefix) for key in self.keys if key.startswith(prefix)]
        return Answer({"keys": sorted({key.partition("/")[0] + ("/" if "/" in key else "") for key in below})})


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    merged = copy.copy(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


def _without_values(data: Any, depth: int, level: int = 1) -> Any:
    if data is None:
        return None
    deeper = not depth or level < depth
    return {
        name: _without_values(value, depth, level + 1) if deeper and isinstance(value, dict) and value else None
        for name, value in data.items()
    }


def _number(text: str) -> int | float:
    """A number as the server gives it back: it passes through a 64-bit float, whose shortest digits are shown."""
    value = float(text)
    return int(Decimal(repr(value))) if value.is_integer() and abs(value) < 1e21 else value


def _invalid(name: str, why: str) -> Refused:
    return Refused(400, f'Field validation failed: error converting input for field "{name}": {why}')


def _map(data: dict[str, Any], name: str) -> dict[str, Any] | None:
    value = data.get(name)
    if value is not None and not isinstance(value, dict):
        kind = GO_NAMES.get(type(value), "slice")
        raise Refused(400, f"error converting input for field \"{name}\": '' expected a map, got '{kind}'")
    return value


def _weak_integer(value: Any) -> int:
    """The server reads "3", true and null as numbers, and 3.0 as none."""
    if value is None:
        return 0
    try:
        if isinstance(value, int):
            return int(value)
        return int(value or "0", 0) if isinstance(value, str) else int("none")
    except ValueError:
        raise Refused(400, "error parsing check-and-set parameter") from None


def _integer(data: dict[str, Any], name: str) -> int:
    value = data.get(name) or 0
    try:
        return int(value)
    except (TypeError, ValueError):
        raise _invalid(name, "expected an integer") from None


def _integers(value: Any) -> list[int]:
    try:
        if isinstance(value, str):
            return [int(part) for part in value.split(",") if part.strip()]
        return [int(part) for part in value or []] if not isinstance(value, int) else [value]
    except (TypeError, ValueError):
        raise _invalid("versions", "expected integers") from None


def _settings(data: dict[str, Any]) -> dict[str, Any]:
    """The settings that a request names; what it leaves out keeps its value."""
    settings: dict[str, Any] = {}
    if "max_versions" in data:
        settings["max_versions"] = _integer(data, "max_versions")
    if "cas_required" in data:
        settings["cas_required"] = str(data["cas_required"]).lower() in ("1", "t", "true")
    if "delete_version_after" in data:
        try:
            settings["delete_version_after"] = duration(data["delete_version_after"])
        except ValueError:
            raise _invalid("delete_version_after", "expected a duration") from None
    return settings


def _custom(given: dict[str, Any]) -> dict[str, str]:
    """Custom metadata as the server stores it: short printable strings, and few of them."""
    if len(given) > 64:
        raise _listed([f"{CUSTOM}: payload must contain at most 64 keys, provided {len(given)}"])
    errors, custom = [], {}
    for key, raw in given.items():
        if isinstance(raw, (dict, list)):
            raise Refused(400, f"{CUSTOM}: expected type 'string'")
        value = {None: "", True: "1", False: "0"}.get(raw) if raw is None or raw is True or raw is False else str(raw)
        custom[key] = str(value)
        if not 0 < len(key.encode()) <= 128:
            errors.append(f'{CUSTOM}: length of key "{key}" is {len(key.encode())} but must be 0 < len(key) <= 128')
        size = len(custom[key].encode())
        if not 0 < size <= 512:
            errors.append(f'{CUSTOM}: length of value for key "{key}" is {size} but must be 0 < len(value) <= 512')
        if not key.isprintable():
            errors.append(f'{CUSTOM}: key "{key}" ({key}) contains unprintable characters')
        if not custom[key].isprintable():
            errors.append(f'{CUSTOM}: value for key "{key}" contains unprintable characters')
    if errors:
        raise _listed(errors)
    return custom


def _listed(errors: list[str]) -> Refused:
    count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
    return Refused(400, f"{count} occurred:\n\t* " + "\n\t* ".join(errors) + "\n\n")
