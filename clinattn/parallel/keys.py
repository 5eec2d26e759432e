"""Keys and values on their way to the queries of other processes, and their gradients back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from clinattn.parallel.plan import Piece, Plan, Range
from clinattn.parallel.processes import Message, Processes

Pair = tuple[Tensor, Tensor]  # k (B, n, Hkv, D) and v (B, n, Hkv, Dv), or their gradients


def joined(pair: Pair, places: slice) -> Tensor:
    """Returns the keys and values at some places as one message."""
    return torch.cat([x[:, places].reshape(-1) for x in pair])


def parted(message: Tensor, like: Pair, tokens: int) -> Pair:
    """Returns the keys and values of a message, as views."""
    shapes = [(len(x), tokens, *x.shape[2:]) for x in like]
    k, v = message.split([torch.Size(shape).numel() for shape in shapes])
    return k.view(shapes[0]), v.view(shapes[1])


def room(like: Pair, tokens: int) -> Tensor:
    """Returns an unwritten message for so many tokens."""
    return like[0].new_empty(sum(len(x) * x.shape[2:].numel() for x in like) * tokens)


class Collected:
    """The keys and values of a piece, asked for when made; `pair` waits for those of others.

    received: the messages of an earlier Collected; then nothing is sent.
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
        self._others: list[tuple[Range, Tensor]] = []
        sends: list[Message] = []
        receives: list[Message] = []
        for owner, taken, other, given in plan.others(piece):
            if given.length and received is None:
                sends.append((other, joined(own, given.since(plan.shard.begin))))
            if taken.length and received is None:
                self._others.append((taken, room(own, taken.length)))
                receives.append((owner, self._others[-1][1]))
            elif taken.length:
                self._others.append((taken, next(received)))
        self._pending = processes.start(sends, receives)

    @property
    def messages(self) -> list[Tensor]:
        """What was received, or will be."""
        return [x for _, x in self._others]

    def pair(self) -> Pair:
        """Returns k and v (B, keys of the piece, ...). What stands before the first key is 0."""
        self._pending.wait()
        keys = self._piece.keys
        if not keys.length:
            return self._own[0][:, :0], self._own[1][:, :0]
        parts = [(x, parted(message, self._own, x.length)) for x, message in self._others]
        if 0 in self._piece.distances and (own := keys.meet(self._shard)).length:
            k, v = (x[:, own.since(self._shard.begin)] for x in self._own)
            parts.append((own, (k, v)))
        if len(parts) == 1 and parts[0][0] == keys:
            return parts[0][1]
        first = min(x.begin for x, _ in parts)
        k, v = (x.new_empty((len(x), keys.length, *x.shape[2:])) for x in self._own)
        for n, whole in enumerate((k, v)):
            whole[:, : first - keys.begin] = 0
            for x, pair in parts:
                whole[:, x.since(keys.begin)] = pair[n]
        return k, v


class Returned:
    """Gradients of a piece's keys and values, sent to the owners when made."""

    def __init__(self, processes: Processes, plan: Plan, piece: Piece, grads: Pair):
        self._shard, self._like = plan.shard, grads
        self._others: list[tuple[Range, Tensor]] = []
        sends: list[Message] = []
        receives: list[Message] = []
        for owner, taken, other, given in plan.others(piece):
            if taken.length:
                sends.append((owner, joined(grads, taken.since(piece.keys.begin))))
            if given.length:
                self._others.append((given, room(grads, given.length)))
                receives.append((other, self._others[-1][1]))
        self._pending = processes.start(sends, receives)

    def add_to(self, sums: Pair) -> None:
        """Adds what the others sent to the sums (B, n, ...) of this process, in a fixed order."""
        self._pending.wait()
        for x, message in self._others:
            for whole, part in zip(sums, parted(message, self._like, x.length), strict=True):
                whole[:, x.since(self._shard.begin)] += part


def pieces(
    processes: Processes, plan: Plan, own: Pair, received: Iterator[Tensor] | None = None
) -> Iterator[tuple[Piece, Collected]]:
    """Yields the pieces of a plan, of which the next one is under way."""
    made = (Collected(processes, plan, piece, own, received) for piece in plan.pieces)
    ahead = next(made)
    for piece in plan.pieces:
        now, ahead = ahead, next(made, ahead)
        yield piece, now
