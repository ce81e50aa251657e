# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""The ordinary front end: a control as an Ansible module, for ``async`` and for tools that need a module."""

from __future__ import annotations

import getpass
import os
import secrets
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ._control import Context
from ._engine import execute, spec_of
from ._redact import Secrets

IN_ITS_ACTION_ONLY = "{} reaches the host over Ansible's connection: it runs in its action only, not with async"


def actor() -> str:
    """Who runs this: the person that AWX names, else the user of this process."""
    for name in ("AWX_USER_NAME", "TOWER_USER_NAME", "FIREBREAK_ACTOR"):
        if os.environ.get(name):
            return os.environ[name]
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def run_module(control: Any) -> None:
    """A module's ``main``."""
    module = AnsibleModule(**spec_of(control))
    params: dict[str, Any] = dict(module.params)
    if getattr(control, "needs_host", False):
        module.fail_json(msg=IN_ITS_ACTION_ONLY.format(control.name))
    context = Context(
        check_mode=module.check_mode,
        env=dict(os.environ),
        secrets=Secrets(public=public_values(spec_of(control)["argument_spec"], params)),
        actor=actor(),
        run_id=os.environ.get("FIREBREAK_RUN") or secrets.token_hex(6),
    )
    for value in module.no_log_values:
        context.secret(value)
    result = execute(control, params, context)
    if result.get("failed"):
        msg = result.pop("msg")
        module.fail_json(msg=msg, **result)
    module.exit_json(**result)


def public_values(options: dict[str, Any], params: dict[str, Any]) -> list[str]:
    """Values of options that are no secret; a secret that equals one of them hides nothing."""
    return [
        str(params[name]) for name in options if not options[name].get("no_log") and isinstance(params.get(name), str)
    ]
