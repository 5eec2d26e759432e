"""Keys and values on their way to the queries of other processes, and their gradients back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from clinattn.parallel.plan import Piece, Plan, Range
from clinattn.parallel.processes import Message, Processes

Pair = tuple[Tensor, Tensor]  # k (B, n, Hkv, D) and v (B, n, Hkv, Dv), or their gradients


def at(pair: Pair, places: slice) -> Pair:
    k, v = (x[:, places].contiguous() for x in pair)
    return k, v


def room(like: Pair, tokens: int) -> Pair:
    """Returns unwritten keys and values of so many tokens."""
    k, v = (x.new_empty((len(x), tokens, *x.shape[2:])) for x in like)
    return k, v


def to(process: int, pair: Pair) -> list[Message]:
    return [(process, x) for x in pair]


class Collected:
    """The keys and values of a piece, asked for when made; `pair` waits for those of others.

    received: those of an earlier Collected; then nothing is sent.
    """

    def __init__(
        self,
        processes: Processes,
        plan: Plan,
        piece: Piece,
        own: Pair,
        received: Iterator[Tensor] | None = None,
    ):
        self._own, self._shard, self._piece = own, plan.shard, piece
        self._others: list[tuple[Range, Pair]] = []
        sends: list[Message] = []
        receives: list[Message] = []
        for owner, taken, other, given in plan.others(piece):
            if given.length and received is None:
                sends += to(other, at(own, given.since(plan.shard.begin)))
            if taken.length and received is None:
                self._others.append((taken, room(own, taken.length)))
                receives += to(owner, self._others[-1][1])
            elif taken.length and received is not None:
                self._others.append((taken, (next(received), next(received))))
        self._pending = processes.start(sends, receives)

    @property
    def received(self) -> list[Tensor]:
        """The keys and values of others."""
        return [x for _, pair in self._others for x in pair]

    def pair(self) -> Pair:
        """Returns k and v (B, keys of the piece, ...). What stands before the first key is 0."""
        self._pending.wait()
        keys, parts = self._piece.keys, list(self._others)
        if not keys.length:
            return at(self._own, slice(0, 0))
        if 0 in self._piece.distances and (own := keys.meet(self._shard)).length:
            k, v = (x[:, own.since(self._shard.begin)] for x in self._own)
            parts.append((own, (k, v)))
        if len(parts) == 1 and parts[0][0] == keys:
            return parts[0][1]
        first = min(x.begin for x, _ in parts)
        whole = room(self._own, keys.length)
        for n, x in enumerate(whole):
            x[:, : first - keys.begin] = 0
            for places, pair in parts:
                x[:, places.since(keys.begin)] = pair[n]
        return whole


class Returned:
    """Gradients of a piece's keys and values, sent to the owners when made."""

    def __init__(self, processes: Processes, plan: Plan, piece: Piece, grads: Pair):
        self._shard = plan.shard
        self._others: list[tuple[Range, Pair]] = []
        sends: list[Message] = []
        receives: list[Message] = []
        for owner, taken, other, given in plan.others(piece):
            if taken.length:
                sends += to(owner, at(grads, taken.since(piece.keys.begin)))
            if given.length:
                self._others.append((given, room(grads, given.length)))
                receives += to(other, self._others[-1][1])
        self._pending = processes.start(sends, receives)

    def add_to(self, sums: Pair) -> None:
        """Adds what the others sent to the sums (B, n, ...) of this process, in a fixed order."""
        self._pending.wait()
        for places, pair in self._others:
            for whole, part in zip(sums, pair, strict=True):
                whole[:, places.since(self._shard.begin)] += part


def pieces(
    processes: Processes, plan: Plan, own: Pair, received: Iterator[Tensor] | None = None
) -> Iterator[tuple[Piece, Collected]]:
    """Yields the pieces of a plan, of which the next one is under way."""
    made = (Collected(processes, plan, piece, own, received) for piece in plan.pieces)
    ahead: Any = next(made)
    for piece in plan.pieces:
        now, ahead = ahead, next(made, None)
        yield piece, now
        del now
