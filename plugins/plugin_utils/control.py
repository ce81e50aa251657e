# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""The fast front end: a control inside Ansible's own worker, in a tenth of a module's time.

Every control has an action file of its own name that binds it here. What is imported here is imported once, in the parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import secrets
import signal
import sys
from typing import Any, ClassVar

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.module_utils.common.arg_spec import ModuleArgumentSpecValidator
from ansible.module_utils.common.parameters import remove_values
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from ansible_collections.firebreak.incident.plugins.module_utils import _case
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context
from ansible_collections.firebreak.incident.plugins.module_utils._engine import execute, spec_of
from ansible_collections.firebreak.incident.plugins.module_utils._errors import FirebreakError
from ansible_collections.firebreak.incident.plugins.module_utils._module import IN_ITS_ACTION_ONLY, actor, public_values
from ansible_collections.firebreak.incident.plugins.module_utils._redact import Secrets

RUN_ID = secrets.token_hex(6)
PARENT = os.getpid()
PR_SET_PDEATHSIG = 1
CONNECTION_ATTEMPTS = 3


def preload(control: Any) -> None:
    """Import the SDKs in the parent, so that each worker inherits them. What is missing is told by the task that needs it."""
    gc.disable()  # what is imported stays: looking through it again and again for rubbish takes a tenth of the time
    for service in (control.service, _case):
        with contextlib.suppress(Exception):
            service.preload()
    gc.enable()
    gc.freeze()


class HostConnection:
    """A system under protection, over Ansible's own connection, ``become`` included."""

    def __init__(self, action: ActionBase) -> None:
        self._action = action
        self.remote = action._connection.transport != "local"

    def run(self, command: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        """Run a shell command there. What is secret goes as ``stdin``, which is on no disk and in no process list."""
        try:
            answer = self._action._low_level_execute_command(command, in_data=stdin, sudoable=True)
        except AnsibleConnectionFailure:
            raise FirebreakError(
                "the host cannot be reached over its connection; check ansible_host and the connection"
            ) from None
        except AnsibleError as failure:
            raise FirebreakError(f"the host's connection failed ({type(failure).__name__})") from None
        return int(answer["rc"]), answer["stdout"].encode(), answer["stderr"].encode()


class ControlAction(ActionBase):
    """Runs the engine in this worker, whatever connection and ``become`` the host has: those are for the host's own commands."""

    _supports_check_mode = True
    _supports_async = True
    _requires_connection = False
    control: ClassVar[Any]

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        task_vars = task_vars or {}
        result = super().run(tmp, task_vars)
        if self._task.async_val:
            if getattr(self.control, "needs_host", False):
                return {**result, "failed": True, "msg": IN_ITS_ACTION_ONLY.format(self.control.name)}
            if self._connection.transport != "local":
                msg = "async: add connection: local to the task; nothing of a control is copied to a system under protection"
                return {**result, "failed": True, "msg": msg}
            options = {**self._task.args, "host": self._task.args.get("host") or task_vars.get("inventory_hostname")}
            task_vars = {**task_vars, "ansible_python_interpreter": sys.executable}
            result.update(self._execute_module(module_args=options, task_vars=task_vars, wrap_async=True))
            return result
        _die_with_parent()
        result.update(self._in_worker(task_vars))
        for line in result.pop("screen", ()):
            Display().display(line)
        return result

    def _in_worker(self, task_vars: dict[str, Any]) -> dict[str, Any]:
        control = self.control
        spec = spec_of(control)
        options = spec.pop("argument_spec")
        spec.pop("supports_check_mode")
        given = plain(dict(self._task.args))
        checked = ModuleArgumentSpecValidator(options, **spec).validate(given)
        params = {**given, **checked.validated_parameters}
        hidden = set(checked._no_log_values) | _texts(
            [given.get(name) for name in options if options[name].get("no_log")]
        )
        if checked.error_messages:
            msg = checked.errors.msg
            if checked.unsupported_parameters:
                msg = f"Unsupported parameters for ({self._task.action}) module: {msg}"
            return {"failed": True, "msg": remove_values(msg, hidden)}
        params["host"] = params.get("host") or task_vars.get("inventory_hostname")
        environment: dict[str, str] = {}
        self._compute_environment_string(environment)
        context = Context(
            check_mode=bool(self._task.check_mode),
            env={**os.environ, **environment},
            secrets=Secrets(public=public_values(options, params)),
            actor=actor(),
            run_id=os.environ.get("FIREBREAK_RUN") or RUN_ID,
            host=HostConnection(self),
            tell=Display().display,
        )
        for value in hidden:
            context.secret(value)
        result = execute(control, params, context)
        result["invocation"] = {"module_args": _masked(options, params, hidden)}
        return result


def plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a module would see: Ansible's tags are taken off, and a date is its text."""
    return json.loads(json.dumps(arguments, default=str))


def _masked(options: dict[str, Any], params: dict[str, Any], hidden: set[str]) -> dict[str, Any]:
    shown = {
        name: "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER"
        if options.get(name, {}).get("no_log") and value is not None
        else value
        for name, value in params.items()
    }
    return remove_values(shown, hidden)


def _texts(values: Any) -> set[str]:
    """All texts inside a value of whatever, perhaps wrong, type."""
    if isinstance(values, str):
        return {values} if values else set()
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list):
        return set().union(*(_texts(value) for value in values))
    return set()


def _die_with_parent() -> None:
    """A killed ansible-playbook takes its workers along; else they would go on writing."""
    if os.getpid() == PARENT:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != PARENT:
        os.kill(os.getpid(), signal.SIGKILL)
