"""`import flash_attn` served by clinattn, for code that has the name in it.

Packages also ask importlib.metadata which version of the distribution flash-attn is there. That
stays unanswered, as none is: transformers then finds no flash_attention_2, and is served through
clinattn.integrations.transformers instead.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType

NAME = "flash_attn"
HERE = "clinattn.integrations.flash_attn"
SUBMODULES = ("bert_padding", "flash_attn_interface")

_replaced: dict[str, ModuleType] | None = None  # None while not installed


def install(*, force: bool = False) -> Callable[[], None]:
    """Put flash_attn, flash_attn.flash_attn_interface and flash_attn.bert_padding into sys.modules.

    force: also where the real package is installed; modules that imported from it before keep what
    they have. Other submodules of flash_attn cannot be imported while this lasts.

    Returns uninstall. Installing twice is installing once. Raises RuntimeError where the real
    package is there and force is not given.
    """
    global _replaced
    if _replaced is not None:
        return uninstall
    if not force and _is_present():
        raise RuntimeError(
            f"{NAME}: the package is installed, so nothing was replaced; "
            "install(force=True) puts clinattn in its place"
        )
    _replaced = _taken_out()
    package = ModuleType(NAME, "flash-attn's interface, served by clinattn.")
    # A package without a folder: submodules are those below, and no others are found.
    package.__spec__ = ModuleSpec(NAME, loader=None, origin=HERE, is_package=True)
    package.__path__ = []
    ours = importlib.import_module(HERE)
    for name in ("__version__", *ours.__all__):
        if name not in ("install", "uninstall"):
            setattr(package, name, getattr(ours, name))
    sys.modules[NAME] = package
    for name in SUBMODULES:
        module = importlib.import_module(f"{HERE}.{name}")
        setattr(package, name, module)
        sys.modules[f"{NAME}.{name}"] = module
    return uninstall


def uninstall() -> None:
    """Leave sys.modules as it was before install()."""
    global _replaced
    if _replaced is not None:
        _taken_out()
        sys.modules.update(_replaced)
        _replaced = None


def _is_present() -> bool:
    if NAME in sys.modules:
        return True
    return importlib.util.find_spec(NAME) is not None


def _taken_out() -> dict[str, ModuleType]:
    """Removes the package's modules from sys.modules, and returns them by name."""
    names = [x for x in sys.modules if x == NAME or x.startswith(f"{NAME}.")]
    return {name: sys.modules.pop(name) for name in names}
