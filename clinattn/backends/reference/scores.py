"""Scores of a block, what is added to them, dropout, and the gradients of what is added."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clinattn.backends.call import NEEDS, Arguments
from clinattn.backends.reference.blocks import Block, SegmentedCall
from clinattn.backends.reference.philox import keep_mask, kept_scale


class Added(NamedTuple):
    """Tensors that scores are linear in; also their cotangents and gradients. In order of NEEDS."""

    mask: Tensor | None
    decay: Tensor | None
    slopes: Tensor | None
    relative: Tensor | None


def added_of(a: Arguments) -> Added:
    mask = None if a.mask is None or a.mask.dtype == torch.bool else a.mask
    return Added(mask, a.decay, a.slopes, a.relative)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """(b, Hkv, G, rows, D), (b, Hkv, keys, D) -> (b, Hkv, G, rows, keys)."""
    return (x.flatten(2, 3) @ y.mT).unflatten(2, x.shape[2:4])


def time_distance(problem: SegmentedCall, block: Block) -> Tensor:
    """(b, 1, rows, keys): |t_i - t_j|."""
    times = problem.args.times
    assert times is not None
    times = times[None] if problem.packed else times
    batch, _, rows = block.at_q
    t_i, t_j = times[batch, rows], times[batch, problem.at_k(block)[2]]
    return (t_i[:, None, :, None] - t_j[:, None, None, :]).abs()


def reach(relative: Tensor) -> int:
    """L of a (H, 2 L + 1) bias."""
    return relative.shape[1] // 2


def sum_of_added(problem: SegmentedCall, block: Block, added: Added) -> Tensor | None:
    """Sum of terms for a block's scores, broadcasting to (b, Hkv, G, rows, keys); None for none."""
    terms = []
    device = problem.device
    if added.mask is not None:
        terms.append(added.mask[problem.mask_index(block)].to(problem.dtype))
    if added.relative is not None:
        far = reach(added.relative)
        terms.append(added.relative[None, :, block.ahead(device).clamp(-far, far) + far])
    if added.slopes is not None:
        seg = block.segment
        at = slice(seg.sequence, seg.sequence + seg.batch.stop - seg.batch.start)
        slopes = added.slopes[at if added.slopes.shape[0] > 1 else slice(None)]
        terms.append(-slopes[..., None, None] * block.ahead(device).abs())
    if added.decay is not None:
        terms.append(-added.decay[:, None, None] * time_distance(problem, block))
    total = None
    for term in map(problem.grouped, terms):
        total = term if total is None else total + term
    return total


class Scores(NamedTuple):
    """s of a block, -inf where nothing is seen, with the softcap's first two derivatives."""

    s: Tensor
    slope: Tensor | float
    curvature: Tensor | float


def scores(problem: SegmentedCall, block: Block) -> Scores:
    a = problem.args
    s = dot(problem.queries(problem.q, block), problem.keys(problem.k, block)) * a.scale
    slope: Tensor | float = 1.0
    curvature: Tensor | float = 0.0
    if a.softcap:
        t = torch.tanh(s / a.softcap)
        s, slope = a.softcap * t, 1 - t * t
        curvature = -2 / a.softcap * t * slope
    more = sum_of_added(problem, block, added_of(a))
    if more is not None:
        s = s + more
    if block.visible is not None:
        s = torch.where(block.visible, s, -float("inf"))
    return Scores(s, slope, curvature)


def kept(problem: SegmentedCall, block: Block) -> Tensor | float:
    """The factor of dropout on a block of probabilities: 0, or 1 / (1 - dropout_p)."""
    a = problem.args
    if a.seed is None:
        return 1.0
    seg, device = block.segment, problem.device
    sequences = torch.arange(seg.batch.stop - seg.batch.start, device=device) + seg.sequence
    heads = torch.arange(problem.q.shape[1], device=device)
    keep = keep_mask(a.seed, a.dropout_p, sequences, heads, block.rows(device), block.keys(device))
    return problem.grouped(keep.to(problem.dtype) * kept_scale(a.dropout_p))


class AddedGradients:
    """Sums the gradients of scores into those of what was added to them."""

    def __init__(self, problem: SegmentedCall, needs: int) -> None:
        self.problem = problem
        self.totals = Added(
            *(
                x.new_zeros(x.shape, dtype=problem.dtype) if x is not None and needs & bit else None
                for x, bit in zip(added_of(problem.args), NEEDS.values(), strict=True)
            )
        )

    def add(self, block: Block, ds: Tensor) -> None:
        """Adds the share of a block from the gradient ds (b, Hkv, G, rows, keys) of its scores."""
        if all(total is None for total in self.totals):
            return
        mask, decay, slopes, relative = self.totals
        ds = ds.flatten(1, 2)  # (b, H, rows, keys)
        device = self.problem.device
        if mask is not None:
            shared = [dim for dim, size in enumerate(mask.shape) if size == 1]
            mask[self.problem.mask_index(block)] += ds.sum(shared, keepdim=True) if shared else ds
        if decay is not None:
            decay -= (ds * time_distance(self.problem, block)).sum((0, 2, 3))
        if slopes is not None:
            total = (ds * block.ahead(device).abs()).sum((2, 3))
            first = block.segment.sequence if slopes.shape[0] > 1 else 0
            if slopes.shape[0] == 1:
                total = total.sum(0, keepdim=True)
            slopes[first : first + len(total)] -= total
        if relative is not None:
            at = 0
            for span in block.spans:
                part = ds[..., at : at + len(span)].sum(0)
                add_diagonals(relative, part, span.start - block.i.start - block.offset)
                at += len(span)

    def results(self) -> list[Tensor]:
        """Gradients in the dtypes of their tensors; empty where `needs` leaves them out."""
        given = added_of(self.problem.args)
        return [
            self.problem.args.q.new_empty(0) if total is None or x is None else total.to(x.dtype)
            for total, x in zip(self.totals, given, strict=True)
        ]


def add_diagonals(relative: Tensor, ds: Tensor, first: int) -> None:
    """Sums over the diagonals of ds (H, rows, keys), whose (0, 0) is at distance `first`.

    Skewed so that diagonals become columns: sums in a fixed order, which an index_add has not.
    """
    heads, rows, keys = ds.shape
    skewed = torch.nn.functional.pad(ds.flip(1), (0, rows)).flatten(1)[:, :-rows]
    sums = skewed.view(heads, rows, rows + keys - 1).sum(1)
    far = reach(relative)
    # sums[:, c] is at the distance c - behind
    behind = rows - 1 - first
    low = min(max(behind - far + 1, 0), sums.shape[1])
    high = max(min(behind + far, sums.shape[1]), low)
    relative[:, 0] += sums[:, :low].sum(1)
    relative[:, -1] += sums[:, high:].sum(1)
    at = low - behind + far
    relative[:, at : at + high - low] += sums[:, low:high]
