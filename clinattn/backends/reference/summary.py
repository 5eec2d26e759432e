"""The definition of summaries of attention weights, in plain torch and O(N) memory.

p = exp(s - lse) is formed for a block of queries at a time, as in the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clinattn.backends.call import ENTROPY, MAX, RECEIVED, RELEVANCE, TOPK, Arguments, Summary
from clinattn.backends.reference.attention import in_full_precision, probabilities
from clinattn.backends.reference.blocks import Block, SegmentedCall
from clinattn.backends.reference.scores import dot


@in_full_precision
def attention_summary(
    call: Arguments, inputs: Summary, reduce: int, top: int
) -> tuple[Tensor, Tensor]:
    """Returns (values, places) as described beside call.RECEIVED."""
    problem = SegmentedCall(call)
    if reduce < ENTROPY:
        return _columns(problem, inputs, reduce), call.q.new_empty(0, dtype=torch.int64)
    return _rows(problem, inputs, reduce, top)


def _columns(problem: SegmentedCall, inputs: Summary, reduce: int) -> Tensor:
    call = problem.args
    shape = (
        (call.q.shape[1], call.k.shape[0])
        if problem.packed
        else (*call.q.shape[:2], call.k.shape[2])
    )
    total = call.q.new_zeros(shape, dtype=problem.dtype)
    view = total[None] if problem.packed else total
    for block in problem.blocks():
        p = _probabilities(problem, block, inputs)
        if reduce != RECEIVED:
            assert inputs.do is not None
            do = problem.queries(problem.view(inputs.do), block)
            p = torch.where(p == 0, 0, p * dot(do, problem.keys(problem.v, block)))
        if reduce == RELEVANCE:
            p = p.clamp(min=0)
        if inputs.weights is not None:
            weights = problem.queries(problem.rows(inputs.weights), block)
            p = torch.where(weights == 0, 0, weights * p)
        view[problem.at_k(block)] += p.sum(-2).flatten(1, 2)
    return total


def _rows(
    problem: SegmentedCall, inputs: Summary, reduce: int, top: int
) -> tuple[Tensor, Tensor]:
    lse, q = inputs.lse, problem.q
    shape = (*lse.shape, top) if reduce == TOPK else lse.shape
    values = torch.zeros(shape, dtype=problem.dtype, device=q.device)
    places = torch.full(shape if reduce == TOPK else (0,), -1, dtype=torch.int64, device=q.device)
    by_row = [x[None] if problem.packed else x for x in (values, places)]
    for block in problem.blocks():
        p = _probabilities(problem, block, inputs)
        if reduce == ENTROPY:
            found = torch.special.entr(p).sum(-1)
        elif reduce == MAX:
            found = p.amax(-1)
        else:
            found, order = p.sort(stable=True, dim=-1, descending=True)
            found, order = found[..., :top], order[..., :top]
            keys = torch.where(found > 0, block.keys(q.device)[order], -1)
            by_row[1][(*block.at_q, slice(keys.shape[-1]))] = keys.flatten(1, 2)
            found = torch.nn.functional.pad(found, (0, top - found.shape[-1]))
        by_row[0][block.at_q] = found.flatten(1, 2)
    return values, places


def _probabilities(problem: SegmentedCall, block: Block, inputs: Summary) -> Tensor:
    return probabilities(problem, block, inputs.lse, inputs.lse_low)[0]
