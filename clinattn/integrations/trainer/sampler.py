"""Batches of sequences by a budget of tokens, as a batch_sampler of torch's DataLoader."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from clinattn.integrations.trainer.filling import batch_count, in_order, spread


class TokenBudgetSampler(Sampler[list[int]]):
    """Batches of sequences with at most max_tokens tokens, for `DataLoader(batch_sampler=...)`.

    lengths: (S,) tokens of each sequence, a list, array or tensor; see lengths_of. max_tokens: the
    budget of one batch on one process. max_length: where the collator cuts longer sequences; None
    refuses a sequence over the budget. shuffle: an order for each epoch, drawn by (seed, epoch);
    False keeps the order of the dataset. num_replicas: the number of processes; None asks
    torch.distributed, then WORLD_SIZE, when batches are first counted.

    Yields the batches of all processes: batch i is for process i % num_replicas, as accelerate
    shares them out; PackedDataLoader does so without accelerate. Every sequence is in one batch of
    an epoch. The number of batches is a multiple of num_replicas, and the same in every epoch.
    Where it shuffles, all batches have nearly the same number of tokens.

    Raises TypeError or ValueError for lengths that are no positive integers, a sequence over the
    budget, and where the sequences do not make equal numbers of batches for all processes.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Tensor,
        max_tokens: int,
        *,
        max_length: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int | None = None,
    ):
        for name, x in (("max_tokens", max_tokens), ("max_length", max_length)):
            if x is not None and (isinstance(x, bool) or not isinstance(x, int) or x < 1):
                raise ValueError(f"{name}: got {x!r}, expected a number of tokens")
        if num_replicas is not None and num_replicas < 1:
            raise ValueError(f"num_replicas: got {num_replicas}, expected a number of processes")
        self.lengths = _checked(lengths, max_tokens, max_length)
        self.max_tokens, self.max_length = max_tokens, max_length
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0
        self._replicas = num_replicas
        self._counts: dict[int, int] = {}

    @property
    def num_replicas(self) -> int:
        return processes() if self._replicas is None else self._replicas

    @property
    def sampler(self) -> TokenBudgetSampler:
        """The sampler itself: where accelerate and Lightning look for set_epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        n = self.num_replicas
        if n not in self._counts:
            self._counts[n] = (
                batch_count(self.lengths, self.max_tokens, n)
                if self.shuffle
                else len(in_order(self.lengths, self.max_tokens, n))
            )
        return self._counts[n]

    def __iter__(self) -> Iterator[list[int]]:
        if not self.shuffle:
            return iter(in_order(self.lengths, self.max_tokens, self.num_replicas))
        digest = hashlib.blake2b(f"{self.seed} {self.epoch}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return iter(spread(self.lengths, self.max_tokens, len(self), generator))

    def fingerprint(self) -> dict[str, Any]:
        """Facts that the order of batches follows from, the epoch apart."""
        digest = hashlib.blake2b(torch.tensor(self.lengths).numpy().tobytes(), digest_size=8)
        return {
            "lengths": digest.hexdigest(),
            "max_tokens": self.max_tokens,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "num_replicas": self.num_replicas,
        }


def processes() -> int:
    """The number of processes that share the work."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))


def this_process() -> int:
    """The rank of this process, from 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", 0))


def _checked(lengths: Sequence[int] | Tensor, max_tokens: int, max_length: int | None) -> list[int]:
    x = torch.as_tensor(lengths)
    if x.dim() != 1 or not len(x) or x.is_floating_point() or x.is_complex():
        raise TypeError(
            f"lengths: got shape {tuple(x.shape)} of {x.dtype}, expected integers (S,), one for "
            "each sequence"
        )
    if int(x.min()) < 1:
        raise ValueError(f"lengths: sequence {int(x.argmin())} has no tokens")
    if max_length is not None:
        x = x.clamp(max=max_length)
    if int(x.max()) > max_tokens:
        raise ValueError(
            f"lengths: sequence {int(x.argmax())} has {int(x.max())} tokens, over "
            f"max_tokens={max_tokens}; expected a larger budget, or a max_length within it, at "
            "which the collator cuts"
        )
    return x.tolist()
