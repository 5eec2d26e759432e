"""Sequences shared out over batches, and batches over ranks, so that no rank waits for long.

Batches are filled to the brim as sequences are drawn. Those of a step then have their sequences
shared out anew: as many batches, all of like cost. Both follow from the sequences alone, so that a
batch is the same on any number of ranks.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter

from clinattn.encoder import EncoderConfig

Batch = tuple[int, list[int]]  # the epoch, and which of its sequences
Cost = Callable[[int], int]


OPEN = 16  # batches that wait for a sequence that fits


def filled(sequences: Iterable[tuple[int, int]], max_tokens: int) -> Iterator[list[int]]:
    """Batches of at most max_tokens tokens; each sequence joins the fullest that has room.

    sequences: each with its length, in their order, which batches keep. Of OPEN batches the fullest
    goes where none has room: long sequences would else leave a fifth of a batch empty. Nothing is
    sorted: a batch of the longest alone would be a biased sample.
    """
    batches: list[tuple[int, list[int]]] = []  # tokens and sequences, the fullest last
    for index, length in sequences:
        fits = [place for place, (used, _) in enumerate(batches) if used + length <= max_tokens]
        if fits:
            used, batch = batches.pop(fits[-1])
        else:
            if len(batches) == OPEN:
                yield batches.pop()[1]
            used, batch = 0, []
        batch.append(index)
        used += length
        if used == max_tokens:
            yield batch
        else:
            insort(batches, (used, batch), key=itemgetter(0))
    yield from (batch for _, batch in reversed(batches))


def cost_of(config: EncoderConfig, labelled: float) -> Cost:
    """Returns a function from the tokens of a sequence to the FLOPs of its forward pass.

    labelled: the share of its tokens of which an output is computed over the vocabulary.
    """
    h, inner = config.hidden_size, config.intermediate_size
    matrices = 3 if config.activation == "geglu" else 2
    of_layer = 2 * (4 * h * h + matrices * h * inner)
    of_token = config.num_layers * of_layer + round(labelled * 2 * h * (h + config.vocab_size))
    reach = [window for window in config.windows if window is not None]
    full = len(config.windows) - len(reach)
    sides = 1 if config.causal else 2

    def cost(tokens: int) -> int:
        seen = full * (tokens * sides // 2) + sum(min(tokens, sides * w + 1) for w in reach)
        return tokens * (of_token + 4 * h * seen)

    return cost


def balanced(
    drawn: Sequence[Batch], lengths: Mapping[int, int], max_tokens: int, cost: Cost
) -> list[Batch]:
    """Returns the sequences of `drawn` in as many batches of like cost, epoch by epoch.

    Sequences of a batch keep their order. Where no such cut is found within max_tokens, or none
    that is better, the batches stay as they were drawn.
    """
    batches: list[Batch] = []
    for epoch in sorted({epoch for epoch, _ in drawn}):
        own = [indices for of, indices in drawn if of == epoch]
        batches += [(epoch, indices) for indices in _even(own, lengths, max_tokens, cost)]
    return batches


def _even(
    drawn: list[list[int]], lengths: Mapping[int, int], max_tokens: int, cost: Cost
) -> list[list[int]]:
    """The dearest sequence first, each into the cheapest batch that has room (Graham, 1969)."""
    if len(drawn) == 1:
        return drawn
    order = [index for indices in drawn for index in indices]
    costs = [cost(lengths[index]) for index in order]
    batches = [(0, number) for number in range(len(drawn))]  # a heap of cost and number
    held: list[list[int]] = [[] for _ in drawn]
    room = [max_tokens] * len(drawn)
    for place in sorted(range(len(order)), key=lambda place: -costs[place]):
        full = []
        while batches and room[batches[0][1]] < lengths[order[place]]:
            full.append(heapq.heappop(batches))
        if not batches:
            return drawn
        spent, number = batches[0]
        heapq.heapreplace(batches, (spent + costs[place], number))
        held[number].append(place)
        room[number] -= lengths[order[place]]
        for batch in full:
            heapq.heappush(batches, batch)
    if max(batches)[0] > max(sum(cost(lengths[index]) for index in batch) for batch in drawn):
        return drawn
    return [[order[place] for place in sorted(places)] for places in held]


def shares(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Returns for each rank the numbers of its batches: equally many, together of like cost.

    costs: of each batch, a multiple of `ranks` of them.
    """
    most = len(costs) // ranks
    held: list[list[int]] = [[] for _ in range(ranks)]
    spent = [0] * ranks
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        rank = min((r for r in range(ranks) if len(held[r]) < most), key=lambda r: spent[r])
        held[rank].append(number)
        spent[rank] += costs[number]
    return [sorted(numbers) for numbers in held]
