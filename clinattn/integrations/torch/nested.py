"""Nested inputs of nn.MultiheadAttention and F.scaled_dot_product_attention.

nn.MultiheadAttention refuses them outside its fused path, which is off where clinattn is under
torch's attention: for as long, the class has a forward that gives nested inputs to clinattn, and
all others to its own. Jagged tensors answer F.scaled_dot_product_attention by a function of their
own, above the dispatcher, so that one is replaced too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nested._internal import ops

from clinattn.backends.call import MAX_HEAD_DIM
from clinattn.integrations.torch.multihead import module_attention
from clinattn.operator.jagged import check_jagged
from clinattn.operator.words.checks import SERVED_DTYPES

_THEIRS: Any = nn.MultiheadAttention.forward


class Reach(NamedTuple):
    """here: whether a call now, in this thread, is clinattn's. fastpath: torch's own setting."""

    here: Callable[[], bool]
    fastpath: Callable[[], bool]


_reaches: dict[Any, Reach] = {}


def serve(holder: Any, reach: Reach) -> None:
    """Nested inputs are served within reach, until stop(holder)."""
    _reaches[holder] = reach
    nn.MultiheadAttention.forward = _forward  # type: ignore[method-assign]


def stop(holder: Any) -> None:
    _reaches.pop(holder, None)
    if not _reaches:
        nn.MultiheadAttention.forward = _THEIRS  # type: ignore[method-assign]


def mismatch(
    query: Any, key: Any, value: Any, attn_mask: Tensor | None, enable_gqa: bool
) -> str | None:
    """Reason why fused_attention refuses jagged tensors, whatever their values, or None."""
    if attn_mask is not None:
        return "attn_mask was given with jagged tensors"
    try:
        check_jagged(query, key, value)
    except (TypeError, ValueError):
        return "query, key and value are not jagged alike"
    heads, kv_heads = query.shape[-3], key.shape[-3]
    if value.shape[-3] != kv_heads or not (enable_gqa or heads == kv_heads):
        return "query, key and value differ in heads"
    return None


def replace_jagged_attention(attention: Callable[..., Tensor]) -> Callable[[], None]:
    """Jagged tensors answer F.scaled_dot_product_attention by attention(theirs, ...).

    Returns what undoes it.
    """
    theirs = ops.jagged_scaled_dot_product_attention

    def ours(*args: Any, **kwargs: Any) -> Tensor:
        return attention(theirs, *args, **kwargs)

    def undo() -> None:
        ops.jagged_scaled_dot_product_attention = theirs

    ops.jagged_scaled_dot_product_attention = ours
    return undo


@wraps(_THEIRS)
def _forward(
    self: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    args = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights)
    if not (query.is_nested or key.is_nested or value.is_nested):
        return _THEIRS(self, *args, is_causal)
    reach = next((x for x in tuple(_reaches.values()) if x.here()), None)
    if reach is None or (need_weights and query.layout == torch.jagged):  # for torch to refuse
        return _THEIRS(self, *args, is_causal)
    served = self.head_dim <= MAX_HEAD_DIM and query.dtype in SERVED_DTYPES
    if need_weights or not (served and torch.backends.cuda.flash_sdp_enabled()):
        with _torchs_own(reach):
            return _THEIRS(self, *args, is_causal)
    return module_attention(self, query, key, value, key_padding_mask, attn_mask, is_causal), None


@contextmanager
def _torchs_own(reach: Reach) -> Iterator[None]:
    """torch's fused path, as it is without clinattn."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(reach.fastpath())
    try:
        with torch._C.DisableTorchFunction():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
