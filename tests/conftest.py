# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A lab of the tests' own: in a temporary folder, thief and crowd off, ended with the session, however that ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import ROOT
from lab.client import Lab


def pytest_configure(config: pytest.Config) -> None:
    """The path of a Unix socket has 107 characters at most, and the folders of several workers have long names."""
    if getattr(config.option, "numprocesses", None) and not config.option.basetemp:
        # Removed here and not by the workers, who are ended when they take long about it.
        config.option.basetemp = folder = tempfile.mkdtemp(prefix="fb-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def start_lab(folder: Path, *options: str) -> subprocess.Popen[str]:
    """The lab as a child that ends with us; returns when it is up."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lab", "up", "--foreground", "--tied", *options],
        cwd=ROOT,
        env={**os.environ, "LAB_DIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stderr
    for line in process.stdout:
        if "End it" in line:
            return process
    process.wait()
    pytest.fail(process.stderr.read())


def end_lab(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.communicate(timeout=20)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    process = start_lab(folder)
    try:
        yield Lab(folder)
    finally:
        end_lab(process)
