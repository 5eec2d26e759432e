"""In which order sequences are read, how they are cut into batches, and how a batch is packed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clinattn.operator.packing import cu_seqlens_from_lengths
from clinattn.workloads.seeds import derived_seed

from .data import Tokens, joined


class Batches:
    """Endless batches of at most max_tokens tokens: each epoch takes every sequence once.

    The order follows from seed and epoch, so that `epoch` and `place`, the batches of it that have
    been read, are all the state there is.
    """

    def __init__(self, lengths: list[int], max_tokens: int, seed: int):
        self.lengths, self.max_tokens, self.seed = lengths, max_tokens, seed
        self.seek(0, 0)

    def seek(self, epoch: int, place: int) -> None:
        self.epoch, self.place = epoch, place
        generator = torch.Generator().manual_seed(derived_seed("order", self.seed, epoch))
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        self.batches = consecutive(order, self.lengths, self.max_tokens)

    def next(self) -> tuple[int, list[int]]:
        """The epoch, and which sequences."""
        if self.place == len(self.batches):
            self.seek(self.epoch + 1, 0)
        self.place += 1
        return self.epoch, self.batches[self.place - 1]


def consecutive(order: list[int], lengths: list[int], max_tokens: int) -> list[list[int]]:
    """`order` cut before each sequence that would make its batch longer than max_tokens.

    Unlike batch_by_tokens it does not sort: packed sequences need not be of like length, and a
    batch of the longest alone would be a biased sample.
    """
    batches: list[list[int]] = []
    used = max_tokens
    for index in order:
        if used + lengths[index] > max_tokens:
            batches.append([])
            used = 0
        batches[-1].append(index)
        used += lengths[index]
    return batches


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
