"""The definition in plain torch, in O(N) memory, on any device: forward, backward, and beyond.

Work is cut into blocks of queries, each with only the keys that its queries may see. Tensors that
do not take part (padding) are never read, or read and replaced by 0, so NaN there goes nowhere.
Scores and gradients are computed in fp32, or fp64 for fp64 inputs, and rounded once.

s = scale q k' + mask;  p = exp(s - lse);  o = p v;  with cotangents do, dlse:
a = do v';  delta = rowsum(p a) - dlse;  ds = p (a - delta)
dq = scale ds k;  dk = scale ds' q;  dv = p' do
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clinattn.arguments import NEEDS

# Elements of one block of scores: 8 MiB in fp32.
BLOCK_ELEMENTS = 1 << 21
MIN_ROWS, MAX_ROWS = 16, 1024


class Segment(NamedTuple):
    """Sequences that share their visibility: a range of the batch, and their rows in q and in k."""

    batch: slice
    q_first: int
    nq: int
    k_first: int
    kv_start: int
    nk: int


@dataclass
class Block:
    """Some queries of a segment and every key that they may see.

    visible: None (all), or a 5-D bool that broadcasts to scores (b, Hkv, G, rows, keys); bias: the
    same for a float mask.
    """

    at_q: tuple[slice, slice, slice]
    at_k: tuple[slice, slice, slice]
    visible: Tensor | None
    bias: Tensor | None


class Problem:
    """The arguments of an op, as 4-D views (batch, heads, tokens, D) and a list of segments."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        q_lengths: Tensor | None,
        kv_start: Tensor | None,
        kv_end: Tensor | None,
        lo: Tensor | None,
        hi: Tensor | None,
        times: Tensor | None,
        decay: Tensor | None,
        slopes: Tensor | None,
        relative: Tensor | None,
        seed: Tensor | None,
        scale: float,
        window_left: int,
        window_right: int,
        bottom_right: bool,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softcap: float,
        global_prefix: int,
        dropout_p: float,
    ) -> None:
        self.packed = cu_seqlens_q is not None
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.q, self.k, self.v = self.view(q), self.view(k), self.view(v)
        self.scale, self.mask = scale, mask
        self.left, self.right, self.bottom_right = window_left, window_right, bottom_right
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            self.segments = packed_segments(cu_seqlens_q, cu_seqlens_k, self.q, self.k)
        else:
            self.segments = dense_segments(self.q, self.k, q_lengths, kv_start, kv_end)

    def view(self, x: Tensor) -> Tensor:
        """(B, H, N, D), or (T, H, D) as (1, H, T, D)."""
        return x.transpose(0, 1)[None] if self.packed else x

    def rows(self, x: Tensor) -> Tensor:
        """lse-shaped x, (B, H, N) or (H, T), as (B, H, N, 1)."""
        return (x[None] if self.packed else x)[..., None]

    def blocks(self) -> Iterator[Block]:
        for segment in self.segments:
            if segment.nq > 0 and segment.nk > segment.kv_start:
                yield from self.blocks_of(segment)

    def blocks_of(self, seg: Segment) -> Iterator[Block]:
        batch, heads = seg.batch.stop - seg.batch.start, self.q.shape[1]
        off = seg.nk - seg.nq if self.bottom_right else 0
        n_keys = seg.nk - seg.kv_start
        if self.left >= 0 and self.right >= 0:
            n_keys = min(n_keys, self.left + self.right + MAX_ROWS)
        step = max(MIN_ROWS, min(MAX_ROWS, BLOCK_ELEMENTS // (batch * heads * n_keys)))
        for i0 in range(0, seg.nq, step):
            i1 = min(i0 + step, seg.nq)
            lo = max(seg.kv_start, i0 + off - self.left) if self.left >= 0 else seg.kv_start
            hi = min(seg.nk, i1 + off + self.right) if self.right >= 0 else seg.nk
            if lo >= hi:
                continue
            visible = self.window(i0 + off, i1 + off, lo, hi)
            visible, bias = self.masked(seg.batch, slice(i0, i1), slice(lo, hi), visible)
            every = slice(None)
            yield Block(
                (seg.batch, every, slice(seg.q_first + i0, seg.q_first + i1)),
                (seg.batch, every, slice(seg.k_first + lo, seg.k_first + hi)),
                visible,
                bias,
            )

    def window(self, i0: int, i1: int, lo: int, hi: int) -> Tensor | None:
        """Which of the keys [lo, hi) the queries at [i0, i1) see; None when each sees them all."""
        cut_left = self.left >= 0 and i1 - 1 - self.left > lo
        cut_right = self.right >= 0 and i0 + self.right + 1 < hi
        if not (cut_left or cut_right):
            return None
        device = self.q.device
        ahead = torch.arange(lo, hi, device=device) - torch.arange(i0, i1, device=device)[:, None]
        visible = torch.ones_like(ahead, dtype=torch.bool)
        if cut_left:
            visible &= ahead >= -self.left
        if cut_right:
            visible &= ahead <= self.right
        return visible[None, None, None]

    def masked(
        self, batch: slice, i: slice, j: slice, visible: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(visible, bias) of a block, with the mask tensor folded in."""
        if self.mask is None:
            return visible, None
        whole = slice(None)
        at = tuple(
            index if size > 1 else whole
            for index, size in zip((batch, whole, i, j), self.mask.shape, strict=True)
        )
        mask = self.grouped(self.mask[at])
        bias = None
        if mask.dtype != torch.bool:
            bias = mask.to(self.dtype)
            mask = mask != -float("inf")
        return mask if visible is None else mask & visible, bias

    def grouped(self, x: Tensor) -> Tensor:
        """(b, H, n, m) -> (b, Hkv, G, n, m), the query heads by the kv head that they use."""
        return x.unflatten(1, (self.k.shape[1], -1)) if x.shape[1] > 1 else x[:, :, None]

    def queries(self, x: Tensor, block: Block) -> Tensor:
        """A block of a query-sided tensor: (b, Hkv, G, rows, D), 0 where a row sees nothing."""
        x = self.grouped(x[block.at_q].to(self.dtype))
        if block.visible is None:
            return x
        return torch.where(block.visible.any(-1, keepdim=True), x, 0)

    def keys(self, x: Tensor, block: Block) -> Tensor:
        """A block of a key-sided tensor: (b, Hkv, keys, D), 0 where no row of the block sees it."""
        x = x[block.at_k].to(self.dtype)
        if block.visible is None:
            return x
        seen = block.visible.any(-2).any(2)  # (b, Hkv, keys)
        return torch.where(seen[..., None], x, 0)

    def scores(self, block: Block) -> Tensor:
        s = dot(self.queries(self.q, block), self.keys(self.k, block)) * self.scale
        if block.bias is not None:
            s = s + block.bias
        return s if block.visible is None else torch.where(block.visible, s, -float("inf"))

    def probabilities(self, block: Block, lse: Tensor, lse_low: Tensor | None) -> Tensor:
        lse = self.grouped(self.rows(lse)[block.at_q])
        s = self.scores(block) - torch.where(lse == -float("inf"), 0, lse)
        if lse_low is not None:
            s = s - self.grouped(self.rows(lse_low)[block.at_q])
        return torch.exp(s)

    def zeros(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """An accumulator with the shape of `like`, and its 4-D view."""
        total = like.new_zeros(like.shape, dtype=self.dtype)
        return total, self.view(total)


def packed_segments(cu_q: Tensor, cu_k: Tensor, q: Tensor, k: Tensor) -> list[Segment]:
    starts_q = [min(max(start, 0), q.shape[2]) for start in cu_q.tolist()]
    starts_k = [min(max(start, 0), k.shape[2]) for start in cu_k.tolist()]
    return [
        Segment(slice(0, 1), q0, q1 - q0, k0, 0, k1 - k0)
        for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False)
    ]


def dense_segments(
    q: Tensor, k: Tensor, q_lengths: Tensor | None, kv_start: Tensor | None, kv_end: Tensor | None
) -> list[Segment]:
    batch, n_queries, n_keys = q.shape[0], q.shape[2], k.shape[2]
    if q_lengths is None and kv_start is None and kv_end is None:
        return [Segment(slice(0, batch), 0, n_queries, 0, 0, n_keys)]

    def values(x: Tensor | None, default: int, limit: int) -> list[int]:
        given = [default] * batch if x is None else x.tolist()
        return [min(max(value, 0), limit) for value in given]

    nq = values(q_lengths, n_queries, n_queries)
    start, end = values(kv_start, 0, n_keys), values(kv_end, n_keys, n_keys)
    return [Segment(slice(b, b + 1), 0, nq[b], 0, start[b], end[b]) for b in range(batch)]


def dot(x: Tensor, y: Tensor) -> Tensor:
    """(b, Hkv, G, rows, D), (b, Hkv, keys, D) -> (b, Hkv, G, rows, keys)."""
    return (x.flatten(2, 3) @ y.mT).unflatten(2, x.shape[2:4])


def to_rows(p: Tensor, y: Tensor) -> Tensor:
    """(b, Hkv, G, rows, keys), (b, Hkv, keys, D) -> (b, H, rows, D)."""
    return (p.flatten(2, 3) @ y).unflatten(2, p.shape[2:4]).flatten(1, 2)


def to_keys(p: Tensor, x: Tensor) -> Tensor:
    """(b, Hkv, G, rows, keys), (b, Hkv, G, rows, D) -> (b, Hkv, keys, D)."""
    return p.flatten(2, 3).mT @ x.flatten(2, 3)


def rowsum(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


def exact_sum(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x + y, and what rounding took from it (Knuth, TAOCP 2, 4.2.2)."""
    high = x + y
    part = high - x
    return high, (x - (high - part)) + (y - part)


def in_full_precision(function: Any) -> Any:
    """Autocast would lower the products inside; the ops take their dtype from their inputs."""

    @functools.wraps(function)
    def wrapper(first: Tensor, *args: Any) -> Any:
        with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            return function(first, *args)

    return wrapper


@in_full_precision
def attention_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(q, k, v, *rest)
    o = q.new_zeros(q.shape)
    shape = (q.shape[1], q.shape[0]) if problem.packed else q.shape[:-1]
    lse = q.new_full(shape, -float("inf"), dtype=problem.dtype)
    lse_low = torch.zeros_like(lse)
    for block in problem.blocks():
        s = problem.scores(block)
        m = s.amax(-1, keepdim=True)
        p = torch.exp(s - torch.where(m == -float("inf"), 0, m))
        total = rowsum(p)
        # A row that sees nothing has p = 0 and total = 0.
        p = p / torch.where(total == 0, 1, total)
        problem.view(o)[block.at_q] = to_rows(p, problem.keys(problem.v, block)).to(o.dtype)
        high, low = exact_sum(m, total.log())
        problem.rows(lse)[block.at_q] = high.flatten(1, 2)
        problem.rows(lse_low)[block.at_q] = torch.where(total == 0, 0, low).flatten(1, 2)
    return o, lse, lse_low


@in_full_precision
def attention_backward(
    do: Tensor,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    lse_low: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    problem = Problem(q, k, v, *rest[:-1])
    dq = q.new_zeros(q.shape)
    (dk, dk_view), (dv, dv_view) = problem.zeros(k), problem.zeros(v)
    for block in problem.blocks():
        p = problem.probabilities(block, lse, lse_low)
        g = problem.queries(problem.view(do), block)
        delta = rowsum(g * problem.queries(problem.view(o), block))
        if dlse is not None:
            delta = delta - problem.queries(problem.rows(dlse), block)
        keys = problem.keys(problem.k, block)
        ds = p * (dot(g, problem.keys(problem.v, block)) - delta) * problem.scale
        problem.view(dq)[block.at_q] = to_rows(ds, keys).to(dq.dtype)
        dk_view[block.at_k] += to_keys(ds, problem.queries(problem.q, block))
        dv_view[block.at_k] += to_keys(p, g)
    return dq, dk.to(k.dtype), dv.to(v.dtype), *(q.new_empty(0) for _ in NEEDS)


@in_full_precision
def attention_double_backward(
    ddq: Tensor,
    ddk: Tensor,
    ddv: Tensor,
    ddmask: Tensor | None,
    dddecay: Tensor | None,
    ddslopes: Tensor | None,
    ddrelative: Tensor | None,
    do: Tensor,
    dlse: Tensor | None,
    lse: Tensor,
    lse_low: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Gradients of <ddq, dq> + <ddk, dk> + <ddv, dv> to do, dlse, q, k and v.

    With u = scale (ddq k' + q ddk') and w = do ddv' that sum is <ds, u> + <p, w>. Its derivative
    to a is c = p (u - ubar), with ubar = rowsum(p u), and to the scores it is t = p (r - rowsum(p
    r)), with r = (a - delta) u - ubar a + w. The rest is the chain rule through five products.
    """
    problem = Problem(q, k, v, *rest[:-1])
    scale = problem.scale
    grad_do, grad_q = q.new_zeros(q.shape), q.new_zeros(q.shape)
    grad_dlse = torch.zeros_like(lse)
    (grad_k, grad_k_view), (grad_v, grad_v_view) = problem.zeros(k), problem.zeros(v)
    for block in problem.blocks():
        p = problem.probabilities(block, lse, lse_low)
        rows, keys = problem.queries(problem.q, block), problem.keys(problem.k, block)
        g, values = problem.queries(problem.view(do), block), problem.keys(problem.v, block)
        drows = problem.queries(problem.view(ddq), block)
        dkeys = problem.keys(problem.view(ddk), block)
        dvalues = problem.keys(problem.view(ddv), block)
        a = dot(g, values)
        delta = rowsum(p * a)
        if dlse is not None:
            delta = delta - problem.queries(problem.rows(dlse), block)
        ds = p * (a - delta) * scale
        u = (dot(drows, keys) + dot(rows, dkeys)) * scale
        ubar = rowsum(p * u)
        c = p * (u - ubar)
        r = (a - delta) * u - ubar * a + dot(g, dvalues)
        t = p * (r - rowsum(p * r)) * scale
        problem.view(grad_do)[block.at_q] = (to_rows(c, values) + to_rows(p, dvalues)).to(q.dtype)
        problem.rows(grad_dlse)[block.at_q] = ubar.flatten(1, 2)
        problem.view(grad_q)[block.at_q] = (to_rows(t, keys) + to_rows(ds, dkeys)).to(q.dtype)
        grad_k_view[block.at_k] += to_keys(t, rows) + to_keys(ds, drows)
        grad_v_view[block.at_k] += to_keys(c, g)
    grads = grad_do, grad_dlse, grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)
    return *grads, *(q.new_empty(0) for _ in NEEDS)
