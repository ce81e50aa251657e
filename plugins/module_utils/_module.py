# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""The ordinary front end: a control as an Ansible module, for ``async`` and for tools that need a module."""

from __future__ import annotations

import getpass
import os
import re
import secrets
from collections.abc import Callable
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ._control import Context
from ._engine import execute
from ._redact import Secrets, quiet, texts_of
from ._task import shown_options, spec_of, told

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


class Module(AnsibleModule):
    """Ansible's own, but for what it tells by itself."""

    def log(self, msg: Any, log_args: Any = None) -> None:
        """The record is the journal: no option of ours gets into this machine's log."""

    def fail_json(self, msg: str, **more: Any) -> None:
        """A failed task shows no options, for one may hold what belongs into another; nor does a message about them."""
        if "changed" not in more:  # Ansible's own words about what was given
            msg = without_values(msg)
            self.no_log_values |= texts_of(self.params)
        super().fail_json(msg, **{**more, "invocation": {"module_args": {}}})


def without_values(msg: str) -> str:
    """What Ansible says of a wrong option, but for the end, which is the value in whatever spelling."""
    return re.sub(r"(unable to convert to \w+).*|, got: .*", r"\1", msg, flags=re.DOTALL)


def quietly(control: Any, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What no control may do: print, log or end the process. Whatever it raises, nobody sees more than its type."""
    try:
        with quiet():
            return work()
    except (Exception, SystemExit) as failure:
        return {"changed": False, "failed": True, "msg": f"{control.name}: {told(failure)}"}


def run_module(control: Any) -> None:
    """A module's ``main``."""
    module = Module(**spec_of(control))
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
    result = quietly(control, lambda: execute(control, params, context))
    if result.get("failed"):
        msg = result.pop("msg")
        module.fail_json(msg=msg, **result)
    module.exit_json(**result, invocation={"module_args": context.secrets.censor(shown_options(control, params))})


def public_values(options: dict[str, Any], params: dict[str, Any]) -> list[str]:
    """Values of options that are no secret; a secret that equals one of them hides nothing."""
    return [
        str(params[name]) for name in options if not options[name].get("no_log") and isinstance(params.get(name), str)
    ]
