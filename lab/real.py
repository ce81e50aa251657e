# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The real servers that pip cannot give: where they are, and how to get them without root (``make real``).

A program on PATH wins. Else it is the one that an earlier ``make real`` put into the user's cache folder, under the hash of
the recipe, so that a second clone finds it and a changed recipe never meets an old program. What cannot be had is named and
left out, and is no failure: the lab takes a double for it. Standard library only: this runs before there is an environment.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
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

# What a person asks for (`make test REAL=vault,s3`) -> the programs that it needs, each found by any of its names.
PARTS = {"vault": ("vault",), "s3": ("versitygw",)}
NAMES = {"vault": ("vault", "bao"), "versitygw": ("versitygw",), "postgresql-database-plugin": ()}
FILES = {
    "vault": "bin/vault",
    "versitygw": "bin/versitygw",
    "postgresql-database-plugin": "plugins/postgresql-database-plugin",
}


class LeftOut(Exception):
    """A part cannot be had here; the text says why."""


def recipe_hash() -> str:
    """The identity of what is built: the modules with their checksums, and how they are built."""
    digest = hashlib.sha256(repr((STRIP, STRIP_VAULT)).encode())
    for recipe in RECIPES:
        for name in ("go.mod", "go.sum"):
            digest.update((HERE / recipe / name).read_bytes())
    return digest.hexdigest()[:16]


def cache() -> Path:
    """The folder of this recipe's programs; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "firebreak-incident" / "real" / recipe_hash()


def find(name: str) -> Path | None:
    """The program ``name`` (vault, versitygw, postgresql-database-plugin), or None."""
    for candidate in NAMES[name]:
        if on_path := shutil.which(candidate):
            return Path(on_path)
    built = cache() / FILES[name]
    return built if os.access(built, os.X_OK) else None


def missing(parts: list[str]) -> list[str]:
    """Which of the parts that must be real are not here."""
    return [part for part in parts if any(find(program) is None for program in PARTS[part])]


def build_versitygw(go: Go, into: Path) -> None:
    go.build("versitygw", VERSITYGW, into / FILES["versitygw"], STRIP)


def build_vault(go: Go, into: Path) -> None:
    go.build("vault", VAULT, into / FILES["vault"], STRIP_VAULT)
    go.build("vault", POSTGRESQL_PLUGIN, into / FILES["postgresql-database-plugin"], STRIP)


# name, what it is, how long it takes on two cores, the programs, how
BUILDS: tuple[tuple[str, str, str, tuple[str, ...], Callable[[Go, Path], None]], ...] = (
    ("s3", "versitygw 1.8.0, an S3 server with Object Lock", "1 minute", ("versitygw",), build_versitygw),
    (
        "vault",
        "Vault 1.21.2 with its PostgreSQL plugin",
        "5 minutes",
        ("vault", "postgresql-database-plugin"),
        build_vault,
    ),
)


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


def build(programs: tuple[str, ...], how: Callable[[Go, Path], None], target: Path) -> None:
    with _scratch(target.parent) as scratch:
        if all(find(program) for program in programs):
            return  # another run built it while this one waited
        if (free := _free()) < DISK_GB:
            raise LeftOut(f"a build needs {DISK_GB} GB of free disk, and the cache folder has {free:.1f}")
        out = scratch / "out"
        for program in programs:
            (out / FILES[program]).parent.mkdir(parents=True, exist_ok=True)
        how(Go(scratch), out)
        for program in programs:
            place = target / FILES[program]
            place.parent.mkdir(parents=True, exist_ok=True)
            (out / FILES[program]).replace(place)


def make() -> list[str]:
    """Build what is not there; returns the names of what was left out."""
    left_out = []
    for name, what, duration, programs, how in BUILDS:
        where = [find(program) for program in programs]
        if where[0] and (all(where) or not where[0].is_relative_to(cache())):
            say(f"there     {name}: {where[0]}")
            continue
        say(f"building  {name}: {what} (about {duration} on two cores)")
        started = time.monotonic()
        try:
            build(programs, how, cache())
        except (LeftOut, OSError, subprocess.SubprocessError) as error:
            left_out.append(name)
            say(f"left out  {name}: {error}; the lab takes a double for it")
        else:
            say(f"built     {name}: {find(programs[0])} in {time.monotonic() - started:.0f} s")
    return left_out


def _end(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(143)  # unwinds: the build ends and its folder goes


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the lab's real servers, or ask for them.")
    parser.add_argument("--need", metavar="vault,s3", help="build nothing; fail when one of these is missing")
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
