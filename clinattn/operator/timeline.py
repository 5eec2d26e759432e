"""Segments and timestamps turned into intervals: lo and hi of each query, counted in its sequence.

Everything runs on the device of the inputs, and the host reads no values. Rows are one flat list of
tokens, each with the range [first, last) of the tokens of its sequence that are not padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOW = 2**32 - 1  # the lower half of an int64


class Rows(NamedTuple):
    """int64 tensors in the shape of the tokens; position, first and last count in the flat list."""

    sequence: Tensor
    position: Tensor
    first: Tensor
    last: Tensor
    longest: int

    @property
    def valid(self) -> Tensor:
        return self.position < self.last


def dense_rows(like: Tensor, lengths: Tensor | None) -> Rows:
    """Returns the Rows of tokens (B, N); beyond `lengths` they are padding."""
    batch, n = like.shape
    position = torch.arange(batch * n, device=like.device).view(batch, n)
    sequence = torch.arange(batch, device=like.device)[:, None].expand(batch, n)
    first = sequence * n
    last = first + (n if lengths is None else lengths.clamp(0, n)[:, None])
    return Rows(sequence, position, first, last, n)


def packed_rows(like: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Rows:
    """Returns the Rows of tokens (T,); those past the last sequence are padding."""
    total = like.shape[0]
    position = torch.arange(total, device=like.device)
    ends = torch.cat([cu_seqlens, cu_seqlens.new_full((1,), total)]).long().clamp(0, total)
    sequence = torch.searchsorted(ends[1:], position, right=True)
    first = ends[sequence]
    last = ends[sequence + 1]
    past = sequence >= cu_seqlens.shape[0] - 1
    return Rows(sequence, position, first, torch.where(past, first, last), max_seqlen)


def shifted_times(times: Tensor, rows: Rows, origin: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns times less those at the flat positions `origin`; 0 in padding. See difference."""
    if times.numel() == 0:
        return times.to(dtype)
    flat = times.flatten()
    since = difference(times, flat[origin.clamp(0, flat.shape[0] - 1)], dtype)
    return torch.where(rows.valid, since, 0)


def difference(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a - b in dtype; floats are subtracted in their own, int64 without overflow."""
    if a.is_floating_point():
        return (a - b).to(dtype)
    high, low = (a >> 32) - (b >> 32), (a & LOW) - (b & LOW)
    return torch.add(low.double(), high.double(), alpha=2.0**32).to(dtype)


def window_intervals(since: Tensor, rows: Rows, window: float) -> tuple[Tensor, Tensor]:
    """Returns int32 (lo, hi) of the tokens with |t_i - t_j| <= window, in fp32; empty in padding.

    A bisection by the rounded difference t_i - t_j itself. Rounding is monotone, so the result is
    to the bit that of a mask of all pairs, as a search for t_i - window would not be. Both ends are
    found at once: hi is the lo of the tokens in reverse order at negated times.
    """
    total = since.numel()
    t = since.to(torch.float32).flatten()
    position, first, last = (x.flatten() for x in rows[1:4])
    t = torch.cat([t, -t.flip(0)])
    position = torch.cat([position, position + total])
    first = torch.cat([first, 2 * total - last.flip(0)])
    bound = torch.full((), window, dtype=torch.float32, device=t.device)
    bits = 31 if torch.compiler.is_compiling() else int(rows.longest).bit_length()
    # All tokens before `lo` are too early; lo moves on by powers of two while that holds.
    lo = first
    for step in (1 << bit for bit in reversed(range(bits))):
        probe = torch.minimum(lo + (step - 1), position)  # t_i itself is never too early
        lo = torch.add(lo, t - t.index_select(0, probe) > bound, alpha=step)
    lo, hi = lo[:total], 2 * total - lo[total:].flip(0)
    return _within(rows, lo.view(since.shape), hi.view(since.shape))


def segment_intervals(ids: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Returns int32 (lo, hi) of the tokens (B, N) with the same id; empty in padding."""
    ids = torch.where(rows.valid, ids, torch.iinfo(ids.dtype).max).contiguous()
    lo = rows.first + torch.searchsorted(ids, ids)
    hi = rows.first + torch.searchsorted(ids, ids, right=True)
    return _within(rows, lo, torch.minimum(hi, rows.last))


def _within(rows: Rows, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Turns flat positions into those within the sequence; padding gets (last, last)."""
    lo, hi = (torch.where(rows.valid, x, rows.last) - rows.first for x in (lo, hi))
    return lo.to(torch.int32).contiguous(), hi.to(torch.int32).contiguous()


def first_disorder(values: Tensor, rows: Rows) -> tuple[int, int, float, float] | None:
    """Returns (row, place, value before, value) of the first decrease; on the CPU."""
    same = (rows.first == torch.roll(rows.first, 1, -1)) & rows.valid & (rows.position > rows.first)
    wrong = same & ~(values >= torch.roll(values, 1, -1))
    if not wrong.any():
        return None
    at = int(wrong.flatten().nonzero()[0])
    row, first = int(rows.sequence.flatten()[at]), int(rows.first.flatten()[at])
    before, value = values.flatten()[at - 1 : at + 1].tolist()
    return row, at - first, before, value
