# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every tool that can find fault with this checkout (``make lint``), each with its time; faults are shown at the end.

``make lint ARGS="ruff mypy"`` runs these alone. Some tools want the collection at its proper path: they get a copy.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
BIN = Path(sys.prefix) / "bin"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
COLLECTION = "ansible_collections/firebreak/incident"
PIP_SAYS = re.compile(r"Collecting |  Downloading |Installing |Successfully |Using cached |\s+━|Running sanity test ")
TYPED = ("module_utils", "plugin_utils")


@dataclasses.dataclass(frozen=True)
class Trees:
    """``root`` holds the copy at its proper path; each tool that writes gets a folder below ``scratch``."""

    root: Path
    scratch: Path

    @property
    def copy(self) -> Path:
        return self.root / COLLECTION


def environment(**more: str) -> dict[str, str]:
    """The tools of this environment first; a version manager's shims shadow real interpreters and may not run."""
    path = [
        str(BIN),
        *(part for part in os.environ["PATH"].split(os.pathsep) if not part.rstrip("/").endswith("/shims")),
    ]
    return {**os.environ, "PATH": os.pathsep.join(path), "NO_COLOR": "1", "ANSIBLE_NOCOLOR": "1", **more}


def run(*command: str, cwd: Path = CHECKOUT, **more: str) -> tuple[bool, str]:
    done = subprocess.run(
        command, cwd=cwd, env=environment(**more), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return done.returncode == 0, done.stdout + done.stderr


def copy_tree(target: Path) -> None:
    """What git knows or would know of: no environment, no cache, no running lab."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-coz", "--exclude-standard"],
        cwd=CHECKOUT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, os.fsdecode(listed.stdout).split("\0")):
        source, place = CHECKOUT / name, target / name
        if source.exists() or source.is_symlink():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, place, follow_symlinks=False)


def ruff(_trees: Trees) -> tuple[bool, str]:
    return run("ruff", "check", "--quiet", "--output-format", "concise", ".")


def ruff_format(_trees: Trees) -> tuple[bool, str]:
    return run("ruff", "format", "--check", "--quiet", "--diff", ".")


def mypy(trees: Trees) -> tuple[bool, str]:
    packages = [
        f"{COLLECTION.replace('/', '.')}.plugins.{name}"
        for name in TYPED
        if list((CHECKOUT / "plugins" / name).glob("*.py"))
    ]
    options = ["--config-file", str(CHECKOUT / "pyproject.toml"), "--cache-dir", str(CHECKOUT / ".mypy_cache")]
    return run(
        "mypy",
        *options,
        *(part for name in packages for part in ("-p", name)),
        cwd=trees.root,
        MYPYPATH=str(trees.root),
    )


def ansible_lint(_trees: Trees) -> tuple[bool, str]:
    return run("ansible-lint", "--offline", "--profile", "production", "--strict", "--nocolor")


def pip_bootstrap() -> None:
    """ansible-test fetches a script that installs pip from a host of its own, where Python's bundled pip would do.

    It looks into this cache first. A script that is there stays as it is.
    """
    source = Path(sysconfig.get_path("purelib"), "ansible_test/_internal/python_requirements.py").read_text()
    pinned = re.search(r"^\s+pip='([\d.]+)'", source, re.MULTILINE)
    if not pinned:
        return  # another ansible-test: it says itself what it misses
    place = Path.home() / ".ansible/test/cache" / f"get_pip_{pinned[1].replace('.', '_')}.py"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text((CHECKOUT / "tools/get_pip.py").read_text())


def sanity(trees: Trees) -> tuple[bool, str]:
    pip_bootstrap()
    good, output = run("ansible-test", "sanity", "--venv", "--python", PYTHON, "--color", "no", cwd=trees.copy)
    return good, "\n".join(line for line in output.splitlines() if line and not PIP_SAYS.match(line))


def docs(trees: Trees) -> tuple[bool, str]:
    options = ["--plugin-docs", "--validate-collection-refs=self", "--disallow-unknown-collection-refs"]
    return run(
        "antsibull-docs",
        "lint-collection-docs",
        *options,
        ".",
        cwd=trees.copy,
        ANSIBLE_COLLECTIONS_PATH=str(trees.root),
    )


def importer(trees: Trees) -> tuple[bool, str]:
    """What Galaxy's importer says to the tarball; it ends with 0 also when it warns."""
    dist = trees.scratch / "dist"
    built, output = run("ansible-galaxy", "collection", "build", "--output-path", str(dist), cwd=trees.copy)
    if not built:
        return False, output
    tarball = next(dist.glob("*.tar.gz"))
    config = str(CHECKOUT / "galaxy-importer.cfg")
    good, output = run(
        sys.executable, "-m", "galaxy_importer.main", str(tarball), cwd=dist, GALAXY_IMPORTER_CONFIG=config
    )
    warned = [line for line in output.splitlines() if "WARNING" in line or "ERROR" in line]
    return good and not warned, "\n".join(warned) or output


def changelog(trees: Trees) -> tuple[bool, str]:
    return run("antsibull-changelog", "lint", cwd=trees.copy)


def licences(trees: Trees) -> tuple[bool, str]:
    return run("reuse", "lint", "--lines", cwd=trees.copy)


def tables(_trees: Trees) -> tuple[bool, str]:
    return run(sys.executable, "tools/tables.py", "--check")


# In this order: the first ones want a copy that nobody has written into.
LINTERS: dict[str, Callable[[Trees], tuple[bool, str]]] = {
    "ruff": ruff,
    "ruff-format": ruff_format,
    "licences": licences,
    "tables": tables,
    "changelog": changelog,
    "mypy": mypy,
    "ansible-lint": ansible_lint,
    "docs": docs,
    "importer": importer,
    "sanity": sanity,
}


def main() -> int:
    wanted = sys.argv[1:] or list(LINTERS)
    if unknown := set(wanted) - set(LINTERS):
        print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(LINTERS)}", file=sys.stderr)
        return 2
    faults = {}
    with tempfile.TemporaryDirectory() as folder:
        trees = Trees(Path(folder, "tree"), Path(folder, "scratch"))
        trees.scratch.mkdir()
        copy_tree(trees.copy)
        for name in (name for name in LINTERS if name in wanted):
            print(f"  {name:<13}", end="", flush=True)
            started = time.monotonic()
            good, output = LINTERS[name](trees)
            print(f"{'ok' if good else 'FAULTS':<7}{time.monotonic() - started:5.1f} s", flush=True)
            if not good:
                faults[name] = output.replace(f"{trees.copy}/", "").strip()
    for name, output in faults.items():
        print(f"\n== {name}\n{output}", flush=True)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
