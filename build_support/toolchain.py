"""The C++ compiler: which one, what it accepts, and ccache before it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def compiler_version() -> str:
    command = [*compiler(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def is_clang() -> bool:
    return "clang" in compiler_version()


def accepts(flags: list[str]) -> bool:
    """Returns whether the compiler knows these flags: an older one may lack AMX."""
    return complaint("", [*flags, "-fsyntax-only"]) is None


def complaint(program: str, flags: list[str]) -> str | None:
    """The compiler's message for a program that it refuses; None for one that it compiles."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler(), *flags, "-x", "c++", "-", "-o", str(Path(folder) / "program")]
        try:
            done = subprocess.run(command, input=program, capture_output=True, text=True)
        except OSError as error:
            return str(error)
    return None if done.returncode == 0 else done.stderr.strip() or f"exit {done.returncode}"


def cached_compiler() -> list[str]:
    """The compiler behind ccache where that is on PATH and works, unless CLINATTN_CCACHE=0."""
    command = compiler()
    found = shutil.which(command[0])
    # ccache, sccache, or a link of the compiler's name to one: twice is an error.
    behind_one = found is not None and "ccache" in Path(found).resolve().name
    if os.environ.get("CLINATTN_CCACHE") == "0" or behind_one or shutil.which("ccache") is None:
        return command
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "empty.cpp").touch()
        # A cache that cannot be written fails every compilation.
        trial = ["ccache", *command, "-c", "empty.cpp", "-o", "empty.o"]
        done = subprocess.run(trial, cwd=folder, capture_output=True, check=False)
    return command if done.returncode else ["ccache", *command]
