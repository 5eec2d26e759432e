"""The plan of a call: ranges of keys that other processes send, and the call of the op for each.

Every process works out the ranges of all: nobody asks for keys, their owners send them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clinattn.backends.call import Arguments
from clinattn.parallel.documents import Documents, Seen, Sides, seen

# Keys of a document lie in tiles of this size, or of one that divides it, in every backend. The
# keys that a process collects begin with a tile, so that sums are those of the whole sequence.
TILE = 256


class Range(NamedTuple):
    """The tokens [begin, end) of every row."""

    begin: int
    end: int

    @property
    def length(self) -> int:
        return max(0, self.end - self.begin)

    def meet(self, other: Range) -> Range:
        begin = max(self.begin, other.begin)
        return Range(begin, max(begin, min(self.end, other.end)))

    def since(self, begin: int) -> slice:
        """Returns the places in a tensor that starts with the token `begin`."""
        return slice(self.begin - begin, self.end - begin)


class Layout(NamedTuple):
    """Tensor arguments of a packed call, on the device, and the longest sequences."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    lo: Tensor | None
    hi: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int

    def call(self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> Arguments:
        return Arguments(q, k, v, scale=scale, softcap=softcap, **self._asdict())


class Piece(NamedTuple):
    """Keys that are attended to at once, in a buffer of the range `keys`.

    distances: they are those of the processes so many places before this one. layout: None where
    there are no keys.
    """

    keys: Range
    distances: range
    layout: Layout | None


def shards(sizes: Sequence[int]) -> list[Range]:
    """Returns the range of each process."""
    begins = [sum(sizes[:n]) for n in range(len(sizes))]
    return [Range(begin, begin + n) for begin, n in zip(begins, sizes, strict=True)]


def needed(documents: Documents, sides: Sides, shard: Range) -> Range:
    """Returns the keys that queries of a shard see, by their windows."""
    if shard.length == 0 or documents.rows == 0:
        return Range(shard.begin, shard.begin)
    ends = seen(documents, sides, torch.tensor((shard.begin, shard.end - 1)))
    begin, end = int(ends.lo[:, 0].min()), int(ends.hi[:, 1].max())
    return Range(begin, max(begin, end))


def tile_start(documents: Documents, shard: Range, begin: int) -> int:
    """Returns where the tile of the key `begin` starts in the document that the shard starts in."""
    start = int(documents.start[documents.at(torch.tensor([shard.begin]))[0, 0]])
    return begin - (begin - start) % TILE


def cu_seqlens(begins: Tensor, total: int) -> Tensor:
    return torch.cat((begins, begins.new_full((1,), total)))


def layout(
    documents: Documents, shard: Range, visible: Seen, keys: Range, device: torch.device
) -> Layout:
    """Returns the call of a shard's queries to the keys in a range, which lie in a buffer."""
    local = documents.within(*shard)
    row, start, end = (x[local] for x in (documents.row, documents.start, documents.end))
    cu_q = cu_seqlens(
        row * shard.length + start.clamp(*shard) - shard.begin, documents.rows * shard.length
    )
    cu_k = cu_seqlens(
        row * keys.length + start.clamp(*keys) - keys.begin, documents.rows * keys.length
    )
    first, last = (x.clamp(*keys)[visible.document] for x in (documents.start, documents.end))
    lo, hi = (x.clamp(first, last) - first for x in (visible.lo, visible.hi))
    everything = bool((lo == 0).all()) and bool((hi == last - first).all())
    return on_device(cu_q, cu_k, None if everything else (lo, hi), device)


def on_device(
    cu_q: Tensor, cu_k: Tensor, interval: tuple[Tensor, Tensor] | None, device: torch.device
) -> Layout:
    def sent(x: Tensor) -> Tensor:
        return x.flatten().to(device=device, dtype=torch.int32)

    lo, hi = (None, None) if interval is None else map(sent, interval)
    longest = (int(x.diff().max()) if len(x) > 1 else 0 for x in (cu_q, cu_k))
    return Layout(sent(cu_q), sent(cu_k), lo, hi, *longest)


class Plan(NamedTuple):
    """A call of one process: `pieces` of keys, its rank, and what every process has and needs."""

    rank: int
    shards: list[Range]
    needs: list[Range]
    pieces: list[Piece]

    @property
    def shard(self) -> Range:
        return self.shards[self.rank]

    def others(self, piece: Piece) -> list[tuple[int, Range, int, Range]]:
        """Returns, by distance, an owner and its keys for this process, and another one and the
        keys of this process for it.
        """
        size, found = len(self.shards), []
        for distance in piece.distances:
            owner, other = (self.rank - distance) % size, (self.rank + distance) % size
            if distance:
                taken = self.needs[self.rank].meet(self.shards[owner])
                given = self.needs[other].meet(self.shard)
                found.append((owner, taken, other, given))
        return found


def plan(
    documents: Documents,
    sides: Sides,
    visible: Seen,
    all_shards: list[Range],
    rank: int,
    at_once: bool,
    device: torch.device,
) -> Plan:
    """at_once: collects all keys before attention; else those of one process after the other."""
    shard, size = all_shards[rank], len(all_shards)
    needs = [needed(documents, sides, x) for x in all_shards]
    pieces = []
    for distances in [range(size)] if at_once else [range(n, n + 1) for n in range(size)]:
        keys = needs[rank]
        if at_once and keys.length:
            keys = Range(tile_start(documents, shard, keys.begin), keys.end)
        elif not at_once:
            keys = keys.meet(all_shards[(rank - distances[0]) % size])
        of_keys = layout(documents, shard, visible, keys, device) if keys.length else None
        pieces.append(Piece(keys, distances, of_keys))
    return Plan(rank, all_shards, needs, pieces)
