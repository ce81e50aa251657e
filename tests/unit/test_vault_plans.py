# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the Vault controls decide, without a server."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import pytest

from ansible_collections.firebreak.incident.plugins.module_utils._errors import Refused
from ansible_collections.firebreak.incident.plugins.module_utils._http import origin
from ansible_collections.firebreak.incident.plugins.module_utils._plan import at
from ansible_collections.firebreak.incident.plugins.module_utils._proof import signed_token
from ansible_collections.firebreak.incident.plugins.modules import secret_delivery, vault_kv_rotation
from tests.controls import secret_delivery as delivery_row
from tests.controls import vault_kv_rotation as rotation_row
from tests.rows import Case

TABLES: list[tuple[Any, list[Case]]] = [
    (vault_kv_rotation, rotation_row.PLANS),
    (secret_delivery, delivery_row.PLANS),
]
CASES = [
    pytest.param(module, case, id=f"{module.__name__.rpartition('.')[2]}: {case.name}")
    for module, cases in TABLES
    for case in cases
]


@pytest.mark.parametrize(("module", "case"), CASES)
def test_plan(module: Any, case: Case) -> None:
    if case.raises:
        with pytest.raises(Refused, match=case.raises):
            module.plan(case.params, case.facts)
        return
    plan = module.plan(case.params, case.facts)
    assert [(change.action, change.target) for change in plan.changes] == case.changes
    assert case.after is None or plan.after == case.after
    assert not module.plan(case.params, plan.after).changes
    for change in plan.changes:
        assert change.irreversible
        assert at(plan.before, change.path) != at(plan.after, change.path)


def test_what_leaves_nothing_readable_comes_last() -> None:
    plan = vault_kv_rotation.plan(rotation_row.options(), rotation_row.facts("unrotated"))
    assert [change.data["step"] for change in plan.changes] == ["stage", "promote", "prove", "forget", "destroy"]


def test_a_token_is_one_that_anybody_can_check() -> None:
    head, claims, signature = signed_token({"sub": "1"}, "key", 1000.5).split(".")
    wanted = hmac.new(b"key", f"{head}.{claims}".encode(), hashlib.sha256).digest()
    assert base64.urlsafe_b64decode(signature + "=") == wanted
    assert json.loads(base64.urlsafe_b64decode(claims + "==")) == {"iat": 1000, "exp": 1060, "sub": "1"}


def test_messages_show_no_more_of_an_address_than_its_origin() -> None:
    assert origin("https://user:word@app.example.com:8443/a?token=x") == "https://app.example.com:8443"
