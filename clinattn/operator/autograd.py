"""torch.autograd.Function as the package uses it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import (  # looked up once: every call asks them
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch._C._functorch import unwrap_if_dead
from torch.compiler import is_compiling


def op_is_watched(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Returns whether a call must go through torch's dispatcher.

    It must under a compiler, a trace, a functorch transform or a dispatch mode, and with tensors of
    a subclass or on meta.
    """
    return (
        is_compiling()
        or _get_tracing_state() is not None
        or not (type(q) is type(k) is type(v) is Tensor)
        or q.is_meta
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack() > 0
    )


class Function(torch.autograd.Function):
    """An autograd Function with setup_context, for reverse mode and vmap; `run` applies it."""

    generate_vmap_rule = True

    @classmethod
    def run(cls, *args: Any) -> Any:
        """Applies the Function; every argument is given, in order.

        torch's own `apply` spends 40 us more on inspecting the signature. Raises
        NotImplementedError in forward mode. A method `jvp` could raise it, too, but torch.compile
        refuses a Function that has one.
        """
        try:
            if torch._C._are_functorch_transforms_active():
                # A subclass may name a call of its own `apply`; torch's stands behind this class.
                return super().apply(*args)
            apply = super(torch.autograd.Function, cls).apply  # type: ignore[misc]
            # what torch's unwrap_dead_wrappers does, at half its time for arguments left out
            return apply(
                *[unwrap_if_dead(x) if x is not None and isinstance(x, Tensor) else x for x in args]
            )
        except NotImplementedError as error:
            if "jvp" not in str(error):
                raise
            raise NotImplementedError(
                "clinattn: no derivatives in forward mode (jvp, jacfwd, hessian); reverse mode has "
                "them all: vjp, jacrev, and jacrev(jacrev(f)) for the Hessian"
            ) from error
