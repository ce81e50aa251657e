# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What tests over all controls share: the rows, a front end's options, a case's files, and the list of what cannot be undone."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from ansible.module_utils.common.arg_spec import ModuleArgumentSpecValidator

from ansible_collections.firebreak.incident.plugins.module_utils import _engine, _task
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context, Control
from ansible_collections.firebreak.incident.plugins.modules import control_release, incident
from lab import ROOT
from tests.contract.rotation_walk import LocalHost
from tests.rows import Row

MODULES = "ansible_collections.firebreak.incident.plugins.modules"
COUNTER = itertools.count(1)


def module_of(control: str) -> ModuleType:
    return importlib.import_module(f"{MODULES}.{control}")


def controls() -> list[str]:
    """Every module that changes a system under protection. Readers, gates and records have no plan and no row."""
    names = sorted(file.stem for file in (ROOT / "plugins" / "modules").glob("*.py"))
    return [name for name in names if isinstance(getattr(module_of(name), "CONTROL", None), Control)]


def table_of(control: str) -> ModuleType:
    """The file with the control's rows."""
    return importlib.import_module(f"tests.controls.{control}")


def row_of(control: str) -> Row:
    row: Row = table_of(control).Lab()
    return row


def rows_of(control: str) -> list[Row]:
    """All rows of a control, the usual one first."""
    known = [value for value in vars(table_of(control)).values() if isinstance(value, type) and issubclass(value, Row)]
    return [row() for row in known if row.__module__ == table_of(control).__name__]


def every_row() -> list[Row]:
    return [row for control in controls() for row in rows_of(control)]


def name_of(row: Row) -> str:
    return row.control if type(row).__name__ == "Lab" else f"{row.control} {type(row).__name__.lower()}"


def documented(control: str, block: str = "RETURN") -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(getattr(module_of(control), block))
    return loaded


# --- a task's options


def store_of(lab: Any) -> str:
    """One case store for all tests of a lab, so that no two incidents have the same id. Rows of evidence look below the lab."""
    return f"file://{lab.dir}/trials"


def surroundings(lab: Any, store: str, host: str, incident_id: str | None = None) -> dict[str, Any]:
    """The options that say which incident, where its case is, and on which system."""
    known = lab.hostvars(host)
    given = {"site": "lab", "owner": "lab", "case_store": store, "protected": known["firebreak_protected"]}
    if store.startswith("s3:"):
        names = ("case_access_key_id", "case_secret_access_key")
        given |= {name: known[f"firebreak_{name}"] for name in names}
    return {**given, "incident_id": incident_id} if incident_id else given


def complete(control: Any, params: dict[str, Any]) -> dict[str, Any]:
    """The options as a front end hands them over: valid, with every default."""
    spec = _task.spec_of(control)
    options = spec.pop("argument_spec")
    spec.pop("supports_check_mode")
    checked = ModuleArgumentSpecValidator(options, **spec).validate(params)
    assert not checked.error_messages, checked.error_messages
    validated: dict[str, Any] = checked.validated_parameters
    return validated


def context_for(control: Any, params: dict[str, Any], **more: Any) -> Context:
    """A context that knows the secrets of the options, as a front end prepares it."""
    context = Context(run_id=f"run{os.getpid()}-{next(COUNTER)}", actor="tester", **more)
    for name, option in _task.spec_of(control)["argument_spec"].items():
        if option.get("no_log") and params.get(name):
            context.secret(params[name])
    return context


def execute(control: Any, params: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A control in this process, through the engine's one way in."""
    full = complete(control, params)
    return _engine.execute(control, full, context_for(control, full, **more))


def open_incident(lab: Any, store: str, host: str) -> str:
    """A new incident, whatever else is open."""
    options = {"type": "data_breach", "affected": [host], "new": True}
    opened = execute(incident.CONTROL, {**surroundings(lab, store, host), **options})
    assert opened.get("changed"), opened
    return str(opened["incident_id"])


def begin(lab: Any, row: Row, store: str, incident_id: str) -> None:
    """Carry out what goes before a row in the same incident."""

    def carry_out(host: str, control: str, options: dict[str, Any]) -> None:
        given = {**options, **surroundings(lab, store, host, incident_id), "host": host}
        result = execute(module_of(control).CONTROL, given, host=LocalHost())
        assert result.get("changed"), result

    row.begin(lab, carry_out)


def connection_options(control: str, params: dict[str, Any]) -> dict[str, Any]:
    """Those of a row's options that say where the service is and as whom to connect."""
    service = module_of(control).CONTROL.service.SPEC
    return {name: value for name, value in params.items() if name in service}


def release(
    lab: Any, store: str, control: str, params: dict[str, Any], incident_id: str, force: bool = False, **more: Any
) -> dict[str, Any]:
    """Undo what an incident's controls changed on the row's host."""
    host = row_of(control).host
    known = lab.hostvars(host)
    services = {name: known[f"firebreak_{name}"] for name in control_release.CONNECTION if f"firebreak_{name}" in known}
    own = connection_options(control, params)
    options = {**surroundings(lab, store, host, incident_id), **services, **own, "host": host}
    given = {"host": LocalHost(), **more}
    return execute(control_release.CONTROL, {**options, **({"force": True} if force else {})}, **given)


# --- what is on disk


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file, but for the locks, which hold nothing."""
    paths = (Path(where) / name for where, _folders, names in os.walk(folder) for name in names)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(paths)
        if path.is_file() and "/locks/" not in str(path)
    }


def same_incident(structure: Any, incident_id: str) -> Any:
    """The structure with the incident's id replaced, so that two incidents' can be compared."""
    return json.loads(json.dumps(structure, default=str, sort_keys=True).replace(incident_id, "INC"))


# --- what cannot be undone


def irreversible() -> dict[str, list[dict[str, str]]]:
    """By control: action, target (a regular expression) and reason of what a release leaves."""
    known: dict[str, list[dict[str, str]]] = yaml.safe_load((ROOT / "tests" / "irreversible.yml").read_text())
    return known


def unlisted(reported: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a run calls irreversible, but tests/irreversible.yml does not. Entries as ``control_release`` returns them."""
    return [entry for entry in reported if not any(_fits(known, entry) for known in _known(entry["control"]))]


def unreported(reported: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What tests/irreversible.yml lists, and a whole ``data_breach`` did not report."""
    return [
        {"control": control, **known}
        for control, entries in irreversible().items()
        for known in entries
        if not any(entry["control"] == control and _fits(known, entry) for entry in reported)
    ]


def _known(control: str) -> list[dict[str, str]]:
    return irreversible().get(control, [])


def _fits(known: dict[str, str], entry: dict[str, Any]) -> bool:
    named = known["action"] == entry["action"] and re.fullmatch(known["target"], entry["target"]) is not None
    return named and known["reason"] == entry.get("why", entry.get("irreversible"))
