# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The calls below ``sys/``: health, mounts, policies, capabilities, audit devices."""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lab.doubles.vault_audit import Device
from lab.doubles.vault_wire import SECOND, Answer, Call, Refused

if TYPE_CHECKING:
    from lab.doubles.vault_core import Core, Mount

VERSION = "1.21.2"
CLUSTER_NAME = "vault-cluster-double"


class System:
    """Mounted at ``sys/``."""

    type = "system"

    def __init__(self, core: Core) -> None:
        self.core = core
        self.routes = (
            (r"mounts$", {"read": self.mounts}),
            (
                r"mounts/(?!.*/tune$)(?P<name>.+)$",
                {"update": self.enable_mount, "delete": self.disable_mount, "read": self.mount},
            ),
            (r"auth$", {"read": self.auth}),
            (r"policy/?$", {"read": self.old_policies, "list": self.old_policies}),
            (r"policies/acl/?$", {"list": self.policies, "read": self.policies}),
            (
                r"(?P<kind>policy|policies/acl)/(?P<name>[^/]+)$",
                {"read": self.policy, "update": self.write_policy, "delete": self.delete_policy},
            ),
            (r"capabilities$", {"update": self.capabilities}),
            (r"capabilities-self$", {"update": self.capabilities}),
            (r"capabilities-accessor$", {"update": self.capabilities}),
            (r"audit$", {"read": self.audit}),
            (r"audit/(?P<name>.+)$", {"update": self.enable_audit, "delete": self.disable_audit}),
            (r"audit-hash/(?P<name>.+)$", {"update": self.audit_hash}),
        )

    def exists(self, path: str) -> bool | None:
        return None

    def answer(self, call: Call) -> Answer | None:
        for pattern, handlers in self.routes:
            found = re.match(pattern, call.path)
            if not found:
                continue
            if call.operation not in handlers:
                raise Refused(405, "unsupported operation", wrapped=True)
            handler: Callable[..., Answer | None] = handlers[call.operation]
            return handler(call, **found.groupdict())
        raise Refused(404, "unsupported path", wrapped=True)

    # --- without a token

    @staticmethod
    def open(core: Core, path: str, query: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        base = {
            "initialized": True,
            "sealed": False,
            "version": VERSION,
            "cluster_name": CLUSTER_NAME,
            "cluster_id": core.cluster,
        }
        if path == "sys/init":
            return 200, {"initialized": True}
        if path == "sys/leader":
            own = {"ha_enabled": False, "is_self": False, "leader_address": "", "leader_cluster_address": ""}
            perf = {"performance_standby": False, "performance_standby_last_remote_wal": 0}
            return 200, {**own, **perf, "active_time": "0001-01-01T00:00:00Z"}
        if path == "sys/seal-status":
            return 200, {
                **base,
                "type": "shamir",
                "t": 1,
                "n": 1,
                "progress": 0,
                "nonce": "",
                "build_date": "2026-01-07T00:00:00Z",
                "migration": False,
                "recovery_seal": False,
                "storage_type": "inmem",
            }
        code = str(query.get("activecode", "200"))
        if not code.isdigit():
            return 400, {"errors": ["bad activecode"]}
        return int(code), {
            **base,
            "standby": False,
            "performance_standby": False,
            "replication_performance_mode": "disabled",
            "replication_dr_mode": "disabled",
            "server_time_utc": core.clock.now() // SECOND,
            "enterprise": False,
            "echo_duration_ms": 0,
            "clock_skew_ms": 0,
            "replication_primary_canary_age_ms": 0,
        }

    # --- mounts

    def mounts(self, call: Call) -> Answer:
        shown = {path: _mount(mount) for path, mount in self.core.mounts.items() if not path.startswith("auth/")}
        return Answer(shown)

    def auth(self, call: Call) -> Answer:
        shown = _mount(self.core.mounts["auth/token/"])
        shown["config"]["token_type"] = "default-service"
        del shown["deprecation_status"]
        return Answer({"token/": shown})

    def mount(self, call: Call, name: str) -> Answer:
        mount = self.core.mounts.get(_slashed(name))
        if not mount:
            raise Refused(400, f"No secret engine mount at {_slashed(name)}")
        return Answer(_mount(mount))

    def enable_mount(self, call: Call, name: str) -> None:
        options = call.data.get("options")
        description = str(call.data.get("description") or "")
        self.core.enable(_slashed(name), str(call.data.get("type") or ""), options, description)

    def disable_mount(self, call: Call, name: str) -> None:
        if _slashed(name) in ("sys/", "auth/token/"):
            raise Refused(400, f'cannot unmount "{_slashed(name)}"')
        self.core.mounts.pop(_slashed(name), None)

    # --- policies and capabilities

    def policies(self, call: Call) -> Answer:
        return Answer({"keys": sorted([*self.core.policies, "root"])})

    def old_policies(self, call: Call) -> Answer:
        names = sorted([*self.core.policies, "root"])
        return Answer({"keys": names, "policies": names})

    def policy(self, call: Call, kind: str, name: str) -> Answer | None:
        name = name.lower()
        if name != "root" and name not in self.core.policies:
            return None
        text = "" if name == "root" else self.core.policies[name][0]
        return Answer({"name": name, "rules" if kind == "policy" else "policy": text})

    def write_policy(self, call: Call, kind: str, name: str) -> Answer | None:
        text = str(call.data.get("policy") or "")
        if not text:
            raise Refused(400, "'policy' parameter not supplied or empty")
        if name.lower() in ("root", "response-wrapping", "control-group"):
            raise Refused(400, f'cannot update "{name.lower()}" policy')
        with contextlib.suppress(binascii.Error, UnicodeDecodeError):  # plain text, as nearly always
            text = base64.b64decode(text, validate=True).decode()
        self.core.set_policy(name.lower(), text)
        return Answer(warnings=[f"policy name was converted to {name.lower()}"]) if name != name.lower() else None

    def delete_policy(self, call: Call, kind: str, name: str) -> None:
        if name.lower() == "default":
            raise Refused(400, "cannot delete default policy")
        if name.lower() == "root":
            raise Refused(400, 'cannot delete "root" policy')
        self.core.policies.pop(name.lower(), None)

    def capabilities(self, call: Call) -> Answer:
        token = call.token
        if call.path == "capabilities-accessor":
            found = self.core.tokens.by_accessor(str(call.data.get("accessor") or ""))
            if not found:
                raise Refused(400, "invalid accessor", wrapped=True)
            token = found
        elif call.path == "capabilities":
            found = self.core.tokens.find(str(call.data.get("token") or ""))
            if not found:
                raise Refused(400, "invalid token", wrapped=True)
            token = found
        given = call.data.get("paths") or call.data.get("path") or []
        paths = given.split(",") if isinstance(given, str) else given
        if not paths:
            raise Refused(400, "paths must be supplied")
        acl = self.core.acl(token)
        data = {str(path): acl.capabilities(str(path)) for path in paths}
        return Answer(data | {"capabilities": data[str(paths[0])]} if len(paths) == 1 else data)

    # --- audit devices

    def audit(self, call: Call) -> Answer:
        return Answer(
            {
                path: {
                    "description": device.description,
                    "local": False,
                    "options": device.options,
                    "path": path,
                    "type": device.type,
                }
                for path, device in self.core.audit.items()
            }
        )

    def enable_audit(self, call: Call, name: str) -> None:
        path, kind = _slashed(name), call.data.get("type")
        options = {str(key): str(value) for key, value in (call.data.get("options") or {}).items()}
        if path in self.core.audit:
            raise Refused(400, "path already in use: invalid configuration")
        if kind != "file":
            raise Refused(400, f'unknown backend type: "{kind}": backend type not found')
        if not options.get("file_path"):
            raise Refused(400, 'unable to create new audit backend: "file_path" is required: invalid configuration')
        device = Device(kind, options, str(call.data.get("description") or ""), secrets.token_bytes(32))
        try:
            device.write({"time": "", "type": "request", "request": {"id": call.id, "path": call.full_path}})
        except OSError:
            raise Refused(400, "sanity check failed; unable to open audit file for writing") from None
        self.core.audit[path] = device

    def disable_audit(self, call: Call, name: str) -> None:
        self.core.audit.pop(_slashed(name), None)

    def audit_hash(self, call: Call, name: str) -> Answer:
        value = call.data.get("input")
        if not value:
            raise Refused(400, "the 'input' parameter is empty")
        device = self.core.audit.get(_slashed(name))
        if not device:
            raise Refused(400, f'unknown audit backend "{_slashed(name)}"')
        return Answer({"hash": device.hash(str(value))})


def _slashed(name: str) -> str:
    return name.rstrip("/") + "/"


def _mount(mount: Mount) -> dict[str, Any]:
    return {
        "accessor": mount.accessor,
        "config": {"default_lease_ttl": 0, "force_no_cache": False, "max_lease_ttl": 0},
        "deprecation_status": "supported",
        "description": mount.description,
        "external_entropy_access": False,
        "local": False,
        "options": mount.options,
        "plugin_version": "",
        "running_plugin_version": "",
        "running_sha256": "",
        "seal_wrap": False,
        "type": mount.type,
        "uuid": mount.uuid,
    }
