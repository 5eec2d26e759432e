"""Blocks of an attention problem: some queries each, with only the keys that the queries may see.

Tensors that do not take part (padding) are never read, or read and replaced by 0, so NaN there goes
nowhere. Everything is fp32, or fp64 for fp64 inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clinattn.backends.call import Arguments

# Elements of one block of scores: 8 MiB in fp32.
BLOCK_ELEMENTS = 1 << 21
MIN_ROWS, MAX_ROWS = 16, 1024


class Segment(NamedTuple):
    """Sequences that share their visibility: a range of the batch, and their rows in q and in k.

    sequence: the first one's number; the batch of the packed layout is 1 whatever the sequence.
    """

    batch: slice
    q_first: int
    nq: int
    k_first: int
    kv_start: int
    nk: int
    sequence: int


@dataclass
class Block:
    """Some queries of a segment and every key that they may see.

    i: positions of the queries within their sequence; offset: what bottom-right alignment adds.
    spans: ranges of the keys' positions, one, or a second one apart from the global prefix.
    visible: None (all), or a 5-D bool that broadcasts to scores (b, Hkv, G, rows, keys).
    """

    segment: Segment
    i: range
    offset: int
    spans: list[range]
    visible: Tensor | None = None

    @property
    def at_q(self) -> tuple[slice, slice, slice]:
        first = self.segment.q_first
        return self.segment.batch, slice(None), slice(first + self.i.start, first + self.i.stop)

    def rows(self, device: torch.device) -> Tensor:
        return torch.arange(self.i.start, self.i.stop, device=device)

    def keys(self, device: torch.device) -> Tensor:
        return torch.cat([torch.arange(x.start, x.stop, device=device) for x in self.spans])

    def key_index(self, first: int, device: torch.device) -> slice | Tensor:
        """Index of the keys in a tensor in which their sequence starts at `first`."""
        if len(self.spans) == 1:
            return slice(first + self.spans[0].start, first + self.spans[0].stop)
        return first + self.keys(device)

    def ahead(self, device: torch.device) -> Tensor:
        """(rows, keys): how far each key lies ahead of each query."""
        return self.keys(device) - (self.rows(device) + self.offset)[:, None]


class SegmentedCall:
    """The arguments of an op, as 4-D views (batch, heads, tokens, D) and a list of segments."""

    def __init__(self, a: Arguments) -> None:
        self.args = a
        self.packed = a.cu_seqlens_q is not None
        self.device = a.q.device
        self.dtype = torch.float64 if a.q.dtype == torch.float64 else torch.float32
        self.q, self.k, self.v = self.view(a.q), self.view(a.k), self.view(a.v)
        self.lo, self.hi = (x if x is None or not self.packed else x[None] for x in (a.lo, a.hi))
        self.segments = packed_segments(a) if self.packed else dense_segments(a)

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
        a = self.args
        off = seg.nk - seg.nq if a.bottom_right else 0
        n_keys = seg.nk - seg.kv_start
        if a.window_left >= 0 and a.window_right >= 0:
            n_keys = min(n_keys, a.window_left + a.window_right + MAX_ROWS + a.global_prefix)
        scores_of_a_row = (seg.batch.stop - seg.batch.start) * self.q.shape[1] * n_keys
        step = max(MIN_ROWS, min(MAX_ROWS, BLOCK_ELEMENTS // scores_of_a_row))
        # Queries of the global prefix, which see every key, are blocks of their own.
        prefix = min(max(seg.kv_start + a.global_prefix - off, 0), seg.nq) if a.global_prefix else 0
        for first, last, sees_all in ((0, prefix, True), (prefix, seg.nq, False)):
            for i0 in range(first, last, step):
                block = Block(seg, range(i0, min(i0 + step, last)), off, [])
                if sees_all:
                    block.spans = [range(seg.kv_start, seg.nk)]
                else:
                    self.find_keys(block)
                if block.spans:
                    self.fold_mask(block)
                    yield block

    def find_keys(self, block: Block) -> None:
        """spans and visible of a block, from windows, intervals and the global prefix."""
        a, seg, off = self.args, block.segment, block.offset
        lo, hi = seg.kv_start, seg.nk
        if a.window_left >= 0:
            lo = max(lo, block.i.start + off - a.window_left)
        if a.window_right >= 0:
            hi = min(hi, block.i.stop + off + a.window_right)
        los = his = None
        if self.lo is not None and self.hi is not None:
            rows = block.at_q[::2]
            los, his = self.lo[rows], self.hi[rows]
            lo, hi = max(lo, int(los.min())), min(hi, int(his.max()))
        prefix_end = min(seg.kv_start + a.global_prefix, seg.nk)
        lo, hi = max(lo, prefix_end), max(hi, lo, prefix_end)
        spans = [range(seg.kv_start, prefix_end), range(lo, hi)]
        if lo == prefix_end:
            spans = [range(seg.kv_start, hi)]
        block.spans = [span for span in spans if span]
        limited = a.window_left >= 0 or a.window_right >= 0 or los is not None
        if not (block.spans and limited):
            return
        ahead = block.ahead(self.device)
        visible = torch.ones_like(ahead, dtype=torch.bool)
        if a.window_left >= 0:
            visible &= ahead >= -a.window_left
        if a.window_right >= 0:
            visible &= ahead <= a.window_right
        visible = visible[None]
        if los is not None and his is not None:
            j = block.keys(self.device)
            visible = visible & (j >= los[..., None]) & (j < his[..., None])
        if a.global_prefix:
            visible = visible | (block.keys(self.device) < prefix_end)
        block.visible = None if visible.all() else visible[:, None, None]

    def fold_mask(self, block: Block) -> None:
        """Removes what the mask tensor hides from block.visible."""
        mask = self.args.mask
        if mask is None:
            return
        seen = mask[self.mask_index(block)]
        seen = self.grouped(seen if mask.dtype == torch.bool else seen != -float("inf"))
        block.visible = seen if block.visible is None else seen & block.visible

    def mask_index(self, block: Block) -> tuple[slice | Tensor, ...]:
        """Index of a block in the mask, whose broadcast sides have size 1."""
        assert self.args.mask is not None
        places = (
            *(block.segment.batch, slice(None), slice(block.i.start, block.i.stop)),
            block.key_index(0, self.device),
        )
        return tuple(
            index if size > 1 else slice(None)
            for index, size in zip(places, self.args.mask.shape, strict=True)
        )

    def at_k(self, block: Block) -> tuple[slice, slice, slice | Tensor]:
        seg = block.segment
        return seg.batch, slice(None), block.key_index(seg.k_first, self.device)

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
        """A block of a key-sided x: (b, Hkv, keys, D), 0 for keys that no row of the block sees."""
        x = x[self.at_k(block)].to(self.dtype)
        if block.visible is None:
            return x
        seen = block.visible.any(-2).any(2)  # (b, Hkv, keys)
        return torch.where(seen[..., None], x, 0)

    def zeros(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """An accumulator with the shape of `like`, and its 4-D view."""
        total = like.new_zeros(like.shape, dtype=self.dtype)
        return total, self.view(total)


def packed_segments(a: Arguments) -> list[Segment]:
    assert a.cu_seqlens_q is not None and a.cu_seqlens_k is not None
    starts_q = [min(max(start, 0), a.q.shape[0]) for start in a.cu_seqlens_q.tolist()]
    starts_k = [min(max(start, 0), a.k.shape[0]) for start in a.cu_seqlens_k.tolist()]
    bounds = zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False)
    return [
        Segment(slice(0, 1), q0, q1 - q0, k0, 0, k1 - k0, s)
        for s, (q0, q1, k0, k1) in enumerate(bounds)
    ]


def dense_segments(a: Arguments) -> list[Segment]:
    batch, n_queries, n_keys = a.q.shape[0], a.q.shape[2], a.k.shape[2]
    if a.q_lengths is a.kv_start is a.kv_end is a.lo is None:
        return [Segment(slice(0, batch), 0, n_queries, 0, 0, n_keys, 0)]

    def values(x: Tensor | None, default: int, limit: int) -> list[int]:
        given = [default] * batch if x is None else x.tolist()
        return [min(max(value, 0), limit) for value in given]

    nq = values(a.q_lengths, n_queries, n_queries)
    start, end = values(a.kv_start, 0, n_keys), values(a.kv_end, n_keys, n_keys)
    return [Segment(slice(b, b + 1), 0, nq[b], 0, start[b], end[b], b) for b in range(batch)]
