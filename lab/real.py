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

RECIPE = Path(__file__).resolve().parent / "vault"
VAULT = "github.com/hashicorp/vault"
POSTGRESQL_PLUGIN = f"{VAULT}/plugins/database/postgresql/postgresql-database-plugin"
VERSITYGW = "github.com/versity/versitygw/cmd/versitygw@v1.8.0"
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
    digest = hashlib.sha256(repr((VERSITYGW, STRIP, STRIP_VAULT)).encode())
    for name in ("go.mod", "go.sum"):
        digest.update((RECIPE / name).read_bytes())
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
    go.run("install", *STRIP, VERSITYGW, env={"GOBIN": str(into / "bin")})


def build_vault(go: Go, into: Path) -> None:
    source = go.scratch / "vault"
    shutil.copytree(RECIPE, source)
    go.run("build", *STRIP_VAULT, "-o", str(into / FILES["vault"]), VAULT, cwd=source)
    plugin = str(into / FILES["postgresql-database-plugin"])
    go.run("build", *STRIP, "-o", plugin, POSTGRESQL_PLUGIN, cwd=source)


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

    def run(self, *args: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
        own = {
            "CGO_ENABLED": "0",
            "GOMODCACHE": str(self.scratch / "modules"),
            "GOCACHE": str(self.scratch / "build"),
            "GOFLAGS": "-modcacherw -buildvcs=false",
            "GOWORK": "off",
        }
        log = self.scratch / "log"
        with log.open("wb") as output:
            child = subprocess.Popen(
                [self.tool, *args],
                cwd=cwd or self.scratch,
                env={**os.environ, **own, **(env or {})},
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
            raise LeftOut(f"`go {args[0]}` failed: {lines[-1].strip()}")


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


def build(programs: tuple[str, ...], how: Callable[[Go, Path], None], target: Path) -> None:
    with _scratch(target.parent) as scratch:
        if all(find(program) for program in programs):
            return  # another run built it while this one waited
        free = shutil.disk_usage(scratch).free / 1e9
        if free < DISK_GB:
            raise LeftOut(f"a build needs {DISK_GB} GB of free disk, and the cache folder's has {free:.1f}")
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
    wanted = parser.parse_args().need
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
        say(f"Not here: {', '.join(left_out)}. Everything works without it, on doubles; REAL={','.join(left_out)} does not.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
