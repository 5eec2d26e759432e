"""Loads the compiled module clinattn._C, where it was built for the torch that is running.

The module registers clinattn::cpu_forward and cpu_backward with torch, and the CUDA kernels where
it was built with them.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import torch

NAME = "clinattn._C"


def load() -> tuple[Any | None, str | None]:
    """The module, whose import registers the kernels with torch, or None and the reason why not."""
    try:
        if reason := built_for_another_torch():
            return None, reason
        return importlib.import_module(NAME), None
    except Exception as error:  # absent or broken: any error means "not here"
        return None, f"the compiled module {NAME} does not load ({error})"


def built_for_another_torch() -> str | None:
    """The reason not to load the module's file; None where nothing speaks against it.

    torch keeps no binary interface from one release to the next: a module for another one may fail
    to load, crash, or compute something else. The file names its torch, so it is read for that.
    """
    spec = importlib.util.find_spec(NAME)
    if spec is None or spec.origin is None:
        return None
    found = re.search(rb"clinattn built for torch (\d+\.\d+\.\d+)", Path(spec.origin).read_bytes())
    running = re.match(r"\d+\.\d+\.\d+", torch.__version__)
    if found is None or running is None or found[1].decode() == running[0]:
        return None
    return (
        f"the compiled module {NAME} was built for torch {found[1].decode()}, "
        f"and torch {torch.__version__} is running"
    )


_module, extension_error = load()
build_info: dict[str, str] = {} if _module is None else _module.build_info()


def refuse_extension(reason: str) -> None:
    """Note that the compiled module cannot serve although it loaded."""
    global extension_error
    extension_error = reason


def compiled_module() -> Any | None:
    """clinattn._C, or None where it cannot serve."""
    return None if extension_error is not None else importlib.import_module(NAME)
