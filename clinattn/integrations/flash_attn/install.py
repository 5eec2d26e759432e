"""`import flash_attn` served by clinattn, for code that has the name in it.

Packages also ask importlib.metadata which version of the distribution flash-attn is there. That
stays unanswered, as none is: transformers then finds no flash_attention_2, and is served through
clinattn.integrations.transformers instead.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from clinattn.integrations.served_name import ServedName

HERE = "clinattn.integrations.flash_attn"
SUBMODULES = {name: f"{HERE}.{name}" for name in ("bert_padding", "flash_attn_interface")}


def _names(ours: ModuleType) -> set[str]:
    return {"__version__", *ours.__all__} - {"install", "uninstall"}


_served = ServedName("flash_attn", HERE, _names, SUBMODULES)


def install(*, force: bool = False) -> Callable[[], None]:
    """Put flash_attn, flash_attn.flash_attn_interface and flash_attn.bert_padding into sys.modules.

    force: also where the real package is installed; modules that imported from it before keep what
    they have. Other submodules of flash_attn cannot be imported while this lasts.

    Returns uninstall. Installing twice is installing once. Raises RuntimeError where the real
    package is there and force is not given.
    """
    _served.serve(force)
    return uninstall


def uninstall() -> None:
    """Leave sys.modules as it was before install()."""
    _served.give_back()
