"""A call of memory_efficient_attention in the layout and words of the operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from clinattn.backends.call import Arguments
from clinattn.integrations.xformers.bands import (
    BLOCKS,
    BY_BLOCK,
    DENSE,
    Band,
    band_of,
    is_plain_tensor,
)
from clinattn.integrations.xformers.layouts import HeadLayout, layout_of
from clinattn.integrations.xformers.places import key_places
from clinattn.operator.attention import fused_attention, fused_attention_varlen
from clinattn.operator.visibility import fold_window, prepare_mask
from clinattn.operator.words import checks


class Sequences(NamedTuple):
    """Bounds of the sequences of packed tokens, in the words of fused_attention_varlen."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class Problem(NamedTuple):
    """q, k, v: (B, heads, M, K), or with sequences (T, heads, K); v may have another width.

    mask: added to the scores, (B, heads, Mq, Mk) or 1 in place of any size.
    """

    layout: HeadLayout
    q: Tensor
    k: Tensor
    v: Tensor
    scale: Any
    band: Band = Band()
    mask: Tensor | None = None
    sequences: Sequences | None = None

    def solved(self, p: float) -> tuple[Tensor, Tensor]:
        """(out, lse) in the layout of the call."""
        words = {
            "dropout_p": p, "scale": self.scale, "enable_gqa": True, "return_lse": True,
            **self.band.keywords(),
        }  # fmt: skip
        q, k, v = self.q, self.k, self.v
        if self.sequences is not None:
            o, lse = fused_attention_varlen(q, k, v, **self.sequences._asdict(), **words)
            o, lse = o[None], lse[None]
        else:
            o, lse = fused_attention(q, k, v, self.mask, **words)
            o = o.transpose(1, 2)
        return self.layout.results(o.contiguous(), lse)

    def cotangent(self, x: Tensor) -> Tensor:
        """A tensor in the layout of out, in that of q."""
        (x,) = self.layout.heads(x)
        return x[0] if self.sequences is not None else x.transpose(1, 2)

    def checked_lse(self, lse: Any) -> Tensor:
        """An lse in the layout of the call, in that of q."""
        device, dtype = self.q.device, self.q.dtype
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        checks.check_on("lse", lse, device)
        q = self.q if self.sequences is None else self.q.transpose(0, 1)[None]
        heads = self.layout.heads_of_query or (1,)
        shape = (q.shape[0], *heads, q.shape[2])
        if lse.dtype != dtype or tuple(lse.shape) != shape:
            raise ValueError(f"lse: got {lse.dtype} {tuple(lse.shape)}, expected {dtype} {shape}")
        lse = lse.reshape(q.shape[:3])
        return lse if self.sequences is None else lse[0]

    def arguments(self) -> Arguments:
        """The checked call without dropout, as the ops take it."""
        q, k, v = (x.detach() for x in (self.q, self.k, self.v))
        left, right = fold_window(checks.check_window((self.band.left, self.band.right)), False)
        call = Arguments(
            q, k, v,
            scale=checks.check_scale(self.scale, q.shape[-1], q.dtype),
            window_left=left,
            window_right=right,
            bottom_right=self.band.bottom_right,
        )  # fmt: skip
        if self.sequences is not None:
            checks.check_packed(q, k, v, True)
            cu_q, cu_k, longest_q, longest_k = self.sequences
            longest_q = checks.check_cu_seqlens("q", cu_q, longest_q, q.shape[0], q.device)
            longest_k = checks.check_cu_seqlens("k", cu_k, longest_k, k.shape[0], q.device)
            return call._replace(**Sequences(cu_q, cu_k, longest_q, longest_k)._asdict())
        checks.check_dense(q, k, v, True)
        batch, heads, n_queries, _ = q.shape
        call = call._replace(max_seqlen_q=n_queries, max_seqlen_k=k.shape[2])
        if self.mask is None:
            return call
        checks.check_mask(self.mask, (batch, heads, n_queries, k.shape[2]), q.device)
        mask, kv_start, kv_end = prepare_mask(
            self.mask.detach(), batch, k.shape[2], q.dtype, keep_end=self.band.bottom_right
        )
        return call._replace(mask=mask, kv_start=kv_start, kv_end=kv_end)


def problem_of(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, scale: float | None
) -> Problem:
    """Checks the tensors and the bias, and lays them out; differentiable."""
    layout = layout_of(query, key, value)
    q, k, v = layout.heads(query, key, value)
    problem = Problem(layout, q, k, v, scale)
    name = type(attn_bias).__name__
    if name in BY_BLOCK:
        return _in_blocks(problem, attn_bias)
    problem = problem._replace(**{x: getattr(problem, x).transpose(1, 2) for x in "qkv"})
    if attn_bias is None:
        return problem
    if name not in DENSE and is_plain_tensor(attn_bias):
        return problem._replace(mask=layout.bias(attn_bias))
    problem = problem._replace(band=band_of(attn_bias))
    if name == "LowerTriangularMaskWithTensorBias":
        # In xformers a tensor of a class of its own, with the plain tensor inside.
        tensor = getattr(attn_bias, "_subtensor", None)
        return problem._replace(mask=layout.bias(attn_bias._bias if tensor is None else tensor))
    return problem


def _in_blocks(problem: Problem, bias: Any) -> Problem:
    """The problem with its sequences: of q, k, v (1, M, heads, K), those keys that count."""
    q, k, v = problem.q, problem.k, problem.v
    queries = bias.q_seqinfo
    _check_tokens("query", q, queries.seqstart_py[-1])
    _check_tokens("key", k, None)
    cu_seqlens_q, longest_q = queries.seqstart.to(q.device), max(queries.max_seqlen, 0)
    q, k, v = q[0], k[0], v[0]
    if type(bias).__name__ in BLOCKS:
        keys = bias.k_seqinfo
        _check_tokens("key", problem.k, keys.seqstart_py[-1])
        cu_seqlens_k, longest_k = keys.seqstart.to(q.device), max(keys.max_seqlen, 0)
    else:
        places = key_places(bias, k.shape[0], k.device)
        k, v = k[places.indices], v[places.indices]
        cu_seqlens_k, longest_k = places.cu_seqlens, max(places.lengths, default=0)
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, longest_q, longest_k)
    return problem._replace(q=q, k=k, v=v, band=band_of(bias), sequences=sequences)


def _check_tokens(name: str, x: Tensor, tokens: int | None) -> None:
    if x.shape[0] != 1 or tokens not in (None, x.shape[1]):
        expected = "1" if tokens is None else f"1 and the {tokens} of attn_bias"
        raise ValueError(
            f"{name}: got batch size {x.shape[0]} and {x.shape[1]} tokens, expected {expected}"
        )
