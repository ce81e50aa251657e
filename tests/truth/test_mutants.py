# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The harness over the harness: a copy of the product with one mistake turns the part that watches for it red."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from lab import ROOT
from tests.truth import budget
from tests.truth.mutants import MUTANTS, Mutant

LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "dist", "output")
SECONDS = 180


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout, beside an environment in which it is the collection."""
    place = tmp_path_factory.mktemp("mutants")
    shutil.copytree(ROOT, place / "checkout", ignore=LEFT_OUT)
    real, site = Path(sys.prefix), Path(sysconfig.get_path("purelib"))
    libraries = place / "venv" / site.relative_to(real)
    collections = libraries / "ansible_collections" / "firebreak"
    collections.mkdir(parents=True)
    (collections / "incident").symlink_to(place / "checkout")
    for entry in site.iterdir():
        if entry.name != "ansible_collections":
            (libraries / entry.name).symlink_to(entry)
    programs = place / "venv" / "bin"
    programs.mkdir()
    (programs / "python").symlink_to(Path(sys.executable).resolve())
    shutil.copy(real / "pyvenv.cfg", place / "venv")
    for script in (real / "bin").glob("ansible*"):
        text = script.read_text()
        (programs / script.name).write_text(text.replace(str(real), str(place / "venv"), 1))
        (programs / script.name).chmod(0o755)
    return place / "checkout"


def tried(copy: Path, by: tuple[str, ...]) -> tuple[int, str]:
    """How the tests end in the copy, in a lab of their own: a mistake leaves things behind."""
    programs = copy.parent / "venv" / "bin"
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(programs.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [str(programs / "python"), "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *by]
    done = subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_harness_turns_red(copy: Path, mutant: Mutant) -> None:
    file = copy / mutant.file
    sound = file.read_text()
    assert sound.count(mutant.old) == 1, f"{mutant.file} has changed: make the mutant {mutant.name} anew"
    file.write_text(sound.replace(mutant.old, mutant.new))
    compile(file.read_text(), mutant.file, "exec")
    try:
        code, told = tried(copy, mutant.by)
    finally:
        file.write_text(sound)
    # A fixture that looks at what the product did may be what fails.
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+::\S+)", told, re.MULTILINE)
    assert code == 1 and failed, told[-3000:]


def test_they_are_green_in_the_copy_as_it_stands(copy: Path) -> None:
    """After all the mistakes: what turned red did so for the mistake alone."""
    tests = sorted({test for mutant in MUTANTS for test in mutant.by})
    code, told = tried(copy, tuple(tests[:: budget(len(tests), 1)]))
    assert code == 0, told[-3000:]
