"""`import xformers.ops` served by clinattn, for code that has the name in it.

Packages also ask importlib.metadata which version of the distribution xformers is there. That stays
unanswered, as none is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from clinattn.integrations.served_name import ServedName

HERE = "clinattn.integrations.xformers"
SUBMODULES = {
    "ops": f"{HERE}.ops",
    "ops.fmha": f"{HERE}.fmha",
    "ops.fmha.attn_bias": f"{HERE}.attn_bias",
}


def _names(ours: ModuleType) -> tuple[str, ...]:
    return ("__version__",)


_served = ServedName("xformers", HERE, _names, SUBMODULES)


def install(*, force: bool = False) -> Callable[[], None]:
    """Put xformers, xformers.ops, .ops.fmha and .ops.fmha.attn_bias into sys.modules.

    They have what belongs to attention. Other parts of xformers (SwiGLU, RMSNorm, its components)
    cannot be imported while this lasts.
    force: also where the real package is installed; modules that imported from it before keep what
    they have.

    Returns uninstall. Installing twice is installing once. Raises RuntimeError where the real
    package is there and force is not given.
    """
    _served.serve(force)
    return uninstall


def uninstall() -> None:
    """Leave sys.modules as it was before install()."""
    _served.give_back()
