"""The origin of the compiled kernels, and whether this release of torch was tested with them."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution

import torch

from clinattn.backends.compiled import compiled_module, extension_error

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


def untested_torch() -> str | None:
    """Returns a hint for a torch newer than the releases that were tested, else None."""
    numbers = torch.__version__.split(".")
    if (int(numbers[0]), int(numbers[1])) <= NEWEST_TORCH:
        return None
    newest = ".".join(map(str, NEWEST_TORCH))
    return f"torch {torch.__version__} is newer than what was tested, which ends with {newest}"
