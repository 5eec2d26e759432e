"""In which order sequences are read, how they are cut into batches, and how a batch is packed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clinattn.operator.packing import cu_seqlens_from_lengths
from clinattn.workloads.seeds import derived_seed

from .balance import filled
from .order import Order
from .sequences import Tokens, joined

BLOCK = 2**14  # places of the order that are read at once


class Batches:
    """Endless batches of at most max_tokens tokens: each epoch takes every sequence once.

    The order follows from seed and epoch, so that `epoch` and `place`, the batches of it that have
    been read, are all the state there is. count: of sequences. lengths: of those at some places
    (N,), asked for as they are read.
    """

    def __init__(
        self, count: int, lengths: Callable[[np.ndarray], np.ndarray], max_tokens: int, seed: int
    ):
        self.count, self.lengths, self.max_tokens, self.seed = count, lengths, max_tokens, seed
        self.seek(0, 0)

    def seek(self, epoch: int, place: int) -> None:
        self.epoch, self.place = epoch, place
        self.left = filled(self._drawn(epoch), self.max_tokens)
        for _ in range(place):
            next(self.left)

    def next(self) -> tuple[int, list[int]]:
        """The epoch, and which sequences."""
        batch = next(self.left, None)
        if batch is None:
            self.seek(self.epoch + 1, 0)
            batch = next(self.left)
        self.place += 1
        return self.epoch, batch

    def _drawn(self, epoch: int) -> Iterator[tuple[int, int]]:
        """The sequences of an epoch in its order, each with its length."""
        order = Order(self.count, derived_seed("order", self.seed, epoch))
        for first in range(0, self.count, BLOCK):
            found = order[np.arange(first, min(first + BLOCK, self.count))]
            yield from zip(found.tolist(), self.lengths(found).tolist(), strict=True)


def consecutive(sequences: Iterable[tuple[int, int]], max_tokens: int) -> Iterator[list[int]]:
    """Sequences, each with its length, cut before one that would make its batch too long.

    Unlike batch_by_tokens it does not sort: packed sequences need not be of like length, and a
    batch of the longest alone would be a biased sample.
    """
    batch: list[int] = []
    used = 0
    for index, length in sequences:
        if batch and used + length > max_tokens:
            yield batch
            batch, used = [], 0
        batch.append(index)
        used += length
    if batch:
        yield batch


def packed(sequences: Sequence[Tokens], device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """Token ids one after the other, and the other arguments of Encoder.encode for them."""
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    whole = joined(sequences)
    arguments: dict[str, Any] = {
        "cu_seqlens": cu_seqlens_from_lengths(lengths).to(device),
        "max_seqlen": int(lengths.max()),
    }
    if whole.days is not None:
        arguments["positions"] = whole.days.to(device)
    if whole.values is not None:
        arguments["values"] = whole.values.to(device)
    return whole.ids.to(device), arguments


def padded(sequences: Sequence[Tokens], device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """Token ids (B, N), and the other arguments of Encoder.encode for them, a row a sequence."""
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    arguments: dict[str, Any] = {
        "lengths": torch.tensor([len(tokens) for tokens in sequences], device=device),
        "layout": "padded",
    }
    days = [tokens.days for tokens in sequences if tokens.days is not None]
    values = [tokens.values for tokens in sequences if tokens.values is not None]
    for name, rows in (("positions", days), ("values", values)):
        if rows:
            arguments[name] = pad(rows).to(device)
    return pad([tokens.ids for tokens in sequences]).to(device), arguments
