"""Loads the compiled library, unless it was built for other arguments than the ops have.

The library registers clinattn::cpu_forward and cpu_backward with torch, and the CUDA kernels where
it was built with them.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from clinattn.backends.call import Arguments, types_of

NAME = "clinattn._C"
LIBRARY = "libclinattn.so"
# C++ types of the ops' arguments, as csrc/call.h has them
C_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "OptionalTensor",
    "float": "double",
    "int": "int64_t",
    "SymInt": "int64_t",
    "bool": "bool",
}


def load() -> tuple[Any | None, str | None]:
    """Returns the module clinattn._C over the library, or None and why it cannot be used."""
    try:
        if built_from_another_version():
            return None, f"the compiled module {NAME} was built from another version"
        return importlib.import_module(NAME), None
    except Exception as error:  # absent or broken: any error means "not here"
        return None, f"the compiled module {NAME} does not load ({error})"


def built_from_another_version() -> bool:
    """Returns whether the library's kernels expect other arguments than Arguments has.

    Such kernels would take one argument for another. The file of the library holds the list of
    arguments as text, so the list is compared before the library is loaded.
    """
    spec = importlib.util.find_spec(NAME)
    if spec is None or spec.origin is None:
        return False
    if not spec.origin.endswith(".py"):  # an extension module of an earlier version
        return True
    types = types_of(Arguments).items()
    words = "".join(f"{C_TYPES[annotation]} {name}, " for name, annotation in types)
    library = Path(spec.origin).with_name(LIBRARY).read_bytes()
    return f"clinattn arguments: {words}\0".encode() not in library


_module, extension_error = load()
build_info: dict[str, str] = {} if _module is None else _module.build_info()


def compiled_module() -> Any | None:
    """Returns clinattn._C, or None where it cannot be used."""
    return None if extension_error is not None else _module
