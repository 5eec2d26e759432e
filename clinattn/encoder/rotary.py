"""Rotary positions (Su et al., arXiv 2104.09864), on the fused q, k, v projection."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(
    positions: Tensor, head_dim: int, base: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of positions * base**(-2i/D), shaped (..., 1, 1, D/2) to meet (..., 3, H, D).

    positions: any shape, integer or real (days, say). Angles are fp32 at least: bf16 cannot
    tell neighbouring positions apart beyond 256.
    """
    table_dtype = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=table_dtype) / head_dim
    angles = positions.to(table_dtype)[..., None, None, None] * base**-exponent
    return angles.cos(), angles.sin()


def _rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(qkv)
    first, second = qkv[..., :2, :, :].chunk(2, dim=-1)
    out_first, out_second = out[..., :2, :, :].chunk(2, dim=-1)
    out_first.copy_(torch.addcmul(first * cos, second, sin, value=-1))
    out_second.copy_(torch.addcmul(second * cos, first, sin))
    out[..., 2, :, :] = qkv[..., 2, :, :]
    return out


class RotateQueryKey(torch.autograd.Function):
    """Turn q and k of a fused projection (..., 3, H, D) by their positions' angles; v stays.

    Written as a Function because the backward pass is the same turn the other way: one pass over
    the fused gradient, where autograd's own would pad and add six slices.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return _rotate(qkv, cos, sin)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, cos, sin = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx, d_qkv: Tensor):
        cos, sin = ctx.saved_tensors
        return RotateQueryKey.apply(d_qkv, cos, -sin), None, None


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """qkv (..., 3, H, D) with q and k turned by the tables of `rotary_tables`."""
    return RotateQueryKey.apply(qkv, cos, sin)
