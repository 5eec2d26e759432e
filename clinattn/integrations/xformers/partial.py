"""Attention to parts of the keys, and what the parts amount to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clinattn.integrations.xformers.attention import attend, check_output_dtype, refuse_dropout
from clinattn.operator.words.checks import check_on, check_tensor


def memory_efficient_attention_partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of some of the keys, to be merged with others; both have gradients.

    Arguments as in memory_efficient_attention, p = 0: dropout of parts is not that of the whole.
    output_dtype: default fp32, for fp64 inputs fp64.
    """
    refuse_dropout(p)
    out, lse = attend(query, key, value, attn_bias, p, scale, output_dtype)
    return (out if output_dtype is not None else out.to(lse.dtype)), lse


def merge_attentions(
    attn_split: Tensor | Sequence[Tensor],
    lse_split: Tensor | Sequence[Tensor],
    write_lse: bool = True,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of all keys from those of disjoint parts; differentiable.

    attn_split: the parts' (B, M, H, K) or (B, M, G, H, K), stacked in front or as a list; lse_split
    their (B, H, M) or (B, G, H, M). write_lse: else lse is None. output_dtype: default that of
    attn_split. A query that sees no key in any part returns 0, and lse = -inf.
    """
    check_output_dtype(output_dtype)
    parts, lses = _stacked("attn_split", attn_split), _stacked("lse_split", lse_split)
    check_on("lse_split", lses, parts.device, "attn_split")
    if parts.dim() not in (5, 6) or lses.shape != parts[..., 0].movedim(2, -1).shape:
        raise ValueError(
            f"attn_split and lse_split: got shapes {tuple(parts.shape)} and {tuple(lses.shape)}, "
            "expected (parts, B, M, [G,] H, K) and (parts, B, [G,] H, M)"
        )
    m = lses.amax(0)
    nothing = m == -float("inf")
    # lse - 0 stays -inf, whose exp is 0, where -inf - -inf would be NaN.
    weights = torch.exp(lses - torch.where(nothing, 0, m).detach())
    total = weights.sum(0)
    weights = weights / torch.where(nothing, 1, total)
    out = (parts.to(lses.dtype) * weights.movedim(-1, 2)[..., None]).sum(0)
    lse = None
    if write_lse:
        lse = torch.where(nothing, 0, m).detach() + torch.where(nothing, 1, total).log()
        lse = torch.where(nothing, -float("inf"), lse)
    return out.to(output_dtype or parts.dtype), lse


def _stacked(name: str, parts: Any) -> Tensor:
    """Floating parts, stacked in front if they are a list."""
    if not isinstance(parts, Tensor):
        if not isinstance(parts, (list, tuple)) or len(parts) == 0:
            raise TypeError(f"{name}: got {type(parts).__name__}, expected tensors, at least one")
        for x in parts:
            check_on(name, x, getattr(parts[0], "device", torch.device("cpu")), "the first part")
            if x.shape != parts[0].shape:
                raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected that of the first")
        parts = torch.stack(tuple(parts))
    check_tensor(name, parts)
    if not parts.is_floating_point() or parts.dtype.itemsize == 1:
        raise TypeError(f"{name}: got {parts.dtype}, expected fp32, fp64, bf16 or fp16")
    return parts
