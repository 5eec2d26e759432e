"""Turns causal order, windows, lengths and masks into arguments of the ops.

Query i of a sequence with nq queries and nk keys sees the keys [lo, hi):

    off = nk - nq if bottom_right else 0
    lo  = max(kv_start, i + off - window_left)
    hi  = min(nk,       i + off + window_right + 1)

where a window side of -1 has no bound; the op's lo and hi, where given, are intersected with that.
With a global prefix of g the first g keys from kv_start on are seen by all queries, and the first g
queries see all keys up to nk. A mask tensor is intersected with all of it.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from clinattn.backends.call import Arguments

Window = int | tuple[int | None, int | None] | None


def concrete(x: Tensor) -> bool:
    """Returns whether the host can read x without stopping for a device or breaking a trace."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None  # torch.jit.trace would keep what was read
        and type(x) is Tensor
        and x.device.type == "cpu"
        and not torch._C._are_functorch_transforms_active()
    )


def fold_window(window: Window, is_causal: bool) -> tuple[int, int]:
    """Returns (left, right) with -1 for no bound; causal is a right side of 0."""
    left, right = window if isinstance(window, tuple) else (window, window)
    left = -1 if left is None else left
    right = -1 if right is None else right
    return left, 0 if is_causal else right


def shorter(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Returns the smaller of two lengths, where None is no bound."""
    if a is None or b is None:
        return b if a is None else a
    return torch.minimum(a, b)


def unexpanded(mask: Tensor) -> Tensor:
    """Returns the mask as 4-D, with size 1 in dimensions that repeat one value."""
    mask = mask[(None,) * (4 - mask.dim())]
    for dim, (size, stride) in enumerate(zip(mask.shape, mask.stride(), strict=True)):
        if stride == 0 and size > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


def key_range(visible: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the first visible key and one past the last, int32 (b,); 0, 0 if none is."""
    position = torch.arange(visible.shape[-1], device=visible.device, dtype=torch.int32)
    end = torch.where(visible, position + 1, 0).amax(-1)
    start = torch.where(visible, position, visible.shape[-1]).amin(-1)
    return torch.minimum(start, end), end


def combined(mask: Tensor, other: Tensor) -> Tensor:
    """Returns one mask for two: bool ones (True = visible) hide, floating ones are added."""
    if mask.dtype == other.dtype == torch.bool:
        return mask & other
    if mask.dtype == torch.bool:
        return torch.where(mask, other, -float("inf"))
    return torch.where(other, mask, -float("inf")) if other.dtype == torch.bool else mask + other


def right_padded_lengths(visible: Tensor) -> Tensor | None:
    """Returns the lengths (B,) of a right-padding mask (B, Nk); None for others or unreadable."""
    if visible.dtype != torch.bool or not concrete(visible):
        return None
    lengths = visible.sum(-1)
    first = torch.arange(visible.shape[-1]) < lengths[:, None]
    return lengths if torch.equal(first, visible) else None


class PreparedMask(NamedTuple):
    """A mask as the ops take it, and if all queries share it, the range of visible keys, (B,).

    Code that calls attention often with one mask, and never writes to it, may give this instead.
    """

    mask: Tensor | None
    kv_start: Tensor | None = None
    kv_end: Tensor | None = None

    def hides_nothing(self) -> bool:
        return self.mask is self.kv_start is self.kv_end is None


def prepare_mask(
    mask: Tensor, batch: int, n_keys: int, dtype: torch.dtype, keep_end: bool = False
) -> PreparedMask:
    """Returns a checked attn_mask as the ops take it.

    A mask that is the same for all queries also gives the range of its visible keys, so that
    kernels skip the keys outside. Where the host can read that every key in the range is visible,
    the mask is dropped, and with it the range of all keys. keep_end: positions count from the last
    key, so no range is given.
    """
    if mask.dtype != torch.bool:
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        if mask.dtype not in (dtype, accumulator):
            mask = mask.to(accumulator)
    mask = unexpanded(mask)
    if mask.shape[-1] > 1 and mask.stride(-1) != 1:
        mask = mask.contiguous()
    if mask.shape[1] != 1 or mask.shape[2] != 1 or n_keys == 0 or keep_end:
        return PreparedMask(mask)
    visible = mask[:, 0, 0]
    if mask.dtype != torch.bool:
        visible = visible != -float("inf")
    elif concrete(mask) and bool(visible.all()):
        return PreparedMask(None)
    start, end = key_range(visible.expand(-1, n_keys))
    range_only = (
        mask.dtype == torch.bool
        and concrete(mask)
        and torch.equal(visible.expand(-1, n_keys).sum(-1, dtype=torch.int32), end - start)
    )
    if start.shape[0] != batch:
        start, end = start.expand(batch).contiguous(), end.expand(batch).contiguous()
    return PreparedMask(None if range_only else mask, start, end)


def visible_pairs(a: Arguments) -> int:
    """Returns the (query, key) pairs of one head that the intervals leave, over the whole batch.

    A mask tensor is ignored. Lengths and intervals without values, as when traced, count as
    full, and packed sequences without values as a single one.
    """
    packed = a.cu_seqlens_q is not None and a.cu_seqlens_k is not None
    if packed:
        ends_q, ends_k = _values(a.cu_seqlens_q), _values(a.cu_seqlens_k)
        if ends_q is None or ends_k is None:
            ends_q, ends_k = [0, a.q.shape[0]], [0, a.k.shape[0]]
        nq = list(map(operator.sub, ends_q[1:], ends_q))
        nk = list(map(operator.sub, ends_k[1:], ends_k))
        start, first = [0] * len(nk), ends_q
    else:
        batch, n_queries = a.q.shape[0], a.q.shape[2]
        nq = _values(a.q_lengths) or [n_queries] * batch
        nk = _values(a.kv_end) or [a.k.shape[2]] * batch
        start = _values(a.kv_start) or [0] * batch
        first = [b * n_queries for b in range(batch)]
    lo = _values(None if a.lo is None else a.lo.flatten())
    hi = _values(None if a.hi is None else a.hi.flatten())
    pairs = 0
    for n, m, s, row in zip(nq, nk, start, first, strict=False):
        rows = slice(row, row + n)
        intervals = None if lo is None or hi is None else list(zip(lo[rows], hi[rows], strict=True))
        pairs += _pairs(a, n, m, s, intervals)
    return pairs


def _values(x: Tensor | None) -> list[int] | None:
    if x is None or x.is_meta or isinstance(x, FakeTensor):
        return None
    return x.tolist()


def _pairs(
    a: Arguments, nq: int, nk: int, start: int, intervals: list[tuple[int, int]] | None
) -> int:
    """Returns the visible pairs of one sequence."""
    left, right = a.window_left, a.window_right
    if left < 0 and right < 0 and intervals is None:
        return nq * max(0, nk - start)
    off = nk - nq if a.bottom_right else 0
    prefix = min(start + a.global_prefix, nk)
    pairs = 0
    for i in range(off, nq + off):
        lo, hi = prefix, nk
        if left >= 0:
            lo = max(lo, i - left)
        if right >= 0:
            hi = min(hi, i + right + 1)
        if intervals is not None:
            lo, hi = max(lo, intervals[i - off][0]), min(hi, intervals[i - off][1])
        if a.global_prefix and i < start + a.global_prefix:
            lo, hi = prefix, nk
        pairs += max(0, prefix - start) + max(0, hi - lo)
    return pairs
