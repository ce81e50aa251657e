# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The real servers that pip cannot give: where they are, and how to get them without root (``make real``).

A program on PATH wins. Else it is the one that an earlier ``make real`` put into the user's cache folder, under the hash of
its recipe, so that a second clone finds it and a changed recipe never meets an old program. What cannot be had is named and
left out, and is no failure: the lab takes a double for it. Standard library only: this runs before there is an environment.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
RECIPES = ("vault", "versitygw")  # folders with a Go module file and its checksums
VAULT = "github.com/hashicorp/vault"
POSTGRESQL_PLUGIN = f"{VAULT}/plugins/database/postgresql/postgresql-database-plugin"
VERSITYGW = "github.com/versity/versitygw/cmd/versitygw"
STRIP = ("-trimpath", "-ldflags", "-s -w")
STRIP_VAULT = ("-tags", "minimal", "-trimpath", "-ldflags", f"-s -w -X {VAULT}/version.GitCommit=module")
GO = (1, 25, 3)
GO_THAT_FETCHES_GO = (1, 21, 0)  # from here on a Go tool gets the newer one that a module asks for
DISK_GB = 8

# Debian's package, and those of what it depends on that a system need not have.
PGBOUNCER = "pgbouncer"
LIBRARIES = re.compile(r"libevent|libc-ares")
# The loader is told of these libraries for this program alone. Its process is the one that was started.
START = """#!/bin/sh
here=${0%/*}/../lib/pgbouncer
LD_LIBRARY_PATH="$here" exec "$here/pgbouncer" "$@"
"""

# What a person asks for (`make test REAL=vault,pgbouncer,s3`) -> the programs that it needs, each found by any of its names.
PARTS = {"vault": ("vault",), "pgbouncer": ("pgbouncer",), "s3": ("versitygw",)}
NAMES = {
    "vault": ("vault", "bao"),
    "versitygw": ("versitygw",),
    "postgresql-database-plugin": (),
    "pgbouncer": ("pgbouncer",),
}
FILES = {
    "vault": "bin/vault",
    "versitygw": "bin/versitygw",
    "postgresql-database-plugin": "plugins/postgresql-database-plugin",
    "pgbouncer": "bin/pgbouncer",
}


class LeftOut(Exception):
    """A part cannot be had here; the text says why."""


def recipe_hash(program: str = "vault") -> str:
    """The identity of what is built: the modules with their checksums, and how they are built; or which packages are
    unpacked on which system."""
    if program == "pgbouncer":
        system = (_release(), platform.machine())
        return hashlib.sha256(repr((PGBOUNCER, LIBRARIES.pattern, START, system)).encode()).hexdigest()[:16]
    digest = hashlib.sha256(repr((STRIP, STRIP_VAULT)).encode())
    for recipe in RECIPES:
        for name in ("go.mod", "go.sum"):
            digest.update((HERE / recipe / name).read_bytes())
    return digest.hexdigest()[:16]


def _release() -> str:
    """Which release of which distribution this is: the packages' other libraries are its own."""
    with contextlib.suppress(OSError):
        found = platform.freedesktop_os_release()
        return f"{found.get('ID')} {found.get('VERSION_ID')}"
    return platform.system()


