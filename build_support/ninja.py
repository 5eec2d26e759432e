"""Compiles objects, each with flags of its own, and links a library of them, by ninja.

The log is a line of names and seconds, and what compilers say; V=1 shows their commands.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from build_support.folders import ROOT

# Begins the lines that ninja prints when a step ends; the number of steps and its name follow.
STEP = "clinattn-step"
UP_TO_DATE = "ninja: no work to do."


class Unit(NamedTuple):
    """A source and the flags that it is compiled with."""

    source: Path
    flags: Sequence[str]


class Library(NamedTuple):
    """A shared library: its name, objects that lie elsewhere, and flags of the linker."""

    name: str
    objects: Sequence[str]
    flags: Sequence[str]


def search_path() -> str:
    """PATH, after the folder of this Python: ninja may live in a virtual environment alone."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def program() -> str | None:
    return shutil.which("ninja", path=search_path())


def build(
    title: str,
    compiler: Sequence[str],
    units: dict[str, Unit],
    folder: Path,
    library: Library | None = None,
) -> list[str]:
    """Bring the objects, named as their units, and the library in `folder` up to date.

    title: what the files are for, in the log. Returns the paths of the objects.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(rules(compiler, units, library)) + "\n")
    run(title, folder, library is not None)
    return [str(folder / f"{name}.o") for name in units]


def rules(
    compiler: Sequence[str], units: dict[str, Unit], library: Library | None
) -> Iterable[str]:
    yield f"compiler = {words(compiler)}"
    yield "rule compile"
    yield "  command = $compiler -MMD -MF $out.d $flags -c $in -o $out"
    yield "  depfile = $out.d"
    yield "  deps = gcc"
    for name, (source, flags) in units.items():
        yield f"build {path(name)}.o: compile {path(source.resolve())}"
        yield f"  flags = {words(flags)}"
        yield f"  description = {name.removeprefix('csrc/').removeprefix('isa_')}"
    if library is not None:
        objects = [*(f"{name}.o" for name in units), *library.objects]
        yield "rule link"
        yield f"  command = $compiler -shared $in -o $out {words(library.flags)}"
        yield f"build {path(library.name)}: link {' '.join(map(path, objects))}"
        yield "  description = link"


def words(command: Sequence[str]) -> str:
    return shlex.join(command).replace("$", "$$")


def path(name: str | Path) -> str:
    return str(name).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def run(title: str, folder: Path, links: bool) -> None:
    """Run ninja in a folder, with a log on the error stream. Raises CalledProcessError."""
    jobs = os.environ.get("MAX_JOBS")
    command = [program() or "ninja", *(["-j", jobs] if jobs else [])]
    # Paths below the root are relative to ccache, and in which folder it works is nothing to it:
    # another clone finds what this one compiled.
    of_ccache = {"CCACHE_BASEDIR": str(ROOT), "CCACHE_NOHASHDIR": "1"}
    env = of_ccache | os.environ | {"PATH": search_path()}
    if os.environ.get("V") == "1":
        # 2: the stream itself, whatever setuptools or pytest put in the place of sys.stderr
        subprocess.run([*command, "-v"], cwd=folder, env=env, stdout=2, check=True)
        return
    env["NINJA_STATUS"] = f"{STEP} %t "
    log = Log(title, links)
    with subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.take(line)
    log.end()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


class Log:
    """Names of steps as they end, on one line; what compilers say has lines of its own."""

    def __init__(self, title: str, links: bool):
        self.title, self.links = title, links
        self.began, self.started, self.in_line = time.monotonic(), False, False

    def take(self, line: str) -> None:
        """Show a line of ninja's output, or leave it out."""
        if line.startswith(STEP):
            _, steps, name = line.split(maxsplit=2)
            if not self.started:
                self.begin(int(steps) - self.links)
            self.show(f" {name.strip()}")
            self.in_line = True
        elif line.strip() != UP_TO_DATE:
            self.show("\n" * self.in_line + line)
            self.in_line = False

    def begin(self, files: int) -> None:
        verb = f"compiling {files} file{'s' * (files != 1)}" if files else "linking"
        self.show(f"{verb} {self.title}:")
        self.started = self.in_line = True

    def end(self) -> None:
        if self.started:
            seconds = f"{time.monotonic() - self.began:.0f} s\n"
            self.show(f", {seconds}" if self.in_line else f"{self.title}: {seconds}")

    def show(self, text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)
