# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write the README's tables of playbooks, controls and roles from what these say of themselves; ``--check`` only compares.

A playbook says it in its first comment, a module in ``short_description``, a role in its argument specification.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import yaml

CHECKOUT = Path(__file__).resolve().parent.parent
README = CHECKOUT / "README.md"
NAMESPACE = "firebreak.incident."
FINAL = "evidence is kept"


def playbooks() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("playbook", "what it does")]
    for path in sorted((CHECKOUT / "playbooks").glob("*.yml")):
        comment = re.findall(r"^# (?!SPDX|Copyright)(.*)$", path.read_text().split("\n- ", 1)[0], re.MULTILINE)
        rows.append((f"`{NAMESPACE}{path.stem}`", " ".join(comment).replace("<", "&lt;")))
    return rows


def documentation(path: Path) -> dict[str, Any]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "DOCUMENTATION":
            return dict(yaml.safe_load(ast.literal_eval(node.value)))
    raise ValueError(f"{path.name} has no DOCUMENTATION")


def undo(path: Path, irreversible: dict[str, list[dict[str, str]]]) -> str:
    if not re.search(r"^CONTROL = Control\(", path.read_text(), re.MULTILINE):
        return "-"
    final = irreversible.get(path.stem, [])
    return "yes" if not final else "kept" if all(change["reason"] == FINAL for change in final) else "final"


def modules() -> list[tuple[str, ...]]:
    irreversible = yaml.safe_load((CHECKOUT / "tests" / "irreversible.yml").read_text())
    rows: list[tuple[str, ...]] = [("module", "what it does", "undo")]
    for path in sorted((CHECKOUT / "plugins" / "modules").glob("*.py")):
        short = documentation(path)["short_description"]
        rows.append((f"`{path.stem}`", short[0].lower() + short[1:], undo(path, irreversible)))
    return rows


def roles() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("role", "what it does")]
    for path in sorted((CHECKOUT / "roles").glob("*/meta/argument_specs.yml")):
        short = yaml.safe_load(path.read_text())["argument_specs"]["main"]["short_description"]
        rows.append((f"`{path.parts[-3]}`", short[0].lower() + short[1:]))
    return rows


TABLES = {"playbooks": playbooks, "modules": modules, "roles": roles}


def table(rows: list[tuple[str, ...]]) -> str:
    head, *rest = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rest))


def written(text: str) -> str:
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: written by tools/tables.py -->", f"<!-- /{name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{table(make())}\n\n{end}{rest.split(end)[1]}"
    return text


def main() -> int:
    text = README.read_text()
    fresh = written(text)
    if "--check" in sys.argv[1:]:
        if fresh != text:
            print("README.md: its tables are not what the code says; run python tools/tables.py", file=sys.stderr)
        return int(fresh != text)
    README.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
