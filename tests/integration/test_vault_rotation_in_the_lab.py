# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Rotation and delivery in the lab: its Vault, its application and the edge before it."""

from __future__ import annotations

from typing import Any

from ansible_collections.firebreak.incident.plugins.module_utils import _task
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context
from ansible_collections.firebreak.incident.plugins.modules import secret_delivery, vault_kv_rotation
from tests.contract.rotation_walk import LocalHost, carry_out, predict
from tests.controls import secret_delivery as delivery_row
from tests.controls import vault_kv_rotation as rotation_row


def complete(control: Any, params: dict[str, Any], incident: str) -> dict[str, Any]:
    """The options as a front end hands them over."""
    options = _task.spec_of(control)["argument_spec"]
    given = {name: option.get("default") for name, option in options.items()}
    return {**given, **params, "incident_id": incident, "mark": f"{incident}/1"}


def test_check_then_real_then_again(lab: Any) -> None:
    rows: list[tuple[Any, Any]] = [
        (vault_kv_rotation.CONTROL, rotation_row.Lab()),
        (secret_delivery.CONTROL, delivery_row.Lab()),
    ]
    for control, row in rows:
        row.prepare(lab)
        params = complete(control, row.params(lab), "INC-2026-1121-701")
        before = row.observe(lab)
        predicted = predict(control, params, Context(host=LocalHost()))
        assert row.observe(lab) == before
        host = LocalHost()
        plan = carry_out(control, params, Context(host=host))
        assert plan == predicted and plan.changes
        seen = row.observe(lab)
        row.contained(lab, before, seen)
        assert not carry_out(control, params, Context(host=host)).changes
        assert row.observe(lab) == seen
        assert not any(value in shown for value in row.secrets(lab) for shown in [*host.shown, repr(plan)])


def test_rotate_deliver_retire(lab: Any) -> None:
    """The application itself refuses what was stolen, at the edge and past it."""
    incident, host = "INC-2026-1121-702", LocalHost()
    rotation = rotation_row.Lab().params(lab)
    carry_out(vault_kv_rotation.CONTROL, complete(vault_kv_rotation.CONTROL, rotation, incident), Context())
    delivery = complete(secret_delivery.CONTROL, delivery_row.Lab().params(lab), incident)
    carry_out(secret_delivery.CONTROL, delivery, Context(host=host))
    user = {"sub": str(lab.users[0]["id"])}
    doors = (lab.app_url, lab.app_direct_url)
    proof = [{"field": "JWT_SECRET", "kind": "jwt", "url": f"{door}/api/me", "claims": user} for door in doors]
    proof += [{"field": "WEBHOOK_SECRET", "kind": "webhook", "url": f"{door}/hooks/payment"} for door in doors]
    retired = {**rotation, "state": "retired", "proof": proof}
    plan = carry_out(vault_kv_rotation.CONTROL, complete(vault_kv_rotation.CONTROL, retired, incident), Context())
    assert plan.after["state"] == "retired"
    versions = rotation_row.ask(lab, "GET", "secret/metadata/app/backend")["data"]["versions"]
    assert [entry["destroyed"] for entry in versions.values()] == [True] * (len(versions) - 1) + [False]
