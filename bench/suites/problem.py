"""An attention problem, the ways to solve it, and the check of ours against fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from clinattn import fused_attention, fused_attention_varlen
from clinattn.workloads import sample_lengths

# FLOP of a visible pair, for each element of a head
FLOPS = {"forward": 4, "backward": 10, "forward_backward": 14}


@dataclass(frozen=True)
class AttentionCase:
    """lengths: one for each sequence; unequal ones are padded for SDPA.

    window: keys seen on each side of a query. kv_heads: as many as heads where None.
    """

    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    window: int | None = None
    is_causal: bool = False
    kv_heads: int | None = None

    @property
    def ragged(self) -> bool:
        return len(set(self.lengths)) > 1

    def pairs(self) -> int:
        """Visible (query, key) pairs of one head."""
        total = 0
        for n in self.lengths:
            left = n - 1 if self.window is None else min(self.window, n - 1)
            right = 0 if self.is_causal else left
            total += n * (left + right + 1) - (left * (left + 1) + right * (right + 1)) // 2
        return total

    def flops(self, passes: str) -> int:
        return FLOPS[passes] * self.pairs() * self.heads * self.head_dim

    def with_heads(self, heads: int) -> AttentionCase:
        """Returns the case with `heads` query heads, or with one group where a group is larger."""
        if self.kv_heads is None:
            return replace(self, heads=min(heads, self.heads))
        group = self.heads // self.kv_heads
        kv_heads = max(1, heads // group)
        return replace(self, heads=group * kv_heads, kv_heads=kv_heads)


def drawn(profile: str, count: int, max_tokens: int) -> tuple[int, ...]:
    return tuple(sample_lengths(profile, count, max_tokens).tolist())


def inputs(case: AttentionCase, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v as strided views (T, H, D) of one projection, as an encoder has them."""
    generator = torch.Generator().manual_seed(0)
    heads = (case.heads, *[case.kv_heads or case.heads] * 2)
    shape = (sum(case.lengths), sum(heads), case.head_dim)
    return list(torch.randn(shape, generator=generator).to(device, dtype).split(heads, 1))


def dense(x: Tensor, case: AttentionCase) -> Tensor:
    """(T, H, D) -> (B, H, N, D), zeros in the padding."""
    rows = pad_sequence(list(x.split(case.lengths)), batch_first=True)
    return rows.transpose(1, 2).contiguous()


def packed(x: Tensor, case: AttentionCase) -> Tensor:
    """The inverse of dense."""
    rows = x.transpose(1, 2)
    return torch.cat([row[:n] for row, n in zip(rows, case.lengths, strict=True)])


class Way(Protocol):
    """inputs: q, k, v as leaves, in the layout that forward takes them in."""

    inputs: list[Tensor]

    def forward(self) -> Tensor: ...

    def laid_out(self, x: Tensor) -> Tensor:
        """The layout of this way <- (T, H, D)."""

    def packed(self, x: Tensor) -> Tensor:
        """The inverse of laid_out, less the padding."""


class Dense:
    """q, k, v and the output as (B, H, N, D)."""

    def __init__(self, case: AttentionCase, qkv: list[Tensor]):
        self.case = case
        self.inputs = [dense(x, case).requires_grad_() for x in qkv]

    def laid_out(self, x: Tensor) -> Tensor:
        return dense(x, self.case)

    def packed(self, x: Tensor) -> Tensor:
        return packed(x, self.case)


class Sdpa(Dense):
    """torch's SDPA on the padded batch; its mask ready-made, and additive where it is N x N."""

    def __init__(self, case: AttentionCase, qkv: list[Tensor]):
        super().__init__(case, qkv)
        self.mask = self._mask(qkv[0].device, qkv[0].dtype)

    def _mask(self, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        index = torch.arange(max(self.case.lengths), device=device)
        visible = None
        if self.case.ragged:
            lengths = torch.tensor(self.case.lengths, device=device)
            visible = (index < lengths[:, None])[:, None, None, :]
        if self.case.window is None:
            return visible
        band = (index[:, None] - index).abs() <= self.case.window
        visible = band if visible is None else visible & band
        zeros = torch.zeros(visible.shape, device=device, dtype=dtype)
        return zeros.masked_fill(~visible, float("-inf"))

    def forward(self) -> Tensor:
        q, k, v = self.inputs
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=self.mask,
            is_causal=self.case.is_causal,
            enable_gqa=self.case.kv_heads is not None,
        )


