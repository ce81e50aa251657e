# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What sets a fresh clone up: it finds what works, and says in plain words what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SYSTEM = "/usr/bin:/bin"
GO = """
    case "$1" in
    env) echo go1.26.8 ;;
    build)
        while [ "$1" != -o ]; do shift; done
        printf '#!/bin/sh\\n' > "$2"
        chmod +x "$2"
        ;;
    esac
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    folder = tmp_path / "programs"
    folder.mkdir()
    return folder


def put(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\nPATH={SYSTEM}:$PATH\n" + textwrap.dedent(script))
    path.chmod(0o755)
    return path


def real(programs: Path, *arguments: str) -> tuple[int, str]:
    environment = {"PATH": str(programs), "HOME": str(programs), "XDG_CACHE_HOME": str(programs / "cache")}
    command = [sys.executable, "-I", str(ROOT / "lab/real.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


NO_GO = "exit 1"
OLD_GO = "echo go1.19.8"
BROKEN_GO = 'if [ "$1" = env ]; then echo go1.26.8; else echo "no network"; exit 1; fi'


@pytest.mark.parametrize(
    ("go", "reason"), [(NO_GO, "`go` is not working"), (OLD_GO, "needs Go 1.25.3"), (BROKEN_GO, "no network")]
)
def test_what_cannot_be_built_is_named_and_is_no_failure(programs: Path, go: str, reason: str) -> None:
    put(programs, "go", go)
    status, output = real(programs)
    assert status == 0
    assert output.count("left out") == 3
    assert reason in output and "there is no `apt-get` on PATH" in output
    assert list(programs.glob("cache/*/*/.build-*")) == []
    status, output = real(programs, "--need", "vault,s3")
    assert status == 1
    assert "vault, s3 is missing" in output


def test_what_is_built_is_found_by_the_next_run(programs: Path) -> None:
    put(programs, "go", GO)
    status, output = real(programs)
    assert (status, output.count("built  ")) == (0, 2)
    assert real(programs, "--need", "vault,s3") == (0, "")
    status, output = real(programs)
    assert output.count("there  ") == 2
    assert list(programs.glob("cache/*/*/.build-*")) == []


# A system whose package lists are empty until somebody fetches some of his own; each package holds what its name says.
APT = {
    "apt-cache": """
    case "$*" in
    *"Dir::State="*" show "* | *"show --no-all-versions known") echo "Package: pgbouncer" ;;
    *" depends "*) printf 'pgbouncer\\n  Depends: libevent-2.1-7\\n  Depends: libc6\\n' ;;
    *) exit 100 ;;
    esac
    """,
    "apt-get": """
    while [ $# -gt 0 ]; do case "$1" in download) shift; break ;; update) exit 0 ;; esac; shift; done
    for package in "$@"; do echo "$package" > "$package.deb"; done
    """,
    "dpkg-deb": """
    mkdir -p "$3/usr/sbin" "$3/usr/lib/any"
    case "$2" in
    *libevent*) echo library > "$3/usr/lib/any/libevent-2.1.so.7" ;;
    *pgbouncer*)
        printf '#!/bin/sh\\necho "PgBouncer in $LD_LIBRARY_PATH"\\n' > "$3/usr/sbin/pgbouncer"
        chmod +x "$3/usr/sbin/pgbouncer" ;;
    *) exit 1 ;;
    esac
    """,
}


def test_a_package_is_unpacked_without_being_installed(programs: Path) -> None:
    for name, script in APT.items():
        put(programs, name, script)
    status, output = real(programs)
    assert status == 0 and "built     pgbouncer: " in output, output
    (started,) = programs.glob("cache/*/*/*/bin/pgbouncer")
    said = subprocess.run([str(started)], capture_output=True, text=True, check=True, env={"PATH": SYSTEM}).stdout
    folder = Path(said.removeprefix("PgBouncer in ").strip())
    assert (folder / "libevent-2.1.so.7").exists() and not list(programs.glob("cache/**/libc6*"))
    assert real(programs, "--need", "pgbouncer") == (0, "")
    assert "there     pgbouncer: " in real(programs)[1]


def test_a_package_that_is_not_there_is_named(programs: Path) -> None:
    for name, script in {**APT, "apt-cache": "exit 100"}.items():
        put(programs, name, script)
    status, output = real(programs)
    assert status == 0 and "this system's package sources have no pgbouncer" in output
    assert real(programs, "--need", "pgbouncer")[0] == 1


def test_a_program_on_path_is_taken_first(programs: Path) -> None:
    bao = put(programs, "bao", "exit 0")
    put(programs, "go", GO)
    assert f"there     vault: {bao}" in real(programs)[1]


def test_an_unknown_part_is_refused(programs: Path) -> None:
    status, output = real(programs, "--need", "s3,valut")
    assert status == 2
    assert "unknown real part valut" in output


def find_python(path: str, home: Path, *versions: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(ROOT / "tools/find-python"), *versions]
    return subprocess.run(
        command, env={"PATH": path, "HOME": str(home)}, capture_output=True, text=True, check=False, timeout=60
    )


def test_an_interpreter_counts_only_if_it_runs(programs: Path) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shims = programs / "manager/shims"
    kept = programs / f"manager/versions/{version}.0/bin"
    shims.mkdir(parents=True)
    kept.mkdir(parents=True)
    put(shims, f"python{version}", "exit 127")
    real_one = put(kept, f"python{version}", f'exec "{os.path.realpath(sys.executable)}" "$@"')
    found = find_python(f"{shims}:{SYSTEM}", programs, "2.6", version)
    assert found.stdout.strip() in (str(real_one), f"/usr/bin/python{version}", f"/bin/python{version}")


def test_no_interpreter_is_said(programs: Path) -> None:
    found = find_python(SYSTEM, programs, "2.6")
    assert found.returncode == 1
    assert "no working Python 2.6" in found.stderr
