"""flash-attn's torch.autograd.Functions: its functions with every argument by position.

The arguments are those of the function, all of them, then is_grad_enabled: without it, and outside
of it under torch.no_grad(), the result has no gradient. Gradients are those of the function; the
classes are no torch.autograd.Functions here, and have apply alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from clinattn.integrations.flash_attn.functions import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from clinattn.operator.words.scalars import as_flag


class _ByPosition:
    function: ClassVar[Callable[..., Any]]
    names: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        cls.names = (*inspect.signature(cls.function).parameters, "is_grad_enabled")

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """The function's results. Raises TypeError unless all arguments are given."""
        if len(args) != len(cls.names):
            raise TypeError(
                f"{cls.__name__}.apply: got {len(args)} arguments, expected the {len(cls.names)} "
                f"{', '.join(cls.names)}"
            )
        *given, is_grad_enabled = args
        is_grad_enabled = as_flag("is_grad_enabled", is_grad_enabled)
        with torch.set_grad_enabled(is_grad_enabled and torch.is_grad_enabled()):
            return cls.function(*given)


class FlashAttnFunc(_ByPosition):
    function = staticmethod(flash_attn_func)


class FlashAttnKVPackedFunc(_ByPosition):
    function = staticmethod(flash_attn_kvpacked_func)


class FlashAttnQKVPackedFunc(_ByPosition):
    function = staticmethod(flash_attn_qkvpacked_func)


class FlashAttnVarlenFunc(_ByPosition):
    function = staticmethod(flash_attn_varlen_func)


class FlashAttnVarlenKVPackedFunc(_ByPosition):
    function = staticmethod(flash_attn_varlen_kvpacked_func)


class FlashAttnVarlenQKVPackedFunc(_ByPosition):
    function = staticmethod(flash_attn_varlen_qkvpacked_func)