class OursDense(Dense):
    """fused_attention; a padded batch tells it how many rows of each sequence count."""

    def __init__(self, case: AttentionCase, qkv: list[Tensor], backend: str | None = None):
        super().__init__(case, qkv)
        self.backend = backend
        lengths = torch.tensor(case.lengths, device=qkv[0].device)
        self.lengths = lengths if case.ragged else None

    def forward(self) -> Tensor:
        q, k, v = self.inputs
        return fused_attention(
            q,
            k,
            v,
            is_causal=self.case.is_causal,
            enable_gqa=self.case.kv_heads is not None,
            window=self.case.window,
            kv_lengths=self.lengths,
            q_lengths=self.lengths,
            backend=self.backend,
        )


class OursPacked:
    """fused_attention_varlen on q, k, v of (T, H, D)."""

    def __init__(self, case: AttentionCase, qkv: list[Tensor], backend: str | None = None):
        self.case, self.backend = case, backend
        lengths = torch.tensor(case.lengths, device=qkv[0].device)
        self.cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        self.inputs = [x.detach().requires_grad_() for x in qkv]

    def forward(self) -> Tensor:
        q, k, v = self.inputs
        longest = max(self.case.lengths)
        return fused_attention_varlen(
            q,
            k,
            v,
            self.cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            is_causal=self.case.is_causal,
            enable_gqa=self.case.kv_heads is not None,
            window=self.case.window,
            backend=self.backend,
        )

    def laid_out(self, x: Tensor) -> Tensor:
        return x

    def packed(self, x: Tensor) -> Tensor:
        return x


def ours(case: AttentionCase, qkv: list[Tensor]) -> OursDense | OursPacked:
    """Packed where the lengths are unequal."""
    return OursPacked(case, qkv) if case.ragged else OursDense(case, qkv)


def results(way: Way, d_out: Tensor, gradients: bool = True) -> dict[str, Tensor]:
    """o and, if they are asked for, dq, dk, dv at the real tokens; d_out (T, H, D)."""
    o = way.forward()
    if not gradients:
        return {"o": way.packed(o.detach())}
    grads = torch.autograd.grad(o, way.inputs, way.laid_out(d_out))
    named = zip(("o", "dq", "dk", "dv"), (o.detach(), *grads), strict=True)
    return {name: way.packed(x) for name, x in named}


def cotangent(like: Tensor) -> Tensor:
    """do of q's shape (T, H, D)."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1)).to(like)


def check(
    case: AttentionCase,
    dtype: torch.dtype,
    device: torch.device,
    ways: Sequence[Callable[[AttentionCase, list[Tensor]], Way]] = (ours,),
    heads: int = 2,
    *,
    naive: Callable[[AttentionCase, list[Tensor]], Way] = Sdpa,
    gradients: bool = True,
) -> None:
    """Ours within twice the error of `naive` in the same dtype plus two rounding units, by fp64.

    At the lengths that are timed, and with few heads: fp64 is slow.
    """
    case = case.with_heads(heads)
    qkv = inputs(case, dtype, device)
    d_out = cotangent(qkv[0])
    truth = results(Sdpa(case, [x.double() for x in qkv]), d_out.double(), gradients)
    plain = results(naive(case, qkv), d_out, gradients)
    unit = torch.finfo(dtype).eps
    for way in ways:
        actual = results(way(case, qkv), d_out, gradients)
        for name, expected in truth.items():
            allowed = 2 * (plain[name].double() - expected).abs().max()
            allowed += 2 * unit * expected.abs().max()
            assert (actual[name].double() - expected).abs().max() <= allowed, name
