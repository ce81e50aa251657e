# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write the locks anew (``make lock``): every version and hash of what the environments hold.

Each lock is resolved on the oldest Python that it serves: what a package asks for on an old Python only is then in it, and
``pip check`` after each installation says when a newer one asks for more. Shared packages have one version in all locks.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE.parent / "requirements"
PIP_TOOLS = "pip-tools==7.6.2"
OPTIONS = (
    "--generate-hashes",
    "--allow-unsafe",
    "--strip-extras",
    "--no-header",
    "--annotation-style=line",
    "--no-config",
    "--quiet",
    "--no-emit-index-url",
    "--no-emit-trusted-host",
    "--no-emit-find-links",
    "--no-emit-options",
)
LOCKS = (("2.19", "3.11", ()), ("2.21", "3.12", ("2.19",)), ("lint", "3.11", ("2.19", "2.21")))
ENTRY = re.compile(r"^(?P<pin>(?P<name>[\w.-]+)==\S+)(?: \\\n    \S+)+.*\n(?:    # .*\n)*", re.MULTILINE)


def without(text: str, names: set[str]) -> str:
    return ENTRY.sub(lambda entry: "" if entry["name"] in names else entry[0], text)


def pins(name: str) -> str:
    """The versions of a lock as constraints; each environment has an ansible-core of its own."""
    entries = ENTRY.finditer((REQUIREMENTS / f"{name}.txt").read_text())
    return "".join(f"{entry['pin']}\n" for entry in entries if entry["name"] != "ansible-core")


def pip_compile(python_version: str, folder: Path) -> str:
    found = subprocess.run(
        ["sh", str(HERE / "find-python"), python_version], capture_output=True, text=True, check=False
    )
    if found.returncode:
        raise SystemExit(f"make lock needs Python {python_version}: {found.stderr.strip()}")
    venv = folder / python_version
    if not venv.exists():
        subprocess.run([found.stdout.strip(), "-m", "venv", str(venv)], check=True)
        subprocess.run([venv / "bin/pip", "install", "--quiet", PIP_TOOLS], check=True)
    return str(venv / "bin/pip-compile")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, python_version, constrained_by in LOCKS:
            print(f"locking {name} on Python {python_version}", flush=True)
            constraints = folder / f"{name}.constraints"
            constraints.write_text("".join(pins(other) for other in constrained_by))
            output = folder / f"{name}.txt"
            tool = pip_compile(python_version, folder)
            source = f"requirements/{name}.in"
            command = [tool, *OPTIONS, "--constraint", str(constraints), "--output-file", str(output), source]
            subprocess.run(command, cwd=REQUIREMENTS.parent, check=True)
            text = re.sub(r"(,? *)-c \S+?\.constraints", "", output.read_text())
            if name == "lint":
                text = without(text, {"ansible-core"})
            (REQUIREMENTS / f"{name}.txt").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
