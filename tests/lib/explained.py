"""Explanations of small models by whole N x N matrices, with autograd.

A Stack computes with clinattn or, under `dense(visible)`, by plain torch that keeps each P.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clinattn import fused_attention, fused_attention_varlen

WIDTH, HEADS, DEPTH = 12, 4, 3


class Attention(nn.Module):
    """Self-attention of (B, N, WIDTH), or packed (T, WIDTH) with cu_seqlens among the words."""

    def __init__(self, kv_heads: int):
        super().__init__()
        self.sizes = [HEADS, kv_heads, kv_heads]
        self.qkv = nn.Linear(WIDTH, 3 * sum(self.sizes))
        self.out = nn.Linear(3 * HEADS, WIDTH)
        self.dense: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def forward(self, x: Tensor, **words: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, 3)).split(self.sizes, -2)
        if "cu_seqlens" in words:
            o = fused_attention_varlen(q, k, v, words.pop("cu_seqlens"), enable_gqa=True, **words)
        else:
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
            attend = fused_attention if self.dense is None else self.dense
            o = attend(q, k, v, **({} if self.dense else {"enable_gqa": True, **words}))
            o = o.transpose(1, 2)
        return x + self.out(o.flatten(-2)).tanh()


class Stack(nn.Module):
    """Layers of attention, each with a residual; returns (..., WIDTH)."""

    def __init__(self, kv_heads: int = HEADS, depth: int = DEPTH):
        super().__init__()
        self.blocks = nn.ModuleList(Attention(kv_heads) for _ in range(depth))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.6)  # weights of attention far from uniform
        self.double().eval()

    def forward(self, x: Tensor, **words: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, **words)
        return x


class Matrices(list[Tensor]):
    """P (B, H, N, N) of each layer, with gradients once the target was differentiated."""

    def received(self, weights: Tensor) -> Tensor:
        return torch.stack([(weights[:, None, :, None] * p.detach()).sum(-2) for p in self])

    def entropy(self) -> Tensor:
        return torch.stack([torch.special.entr(p.detach()).sum(-1) for p in self])

    def rollout(self, r: Tensor, residual: float = 0.5, heads: Any = slice(None)) -> Tensor:
        """The definition: the product of the layers' mixed matrices, N x N, then its rows r."""
        every = torch.eye(r.shape[-1], dtype=r.dtype).expand(len(r), -1, -1)
        for p in self:
            mixed = residual * torch.eye(r.shape[-1], dtype=r.dtype)
            every = (mixed + (1 - residual) * p.detach()[:, heads].mean(1)) @ every
        return (r[:, None] @ every)[:, 0]

    def relevance(self, r: Tensor, grads: list[Tensor]) -> Tensor:
        every = torch.eye(r.shape[-1], dtype=r.dtype).expand(len(r), -1, -1)
        for p, dp in zip(self, grads, strict=True):
            every = every + (p.detach() * dp).clamp(min=0).mean(1) @ every
        return (r[:, None] @ every)[:, 0]


@contextmanager
def dense(
    model: Stack, visible: Tensor, scores: Callable[[Tensor], Tensor] = lambda s: s
) -> Iterator[Matrices]:
    """Attention by plain torch within; visible: (B or 1, 1, N, N). scores: what changes them."""
    kept = Matrices()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
        s = scores(q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
        p = s.softmax(-1).nan_to_num(0)  # a query that sees nothing
        kept.append(p)
        return p @ v

    for block in model.blocks:
        block.dense = attend
    try:
        yield kept
    finally:
        for block in model.blocks:
            block.dense = None


def assert_equal(name: str, actual: Tensor, truth: Tensor, terms: int) -> None:
    """Equal but for the rounding of sums of so many terms, one after the other, in the dtype.

    Each rounds by half a unit of the largest result, in either computation.
    """
    assert actual.shape == truth.shape, f"{name}: {tuple(actual.shape)}, {tuple(truth.shape)}"
    actual, truth = actual.detach(), truth.detach()
    size = max(1.0, float(truth.abs().max()))
    bound = terms * torch.finfo(actual.dtype).eps * size
    error = float((actual.double() - truth.double()).abs().max())
    assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"