def cache(program: str = "vault") -> Path:
    """The folder of what this program's recipe makes; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "firebreak-incident" / "real" / recipe_hash(program)


def find(name: str) -> Path | None:
    """The program ``name`` (vault, versitygw, postgresql-database-plugin, pgbouncer), or None."""
    for candidate in NAMES[name]:
        if on_path := shutil.which(candidate):
            return Path(on_path)
    built = cache(name) / FILES[name]
    return built if os.access(built, os.X_OK) else None


def missing(parts: list[str]) -> list[str]:
    """Which of the parts that must be real are not here."""
    return [part for part in parts if any(find(program) is None for program in PARTS[part])]


def build_versitygw(scratch: Path, into: Path) -> None:
    Go(scratch).build("versitygw", VERSITYGW, into / FILES["versitygw"], STRIP)


def build_vault(scratch: Path, into: Path) -> None:
    go = Go(scratch)
    go.build("vault", VAULT, into / FILES["vault"], STRIP_VAULT)
    go.build("vault", POSTGRESQL_PLUGIN, into / FILES["postgresql-database-plugin"], STRIP)


def unpack_pgbouncer(scratch: Path, into: Path) -> None:
    """The package and its libraries, unpacked and not installed, and a start of it that finds them."""
    apt = Apt(scratch)
    libraries = [name for name in apt.depends(PGBOUNCER) if LIBRARIES.match(name)]
    unpacked = apt.unpack(PGBOUNCER, *libraries)
    folder = into / "lib" / "pgbouncer"
    folder.mkdir(parents=True)
    shutil.copy2(unpacked / "usr/sbin/pgbouncer", folder)
    for library in unpacked.glob("**/lib*.so.*"):
        shutil.copy2(library, folder)  # each under every name that it has: a link is followed
    start = into / FILES["pgbouncer"]
    start.write_text(START)
    start.chmod(0o755)
    apt.run([str(start), "--version"])


class Build(NamedTuple):
    """How a part is made, and what that takes on two cores."""

    part: str
    what: str
    duration: str
    programs: tuple[str, ...]
    how: Callable[[Path, Path], None]
    gigabytes: int


BUILDS = (
    Build("pgbouncer", "PgBouncer, a pool of connections", "5 seconds", ("pgbouncer",), unpack_pgbouncer, 1),
    Build("s3", "versitygw 1.8.0, an S3 server with Object Lock", "1 minute", ("versitygw",), build_versitygw, DISK_GB),
    Build(
        "vault",
        "Vault 1.21.2 with its PostgreSQL plugin",
        "5 minutes",
        ("vault", "postgresql-database-plugin"),
        build_vault,
        DISK_GB,
    ),
)


class Apt:
    """Debian's packages, fetched and unpacked by whoever this is, with nothing installed."""

    def __init__(self, scratch: Path) -> None:
        for tool in ("apt-get", "apt-cache", "dpkg-deb"):
            if not shutil.which(tool):
                raise LeftOut(f"there is no `{tool}` on PATH")
        self.folder = scratch / "debian"
        self._options: list[str] = []
        self.folder.mkdir()
        if not self._knows(PGBOUNCER):
            self._update()

    def _knows(self, package: str) -> bool:
        shown = self.run(["apt-cache", *self._options, "show", "--no-all-versions", package], fails=True)
        return "Package:" in shown

    def _update(self) -> None:
        """Package lists of our own, which need no root."""
        places = {"Dir::State": self.folder / "state", "Dir::Cache": self.folder / "cache"}
        for place in places.values():
            (place / "lists" / "partial").mkdir(parents=True)
            (place / "archives" / "partial").mkdir(parents=True)
        self._options = [word for name, place in places.items() for word in ("-o", f"{name}={place}")]
        self._options += ["-o", "Dir::State::status=/var/lib/dpkg/status", "-o", "APT::Sandbox::User="]
        self.run(["apt-get", *self._options, "-qq", "update"])
        if not self._knows(PGBOUNCER):
            raise LeftOut(f"this system's package sources have no {PGBOUNCER}")

    def depends(self, package: str) -> list[str]:
        shown = self.run(["apt-cache", *self._options, "depends", "--important", package])
        return re.findall(r"Depends: ([a-z0-9.+-]+)", shown)

    def unpack(self, *packages: str) -> Path:
        sandbox = ["-o", "APT::Sandbox::User="]  # the folder is nobody else's to read
        self.run(["apt-get", *self._options, *sandbox, "-qq", "download", *packages])
        for file in sorted(self.folder.glob("*.deb")):
            self.run(["dpkg-deb", "--extract", str(file), str(self.folder / "unpacked")])
        return self.folder / "unpacked"

    def run(self, command: list[str], fails: bool = False) -> str:
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, check=False, timeout=120, stdin=subprocess.DEVNULL
        )
        if done.returncode and not fails:
            lines = done.stderr.strip().splitlines() or ["no output"]
            raise LeftOut(f"`{Path(command[0]).name}` failed: {lines[-1].strip()}")
        return done.stdout


