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

from ansible import constants
from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.module_utils.common.arg_spec import ModuleArgumentSpecValidator
from ansible.module_utils.common.parameters import remove_values
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from ansible_collections.firebreak.incident.plugins.module_utils import _case
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context
from ansible_collections.firebreak.incident.plugins.module_utils._engine import execute
from ansible_collections.firebreak.incident.plugins.module_utils._errors import FirebreakError
from ansible_collections.firebreak.incident.plugins.module_utils._module import (
    IN_ITS_ACTION_ONLY,
    actor,
    public_values,
    quietly,
    without_values,
)
from ansible_collections.firebreak.incident.plugins.module_utils._redact import Secrets, texts_of
from ansible_collections.firebreak.incident.plugins.module_utils._task import shown_options, spec_of

RUN_ID = secrets.token_hex(6)
PARENT = os.getpid()
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
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
    _given: dict[str, Any] | None = None
    _environment: dict[str, str]

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        task_vars = task_vars or {}
        result = super().run(tmp, task_vars)
        self._take_over()
        if self._task.async_val:
            result.update(self._in_background(task_vars))
        else:
            _keep_to_ourselves()
            result.update(quietly(self.control, lambda: self._in_worker(task_vars)))
        if result.get("failed") or self._task.async_val:  # one option may hold what belongs into another
            self._task.args = {}
        for line in result.pop("screen", ()):
            Display().display(line)
        return result

    def _take_over(self) -> None:
        """Ansible hands a task's options and environment to every callback, and to ``rescue``: what is secret is taken out there.

        A task that is tried again comes by again, and has them already.
        """
        if self._given is not None:
            return
        self._given = plain(dict(self._task.args))
        environment: dict[str, Any] = {}
        self._compute_environment_string(environment)
        self._environment = {name: str(value) for name, value in environment.items()}
        options = spec_of(self.control)["argument_spec"]
        known = Secrets()
        for value in _texts([self._given.get(name) for name in options if options[name].get("no_log")]):
            known.add(value)
        known.add_embedded(self._given)
        self._task.args = known.censor(shown_options(self.control, self._given))
        self._task.environment = []

    def _in_background(self, task_vars: dict[str, Any]) -> dict[str, Any]:
        """Ansible's own way: as a module, in a file that holds the options, until it has ended."""
        given = self._given or {}
        msg = ""
        if getattr(self.control, "needs_host", False):
            msg = IN_ITS_ACTION_ONLY.format(self.control.name)
        elif self._connection.transport != "local":
            msg = (
                "async: add connection: local to the task; nothing of a control is copied to a system under protection"
            )
        elif constants.DEFAULT_KEEP_REMOTE_FILES:
            msg = "async: unset ANSIBLE_KEEP_REMOTE_FILES, which would leave a file with the options, passwords among them"
        if msg:
            return {"failed": True, "msg": msg}
        os.environ.update(self._environment)  # on the command line, where Ansible would put it, everybody reads it
        options = {**given, "host": given.get("host") or task_vars.get("inventory_hostname")}
        task_vars = {**task_vars, "ansible_python_interpreter": sys.executable}
        result: dict[str, Any] = self._execute_module(module_args=options, task_vars=task_vars, wrap_async=True)
        return result

    def _in_worker(self, task_vars: dict[str, Any]) -> dict[str, Any]:
        control = self.control
        spec = spec_of(control)
        options = spec.pop("argument_spec")
        spec.pop("supports_check_mode")
        given = self._given or {}
        checked = ModuleArgumentSpecValidator(options, **spec).validate(given)
        params = {**given, **checked.validated_parameters}
        hidden = set(checked._no_log_values) | _texts(
            [given.get(name) for name in options if options[name].get("no_log")]
        )
        if checked.error_messages:
            msg = checked.errors.msg
            if checked.unsupported_parameters:
                msg = f"Unsupported parameters for ({self._task.action}) module: {msg}"
            return {"failed": True, "msg": remove_values(without_values(msg), hidden | texts_of(given))}
        params["host"] = params.get("host") or task_vars.get("inventory_hostname")
        context = Context(
            check_mode=bool(self._task.check_mode),
            env={**os.environ, **self._environment},
            secrets=Secrets(public=public_values(options, params)),
            actor=actor(),
            run_id=os.environ.get("FIREBREAK_RUN") or RUN_ID,
            host=HostConnection(self),
            tell=Display().display,
        )
        for value in hidden:
            context.secret(value)
        result = execute(control, params, context)
        shown = {} if result.get("failed") else context.secrets.censor(shown_options(control, params))
        result["invocation"] = {"module_args": shown}
        return result


def plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a module would see: Ansible's tags are taken off, and a date is its text."""
    return json.loads(json.dumps(arguments, default=str))


def _texts(values: Any) -> set[str]:
    """All texts inside a value of whatever, perhaps wrong, type."""
    if isinstance(values, str):
        return {values} if values else set()
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list):
        return set().union(*(_texts(value) for value in values))
    return set()


def _keep_to_ourselves() -> None:
    """A killed ansible-playbook takes its workers along; else they would go on writing. And no crash leaves our memory on disk."""
    if os.getpid() == PARENT:
        return
    library = ctypes.CDLL(None)
    library.prctl(PR_SET_DUMPABLE, 0)
    library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != PARENT:
        os.kill(os.getpid(), signal.SIGKILL)
