# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Set up a virtual environment from its lock, once, and link this checkout into it as the collection.

Run by ``tools/environment`` with the Python that the environment is to have. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON_OF_NEWEST_CORE = (3, 12)


def locks_for(core: str, lint: bool) -> list[Path]:
    if core == "newest":
        core = "2.21" if sys.version_info >= OLDEST_PYTHON_OF_NEWEST_CORE else "2.19"
    return [CHECKOUT / "requirements" / f"{name}.txt" for name in [core, *(["lint"] if lint else [])]]


def install(python: Path, lock: Path) -> None:
    """Exactly what the lock says. An environment that already has it is adopted: pip finds nothing to do."""
    stamp = python.parent.parent / f".firebreak-{lock.stem}"
    wanted = hashlib.sha256(lock.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    count = lock.read_text().count("==")
    print(f"installing {lock.relative_to(CHECKOUT)} ({count} packages) into {stamp.parent}", flush=True)
    started = time.monotonic()
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    options = ["--quiet", "--progress-bar=off", "--no-deps", "--require-hashes", "--requirement", str(lock)]
    subprocess.run([*pip, "install", *options], check=True)
    checked = subprocess.run([*pip, "check"], check=False, stdout=subprocess.PIPE, text=True)
    if checked.returncode:
        sys.stderr.write(checked.stdout)
        checked.check_returncode()
    stamp.write_text(wanted)
    print(f"installed in {time.monotonic() - started:.0f} s", flush=True)


def link(python: Path) -> None:
    """Every tool finds the checkout as the collection through the environment alone."""
    command = [str(python), "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    place = Path(site) / "ansible_collections" / "firebreak" / "incident"
    if place.is_symlink() and place.resolve() == CHECKOUT:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = place.with_name(f".incident-{os.getpid()}")
    fresh.symlink_to(CHECKOUT)
    fresh.replace(place)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("core", choices=["newest", "2.19"])
    parser.add_argument("lint", nargs="?", choices=["lint"])
    asked = parser.parse_args()
    python = asked.folder.absolute() / "bin" / "python"
    try:
        if Path(sys.prefix) != asked.folder.resolve():
            print(f"making {asked.folder} with Python {sys.version.split()[0]}", flush=True)
            venv.create(asked.folder, with_pip=True, clear=asked.folder.exists())
        for lock in locks_for(asked.core, asked.lint is not None):
            install(python, lock)
        link(python)
    except subprocess.CalledProcessError as error:
        print(f"{asked.folder} is not ready: pip ended with status {error.returncode}, see above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
