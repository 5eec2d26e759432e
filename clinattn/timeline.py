"""Segments and timestamps turned into intervals: lo and hi of each query, counted in its sequence.

All on the device of the inputs and without waiting for it. Rows are handled as one flat list of
tokens, each with the range [first, last) of the tokens of its sequence that are not padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """int64 tensors in the shape of the tokens, (B, N) or (T,); all but sequence flat positions."""

    sequence: Tensor
    position: Tensor
    first: Tensor
    last: Tensor
    longest: int

    @property
    def valid(self) -> Tensor:
        return self.position < self.last


def dense_rows(like: Tensor, lengths: Tensor | None) -> Rows:
    """Rows of (B, N), all or only the first `lengths` tokens of which count."""
    batch, n = like.shape
    position = torch.arange(batch * n, device=like.device).view(batch, n)
    sequence = torch.arange(batch, device=like.device)[:, None].expand(batch, n)
    first = sequence * n
    last = first + (n if lengths is None else lengths.clamp(0, n)[:, None])
    return Rows(sequence, position, first, last, n)


def packed_rows(like: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Rows:
    """Rows of (T,); those past the last sequence are padding."""
    total = like.shape[0]
    position = torch.arange(total, device=like.device)
    ends = torch.cat([cu_seqlens, cu_seqlens.new_full((1,), total)]).long().clamp(0, total)
    sequence = torch.searchsorted(ends[1:], position, right=True)
    first = ends[sequence]
    last = ends[sequence + 1]
    past = sequence >= cu_seqlens.shape[0] - 1
    return Rows(sequence, position, first, torch.where(past, first, last), max_seqlen)


def shifted_times(times: Tensor, rows: Rows, origin: Tensor, dtype: torch.dtype) -> Tensor:
    """times less the time at the flat position `origin`, subtracted as they are, 0 in padding."""
    if times.numel() == 0:
        return times.to(dtype)
    if not times.is_floating_point():
        times = times.long()
    flat = times.flatten()
    since = (times - flat[origin.clamp(0, flat.shape[0] - 1)]).to(dtype)
    return torch.where(rows.valid, since, 0)


def window_intervals(since: Tensor, rows: Rows, window: float) -> tuple[Tensor, Tensor]:
    """int32 (lo, hi) of the tokens with |t_i - t_j| <= window, in fp32; empty in padding.

    A bisection, and no search for t_i - window: rounding is monotone, so the difference itself
    decides to the bit as a mask of all pairs would.
    """
    t = since.to(torch.float32)
    bound = torch.full((), window, dtype=torch.float32, device=t.device)
    flat, position = t.flatten(), rows.position
    steps = 31 if torch.compiler.is_compiling() else max(int(rows.longest), 1).bit_length()
    # low_lo <= lo <= high_lo and low_hi < hi <= high_hi, closer by half each time
    low_lo, high_lo = rows.first, torch.maximum(position, rows.first)
    low_hi, high_hi = position, rows.last
    for _ in range(steps):
        middle = (low_lo + high_lo) // 2
        near = t - _at(flat, middle) <= bound
        low_lo = torch.where(near, low_lo, torch.minimum(middle + 1, high_lo))
        high_lo = torch.where(near, middle, high_lo)
        middle = (low_hi + high_hi) // 2
        near = _at(flat, middle) - t <= bound
        low_hi = torch.where(near, middle, low_hi)
        high_hi = torch.where(near, high_hi, middle)
    return _within(rows, high_lo, high_hi)


def segment_intervals(ids: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """int32 (lo, hi) of the tokens (B, N) with the same id; empty in padding."""
    ids = torch.where(rows.valid, ids, torch.iinfo(ids.dtype).max).contiguous()
    lo = rows.first + torch.searchsorted(ids, ids)
    hi = rows.first + torch.searchsorted(ids, ids, right=True)
    return _within(rows, lo, torch.minimum(hi, rows.last))


def _at(flat: Tensor, index: Tensor) -> Tensor:
    return flat[index.clamp(0, flat.shape[0] - 1)] if flat.shape[0] else flat.view(index.shape)


def _within(rows: Rows, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Flat positions as those within the sequence; padding gets (last, last)."""
    lo, hi = (torch.where(rows.valid, x, rows.last) - rows.first for x in (lo, hi))
    return lo.to(torch.int32).contiguous(), hi.to(torch.int32).contiguous()


def first_disorder(values: Tensor, rows: Rows) -> tuple[int, int, float, float] | None:
    """(row, place, value before, value) of the first decrease in (B, N) or (T,); on the CPU."""
    same = (rows.first == torch.roll(rows.first, 1, -1)) & rows.valid & (rows.position > rows.first)
    wrong = same & ~(values >= torch.roll(values, 1, -1))
    if not wrong.any():
        return None
    at = int(wrong.flatten().nonzero()[0])
    row, first = int(rows.sequence.flatten()[at]), int(rows.first.flatten()[at])
    before, value = values.flatten()[at - 1 : at + 1].tolist()
    return row, at - first, before, value