class Go:
    """The Go tool with caches of its own, which end with the build."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.tool = shutil.which("go") or ""
        if not self.tool:
            raise LeftOut("there is no `go` on PATH")
        shown = subprocess.run([self.tool, "env", "GOVERSION"], capture_output=True, text=True, check=False, timeout=60)
        found = tuple(int(part) for part in re.findall(r"\d+", shown.stdout)[:3])
        pinned = os.environ.get("GOTOOLCHAIN", "") == "local"
        if found < (GO if pinned else GO_THAT_FETCHES_GO):
            wanted = ".".join(str(part) for part in GO)
            raise LeftOut(f"it needs Go {wanted} or newer, and `go` is {shown.stdout.strip() or 'not working'}")

    def build(self, recipe: str, package: str, program: Path, options: tuple[str, ...]) -> None:
        own = {
            "CGO_ENABLED": "0",
            "GOMODCACHE": str(self.scratch / "modules"),
            "GOCACHE": str(self.scratch / "build"),
            "GOFLAGS": "-mod=readonly -modcacherw -buildvcs=false",
            "GOWORK": "off",
        }
        log = self.scratch / "log"
        with log.open("wb") as output:
            child = subprocess.Popen(
                [self.tool, "build", *options, "-o", str(program), package],
                cwd=HERE / recipe,
                env={**os.environ, **own},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that an interrupted build ends with all its compilers
            )
            try:
                status = _wait(child)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if status:
            lines = log.read_text("utf-8", "replace").strip().splitlines() or ["no output"]
            raise LeftOut(f"`go build` failed: {lines[-1].strip()}")


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Wait, with a sign of life every half minute."""
    started = time.monotonic()
    while True:
        try:
            return child.wait(timeout=30)
        except subprocess.TimeoutExpired:
            say(f"      still building after {time.monotonic() - started:.0f} s")


def say(line: str) -> None:
    print(line, flush=True)


@contextlib.contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """A folder for one build; two builds at once wait for each other, and what a killed one left is removed."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in root.glob(".build-*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=root) as folder:
            yield Path(folder)


def _free() -> float:
    """GB of free disk where the cache folder is, or will be."""
    folder = next(folder for folder in cache().parents if folder.exists())
    return shutil.disk_usage(folder).free / 1e9


def build(one: Build) -> None:
    target = cache(one.programs[0])
    with _scratch(target.parent) as scratch:
        if all(find(program) for program in one.programs):
            return  # another run built it while this one waited
        if (free := _free()) < one.gigabytes:
            raise LeftOut(f"a build needs {one.gigabytes} GB of free disk, and the cache folder has {free:.1f}")
        out = scratch / "out"
        programs = [out / FILES[program] for program in one.programs]
        for program in programs:
            program.parent.mkdir(parents=True, exist_ok=True)
        one.how(scratch, out)
        others = [file for file in sorted(out.rglob("*")) if file.is_file() and file not in programs]
        for file in [*others, *programs]:  # what is found is whole
            place = target / file.relative_to(out)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)


def make() -> list[str]:
    """Build what is not there; returns the names of what was left out."""
    left_out = []
    for one in BUILDS:
        where = [find(program) for program in one.programs]
        if where[0] and (all(where) or not where[0].is_relative_to(cache(one.programs[0]))):
            say(f"there     {one.part}: {where[0]}")
            continue
        say(f"building  {one.part}: {one.what} (about {one.duration} on two cores)")
        started = time.monotonic()
        try:
            build(one)
        except (LeftOut, OSError, subprocess.SubprocessError) as error:
            left_out.append(one.part)
            say(f"left out  {one.part}: {error}; the lab takes a double for it")
        else:
            say(f"built     {one.part}: {find(one.programs[0])} in {time.monotonic() - started:.0f} s")
    return left_out


def _end(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(143)  # unwinds: the build ends and its folder goes


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the lab's real servers, or ask for them.")
    parser.add_argument("--need", metavar="vault,pgbouncer,s3", help="build nothing; fail when one of these is missing")
    parser.add_argument("--room", action="store_true", help="fail when there is not the disk space for a build")
    asked = parser.parse_args()
    if asked.room:
        return int(_free() < DISK_GB)
    wanted = asked.need
    if wanted is not None:
        parts = [part for part in wanted.split(",") if part]
        if unknown := sorted(set(parts) - set(PARTS)):
            parser.error(f"unknown real part {', '.join(unknown)}; there are {', '.join(PARTS)}")
        if absent := missing(parts):
            say(f"REAL={wanted}: {', '.join(absent)} is missing. `make real` builds it, or says why it cannot.")
            return 1
        return 0
    signal.signal(signal.SIGTERM, _end)
    left_out = make()
    if left_out:
        say(
            f"Not here: {', '.join(left_out)}. Everything works without it, on doubles; REAL={','.join(left_out)} does not."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
