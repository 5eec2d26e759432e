"""torch.nn's attention and Transformer modules, made to use clinattn where they stand.

A module keeps its identity, parameters, state dict and hooks; its class becomes a subclass of its
own, whose forward computes the same by fused_attention. restore gives the old class back.

- Attention weights (need_weights=True, the default of nn.MultiheadAttention) are not formed by
  clinattn: such a call is torch's own, after one warning per process.
- torch's fused encoder layer, which in eval mode reads parameters past the attention module, is
  not taken, nor is the conversion to nested tensors. As that conversion does, nn.TransformerEncoder
  zeroes padding before its norm in the calls in which torch would have converted; finite values of
  a floating src_key_padding_mask are added, where it would take their keys for padding.
- A query all of whose keys are hidden has attention 0, so out_proj returns its bias; torch returns
  NaN in some of its paths and the bias in others.
- Nested inputs, strided or jagged, are attention over packed sequences, in training too, and causal
  in each sequence with is_causal=True.
- A torch.jit.script of an adapted module fails: restore it first.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clinattn.backends.call import MAX_HEAD_DIM
from clinattn.integrations.outcome import Outcome
from clinattn.integrations.stand_in import StandIn, is_stand_in
from clinattn.integrations.torch.multihead import module_attention


class _Fused(StandIn):
    """Base of the stand-ins for torch's classes, whose names they have.

    Wrapping policies, printed models and reports show the name.
    """


_warned = False


def _warn_of_weights() -> None:
    global _warned
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(
            "clinattn: nn.MultiheadAttention was asked for attention weights (need_weights=True, "
            "its default), which takes torch's pass over all pairs; need_weights=False has none, "
            "and clinattn.explain(model) says what was attended to in O(N)",
            stacklevel=4,
        )


class FusedMultiheadAttention(_Fused, nn.MultiheadAttention):
    """nn.MultiheadAttention by clinattn; see multi_head_attention."""

    replaces = nn.MultiheadAttention

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if need_weights:
            _warn_of_weights()
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        o = module_attention(self, query, key, value, key_padding_mask, attn_mask, is_causal)
        return o, None


class FusedTransformerEncoderLayer(_Fused, nn.TransformerEncoderLayer):
    """nn.TransformerEncoderLayer without torch's fused kernel, which skips its attention module."""

    replaces = nn.TransformerEncoderLayer

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        masks = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), *masks)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, *masks))
        return self.norm2(x + self._ff_block(x))


class FusedTransformerEncoder(_Fused, nn.TransformerEncoder):
    """nn.TransformerEncoder on dense tensors throughout."""

    replaces = nn.TransformerEncoder

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        layers = list(self.layers)
        if src.is_nested or not all(isinstance(x, FusedTransformerEncoderLayer) for x in layers):
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        if is_causal is None:
            is_causal = mask is not None and _is_causal(mask)
        x = src
        for layer in layers:
            x = layer(
                x,
                src_mask=mask,
                is_causal=is_causal,
                src_key_padding_mask=src_key_padding_mask,
            )
        if src_key_padding_mask is not None and mask is None:
            hidden = src_key_padding_mask
            if hidden.dtype != torch.bool:
                hidden = hidden == -float("inf")
            if self._torch_zeroes(src, hidden):
                x = x.masked_fill(hidden[..., None], 0.0)
        return x if self.norm is None else self.norm(x)

    def _torch_zeroes(self, src: Tensor, hidden: Tensor) -> bool:
        """Returns whether torch would have made src nested, which loses what is in the padding."""
        layer = self.layers[0]
        checked = getattr(self, "mask_check", True)
        return (
            torch.backends.mha.get_fastpath_enabled()
            and getattr(self, "use_nested_tensor", False)
            and not layer.training
            and src.dim() == 3
            and not torch.is_autocast_enabled()
            and not (checked and torch.compiler.is_compiling())
            and not (
                torch.is_grad_enabled()
                and (src.requires_grad or any(p.requires_grad for p in layer.parameters()))
            )
            and (not checked or not bool((hidden[:, :-1] & ~hidden[:, 1:]).any()))
        )


