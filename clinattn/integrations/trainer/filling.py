"""Sequences put into batches of at most so many tokens, the same number of batches every epoch."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor


def batch_count(lengths: list[int], max_tokens: int, multiple: int) -> int:
    """Returns how many batches the sequences need, a multiple of `multiple`.

    It depends on the lengths alone: `spread` fills as many in every epoch. Raises ValueError where
    no such number of batches has a sequence in each.
    """
    by_length = sorted(lengths, reverse=True)
    count = _rounded_up(-(-sum(lengths) // max_tokens), multiple)
    most = len(lengths) // multiple * multiple
    while count <= most:
        loads = [0] * count
        for length in by_length:
            heapq.heapreplace(loads, loads[0] + length)
        if max(loads) <= max_tokens:
            return count
        if count == most:
            break
        count = min(_rounded_up(count + 1 + count // 100, multiple), most)
    raise _uneven(lengths, max_tokens, multiple)


def spread(
    lengths: list[int], max_tokens: int, count: int, generator: torch.Generator
) -> list[list[int]]:
    """Returns `count` batches of nearly equal numbers of tokens, drawn by the generator.

    Each sequence goes to the batch with the fewest tokens, the long ones first: those of 1,024 to
    2,047 tokens in random order, then those of 512 to 1,023, and so on. Where such a draw is over
    the budget, sequences go in order of length, which batch_count has seen to fit.
    """
    x = torch.tensor(lengths)
    shuffled = torch.randperm(len(lengths), generator=generator)
    octave = x[shuffled].double().log2().floor()
    by_octave = shuffled[octave.argsort(descending=True, stable=True)]
    batches = _least_loaded(by_octave, lengths, count)
    if max(sum(lengths[i] for i in batch) for batch in batches) > max_tokens:
        by_length = shuffled[x[shuffled].argsort(descending=True, stable=True)]
        batches = _least_loaded(by_length, lengths, count)
    return [batches[i] for i in torch.randperm(count, generator=generator).tolist()]


def in_order(lengths: list[int], max_tokens: int, multiple: int) -> list[list[int]]:
    """Returns batches of neighbours, in the order of the sequences.

    Batches with most tokens are halved until their number is a multiple of `multiple`. Raises
    ValueError where no such number of batches has a sequence in each.
    """
    cuts, tokens = [0], 0
    for i, length in enumerate(lengths):
        if tokens + length > max_tokens:
            cuts.append(i)
            tokens = 0
        tokens += length
    ends = [*cuts[1:], len(lengths)]
    if len(cuts) + (-len(cuts) % multiple) > len(lengths):
        raise _uneven(lengths, max_tokens, multiple)
    heap = [(-sum(lengths[a:b]), a, b) for a, b in zip(cuts, ends, strict=True) if b - a > 1]
    heapq.heapify(heap)
    for _ in range(-len(cuts) % multiple):
        _, a, b = heapq.heappop(heap)
        middle = (a + b) // 2
        cuts.append(middle)
        for c, d in ((a, middle), (middle, b)):
            if d - c > 1:
                heapq.heappush(heap, (-sum(lengths[c:d]), c, d))
    cuts.sort()
    ends = [*cuts[1:], len(lengths)]
    return [list(range(a, b)) for a, b in zip(cuts, ends, strict=True)]


def _least_loaded(order: Tensor, lengths: list[int], count: int) -> list[list[int]]:
    batches: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, i) for i in range(count)]
    for sequence in order.tolist():
        tokens, i = loads[0]
        batches[i].append(sequence)
        heapq.heapreplace(loads, (tokens + lengths[sequence], i))
    return batches


def _rounded_up(x: int, multiple: int) -> int:
    return max(-(-x // multiple), 1) * multiple


def _uneven(lengths: list[int], max_tokens: int, multiple: int) -> ValueError:
    return ValueError(
        f"max_tokens={max_tokens}: {len(lengths)} sequences of up to {max(lengths)} tokens do not "
        f"make the same number of batches for each of {multiple} processes, none of them empty and "
        f"no sequence twice; expected at least twice the longest sequence, or other data"
    )
