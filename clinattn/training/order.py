"""The order in which an epoch takes its sequences."""

from __future__ import annotations

import numpy as np
import torch

from clinattn.workloads.seeds import scattered

LISTED = 2**16  # sequences whose order is listed; of more it is computed, place by place
ROUNDS = 6


class Order:
    """A permutation of 0..count - 1 that follows from a seed, read by place.

    Up to LISTED it is torch.randperm's. Above, no list is held: a Feistel network of ROUNDS rounds
    permutes the numbers below a power of 4, and is applied again to what falls outside, on the way
    that Black and Rogaway call cycle walking (Ciphers with Arbitrary Finite Domains, 2002). Its
    round function is seeds.scattered.
    """

    def __init__(self, count: int, seed: int):
        self.count = count
        generator = torch.Generator().manual_seed(seed)
        self.listed: np.ndarray | None = None
        if count <= LISTED:
            self.listed = torch.randperm(count, generator=generator).numpy()
            return
        drawn = torch.randint(2**62, (ROUNDS,), generator=generator)
        self.keys = drawn.numpy().astype(np.uint64)
        self.half = np.uint64((count - 1).bit_length() + 1 >> 1)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """The numbers at some places (N,): (N,) int64."""
        if self.listed is not None:
            return self.listed[places]
        found = self._permuted(places.astype(np.uint64))
        while (outside := found >= self.count).any():
            found[outside] = self._permuted(found[outside])
        return found.astype(np.int64)

    def _permuted(self, x: np.ndarray) -> np.ndarray:
        low = (np.uint64(1) << self.half) - np.uint64(1)
        left, right = x >> self.half, x & low
        for key in self.keys:
            left, right = right, left ^ (scattered(right + key) & low)
        return (left << self.half) | right
