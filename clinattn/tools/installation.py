"""The origin of the compiled kernels, what builds them, and whether this torch was tested."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, distribution

import torch

from clinattn.backends.compiled import compiled_module, extension_error

COMPILERS = ("c++", "g++", "clang++")
NEWEST_TORCH = (2, 15)  # with which the fast tests have passed: docs/compatibility.md


def kernels() -> str:
    """Returns a line on the origin of the compiled kernels, or on why there are none."""
    if compiled_module() is None:
        return f"missing: {extension_error}"
    try:
        installed = distribution("clinattn")
    except PackageNotFoundError:
        return "built in the source tree"
    source = json.loads(installed.read_text("direct_url.json") or "{}")
    if source.get("dir_info", {}).get("editable"):
        return "built in the source tree"
    lines = (installed.read_text("WHEEL") or "").splitlines()
    tags = [line.removeprefix("Tag: ") for line in lines if line.startswith("Tag: ")]
    return f"from a wheel, {', '.join(tags)}"


def compiler() -> str | None:
    """First line of the C++ compiler's --version; None without one."""
    for name in COMPILERS:
        path = shutil.which(name)
        if path is not None:
            shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
            return (shown.stdout.splitlines() or [path])[0]
    return None


def to_build() -> str:
    """Returns what a user does for compiled kernels."""
    if compiler() is None:
        return "install a C++ compiler (Debian: apt install g++), then: make ext"
    return "build the CPU kernels: make ext"


def untested_torch() -> str | None:
    """Returns a hint for a torch newer than the releases that were tested, else None."""
    numbers = torch.__version__.split(".")
    if (int(numbers[0]), int(numbers[1])) <= NEWEST_TORCH:
        return None
    newest = ".".join(map(str, NEWEST_TORCH))
    return f"torch {torch.__version__} is newer than what was tested, which ends with {newest}"
