"""S_dmask: the matrix of probabilities that shows, for tests, which pairs dropout took."""

from __future__ import annotations

import torch
from torch import Tensor

from clinattn.backends.call import Arguments
from clinattn.backends.reference.attention import in_full_precision, probabilities
from clinattn.backends.reference.blocks import SegmentedCall
from clinattn.backends.reference.scores import kept

MULTIPLE = 128  # of both of its sides, in flash-attn too


def rounded(n: int) -> int:
    return -(-n // MULTIPLE) * MULTIPLE


@in_full_precision
def s_dmask(call: Arguments, lse: Tensor) -> Tensor:
    """(batch, heads, seqlen_q, seqlen_k), both rounded up to a multiple of 128, in the dtype of q.

    The softmax of each pair, with a minus sign if the pair was dropped; 0 for pairs that are not
    seen. Queries and keys count from the start of their sequence. lse: of the call's forward pass.
    Takes O(N^2) memory: a call without it takes none.
    """
    problem = SegmentedCall(call)
    batch = len(problem.segments) if problem.packed else call.q.shape[0]
    sides = rounded(int(call.max_seqlen_q)), rounded(int(call.max_seqlen_k))
    result = call.q.new_zeros(batch, problem.q.shape[1], *sides)
    for block in problem.blocks():
        p, _ = probabilities(problem, block, lse, None)
        p = torch.where(torch.as_tensor(kept(problem, block)) > 0, p, -p).flatten(1, 2)
        segment = block.segment
        several = segment.batch.stop - segment.batch.start
        sequences = slice(segment.sequence, segment.sequence + several)
        rows, keys = slice(block.i.start, block.i.stop), block.key_index(0, problem.device)
        result[sequences, :, rows, keys] = p.to(result.dtype)
    return result
