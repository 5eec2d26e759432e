"""memory_efficient_attention: xformers' layouts and biases, turned into fused_attention's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clinattn.integrations.xformers.bands import (
    BLOCKS,
    DENSE,
    PADDED_BLOCKS,
    band_of,
    is_plain_tensor,
)
from clinattn.integrations.xformers.layouts import HeadLayout, layout_of
from clinattn.operator.attention import fused_attention, fused_attention_varlen
from clinattn.operator.packing import cu_seqlens_from_lengths
from clinattn.operator.words.scalars import as_float


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
) -> Tensor:
    """Exact softmax attention in O(N) memory, with xformers' arguments.

    query: (B, Mq, H, K); key: (B, Mk, H, K); value: (B, Mk, H, Kv). Or without the heads, or
    grouped, (B, M, G, H, K), where key and value may have been expanded from H = 1: groups of
    query heads then share them. fp32, bf16, fp16, on the CPU fp64; K and Kv from 1 to 256.
    attn_bias: a tensor added to the scores, of as many dimensions as query, (B, [G, H,] Mq, Mk) or
    1 in place of any size; or one of the biases of this package or xformers. Tensors may need a
    gradient.
    p: probability to drop a pair. scale: default K ** -0.5. op: xformers' choice of kernels; here
    the device and dtype choose, and it is not read.

    Returns (B, Mq, H, Kv), in the layout of query. A query that sees no key returns 0.
    Raises NotImplementedError for other biases, ValueError and TypeError for wrong arguments.
    """
    return _attend(query, key, value, attn_bias, p, scale)[0]


@torch.no_grad()
def memory_efficient_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """memory_efficient_attention without gradients; output_dtype: default that of query."""
    return _attend(query, key, value, attn_bias, p, scale)[0].to(output_dtype or query.dtype)


@torch.no_grad()
def memory_efficient_attention_forward_requires_grad(
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
    """(out, lse) for a backward pass of one's own: neither has a gradient here.

    lse: natural logarithm, fp32, (B, H, Mq), grouped (B, G, H, Mq); with block-diagonal biases
    (1, H, Mq). -inf for a query that sees no key.
    """
    out, lse = _attend(query, key, value, attn_bias, p, scale)
    return out.to(output_dtype or query.dtype), lse


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, p: float, scale: float | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) in the layout of query."""
    layout = layout_of(query, key, value)
    p = as_float("p", p)
    if not 0 <= p <= 1:
        raise ValueError(f"p: got {p}, expected a probability from 0 to 1")
    q, k, v = layout.heads(query, key, value)
    words = {
        "dropout_p": p,
        "scale": query.shape[-1] ** -0.5 if scale is None else scale,
        "enable_gqa": True,
        "return_lse": True,
    }
    q, k, v = (_widened(x, max(q.shape[-1], v.shape[-1])) for x in (q, k, v))
    name = type(attn_bias).__name__
    if name in BLOCKS or name in PADDED_BLOCKS:
        o, lse = _attend_blocks(q, k, v, attn_bias, words)
    else:
        mask, words = _dense_words(attn_bias, layout, words)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o, lse = fused_attention(q, k, v, mask, **words)
        o = o.transpose(1, 2)
    return layout.results(o[..., : value.shape[-1]].contiguous(), lse)


def _dense_words(
    bias: Any, layout: HeadLayout, words: dict[str, Any]
) -> tuple[Tensor | None, dict[str, Any]]:
    """(mask, words) of a bias without blocks."""
    if bias is None:
        return None, words
    name = type(bias).__name__
    if name not in DENSE and is_plain_tensor(bias):
        return layout.bias(bias), words
    words = {**words, **band_of(bias).keywords()}
    if name == "LowerTriangularMaskWithTensorBias":
        # In xformers a tensor of a class of its own, with the plain tensor inside.
        tensor = getattr(bias, "_subtensor", None)
        return layout.bias(bias._bias if tensor is None else tensor), words
    return None, words


def _attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, words: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(o, lse) of q, k, v (1, M, H, K) whose sequences lie one after the other."""
    queries, keys = bias.q_seqinfo, bias.k_seqinfo
    for name, x, info in (("query", q, queries), ("key", k, keys)):
        if x.shape[:2] != (1, info.seqstart_py[-1]):
            raise ValueError(
                f"{name}: got batch size {x.shape[0]} and {x.shape[1]} tokens, expected 1 and the "
                f"{info.seqstart_py[-1]} of attn_bias"
            )
    q, k, v = q[0], k[0], v[0]
    cu_seqlens_q = queries.seqstart.to(q.device)
    cu_seqlens_k = keys.seqstart.to(q.device)
    if type(bias).__name__ in PADDED_BLOCKS:
        k, v, cu_seqlens_k = _without_padding(k, v, keys)
    o, lse = fused_attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max(queries.max_seqlen, 0), max(keys.max_seqlen, 0),
        **words, **band_of(bias).keywords(),
    )  # fmt: skip
    return o[None], lse[None]


def _without_padding(k: Tensor, v: Tensor, info: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(k, v, cu_seqlens) of the keys that count: blocks must have no gaps between them."""
    lengths = info.seqlen.to(k.device)
    place = torch.arange(info.padding, device=k.device)
    indices = (place < lengths[:, None]).flatten().nonzero().squeeze(1)
    return k[indices], v[indices], cu_seqlens_from_lengths(lengths)


def _widened(x: Tensor, width: int) -> Tensor:
    """x with zeros up to a last size of width: they change neither scores nor other features."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
