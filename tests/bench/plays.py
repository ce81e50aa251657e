# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The real ansible-playbook on plays of the bench's own control, each with a case in a store of its own."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ansible_collections.firebreak.incident.plugins.modules import incident
from tests.helpers import execute

COLLECTION = Path(__file__).with_name("collection")
ANSIBLE = str(Path(sys.executable).parent / "ansible-playbook")
VALUES = itertools.count(1)


class Place:
    """A folder with the inventory, the collection and the plays."""

    def __init__(self, folder: Path, hosts: int) -> None:
        self.folder = folder
        names = {f"h{number:02}": None for number in range(1, hosts + 1)}
        common = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        (folder / "inventory.json").write_text(json.dumps({"all": {"hosts": names, "vars": common}}))
        namespace = folder / "ansible_collections" / "firebreak"
        namespace.mkdir(parents=True)
        (namespace / "bench").symlink_to(COLLECTION)
        (folder / "ansible.cfg").write_text("")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "FIREBREAK_"))}
        self._env = {
            **kept,
            "ANSIBLE_CONFIG": str(folder / "ansible.cfg"),
            "ANSIBLE_HOME": str(folder / "home"),
            "ANSIBLE_COLLECTIONS_PATH": str(folder),
            "ANSIBLE_NOCOLOR": "1",
            "FIREBREAK_SPOOL": str(folder / "spool"),
        }

    def play(self, tasks: list[dict[str, Any]], hosts: str = "all") -> None:
        """One run; it must succeed."""
        file = self.folder / "play.json"
        file.write_text(
            json.dumps([{"hosts": hosts, "gather_facts": False, "strategy": "ansible.builtin.free", "tasks": tasks}])
        )
        done = subprocess.run(
            [ANSIBLE, "-i", "inventory.json", "-f", "25", file.name],
            cwd=self.folder,
            env=self._env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{done.stdout[-3000:]}{done.stderr[-3000:]}")


def store(folder: Path) -> dict[str, Any]:
    return {"case_store": f"file://{folder}/cases"}


def options(case: dict[str, Any], url: str) -> dict[str, Any]:
    """The options of a task in a new incident of this store."""
    common = {**case, "site": "lab", "owner": "lab", "protected": {}}
    if case["case_store"] == "null:":
        return {**common, "incident_id": "INC-2026-0101-001", "bench_url": url}
    opened = execute(incident.CONTROL, {**common, "type": "data_breach", "affected": ["h01"], "new": True})
    return {**common, "incident_id": opened["incident_id"], "bench_url": url}


def control(common: dict[str, Any], name: str = "setting") -> dict[str, Any]:
    """A task that has something to change each time it is run."""
    number = next(VALUES)
    own = {"name": "{{ inventory_hostname }}", "value": str(number)}
    return {"name": f"Change {number}", f"firebreak.bench.{name}": {**common, **own}}