def _is_causal(mask: Tensor) -> bool:
    """Returns whether mask is that of generate_square_subsequent_mask, as torch looks for it.

    False under a compiler: the mask itself hides the same, at the cost of reading it.
    """
    if torch.compiler.is_compiling() or mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    if mask.dtype == torch.bool:
        return torch.equal(mask, torch.ones_like(mask).triu(1))
    return torch.equal(
        mask, nn.Transformer.generate_square_subsequent_mask(len(mask), mask.device, mask.dtype)
    )


# A class, its stand-in, and the methods that the stand-in relies on or overrides.
_STAND_INS: tuple[tuple[type[nn.Module], type[_Fused], tuple[str, ...]], ...] = (
    (nn.MultiheadAttention, FusedMultiheadAttention, ("forward",)),
    (
        nn.TransformerEncoderLayer,
        FusedTransformerEncoderLayer,
        ("forward", "_sa_block", "_ff_block"),
    ),
    (nn.TransformerEncoder, FusedTransformerEncoder, ("forward",)),
)
for _base, _fused, _ in _STAND_INS:
    _fused.__name__ = _base.__name__
_REPLACED = tuple(base for base, _, _ in _STAND_INS)
# The replaced classes, and those that do nothing but call them.
_SERVED = (*_REPLACED, nn.TransformerDecoderLayer, nn.TransformerDecoder, nn.Transformer)


@cache
def _fused_class(cls: Any) -> Any:
    for base, fused, _ in _STAND_INS:
        if cls is base:
            return fused
        if issubclass(cls, base):
            return type(cls.__name__, (fused, cls), {"replaces": cls})
    raise TypeError(f"clinattn: {cls.__name__} has no stand-in")


_Fused.stand_in_of = staticmethod(_fused_class)


def _stand_in(module: nn.Module) -> str | None:
    """Changes the class of module, or returns why not."""
    cls: Any = type(module)
    base, _, methods = next(x for x in _STAND_INS if isinstance(module, x[0]))
    for name in methods:
        if getattr(cls, name) is not getattr(base, name):
            return f"{cls.__name__} has a {name} of its own"
        if name in vars(module):
            return f"{name} was replaced on this {cls.__name__}"
    if parametrize.is_parametrized(module):
        return f"{cls.__name__} is parametrized; replace its attention before that"
    if isinstance(module, nn.MultiheadAttention):
        if module.head_dim > MAX_HEAD_DIM:
            return f"head_dim is {module.head_dim}, at most {MAX_HEAD_DIM} is served"
        if not module.out_proj.weight.is_floating_point():
            return f"its weights are {module.out_proj.weight.dtype}, floating ones are served"
    module.__class__ = _fused_class(cls)
    return None


def adapt(module: nn.Module) -> Outcome | None:
    """Make a module of torch.nn, and the attention inside it, use clinattn in place.

    module: nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
    nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer, or of a subclass that keeps their
    forward. Calling it again changes nothing.

    Returns None for any other module; else what became of it, and where it is not replaced which of
    its modules stay torch's and why: such an encoder layer runs past its attention module in eval
    mode without gradients.
    """
    if isinstance(module, torch.jit.ScriptModule):
        name = getattr(module, "original_name", "")
        if name in {cls.__name__ for cls in _SERVED}:
            return Outcome(False, f"{name} was compiled by torch.jit; replace its attention before")
        return None
    if not isinstance(module, _SERVED):
        return None
    left = {}
    child: nn.Module
    for name, child in module.named_modules():
        if isinstance(child, _REPLACED) and not isinstance(child, _Fused):
            reason = _stand_in(child)
            if reason is not None:
                left[name] = reason
    container = not isinstance(module, nn.MultiheadAttention) and "" not in left
    if left:
        reasons = (f"{name}: {reason}" if name else reason for name, reason in left.items())
        return Outcome(False, "; ".join(reasons), container)
    return Outcome(True, "clinattn.fused_attention", container)


def restore(module: nn.Module) -> None:
    """Give module and all inside it the classes that they had before adapt."""
    for child in module.modules():
        if isinstance(child, _Fused):
            if not is_stand_in(child):
                raise ValueError(
                    f"restore: got {type(child).__name__}, which was derived from the replaced "
                    "class, as by torch.nn.utils.parametrize; expected that to be undone first"
                )
            child.__class__ = type(child).replaces
