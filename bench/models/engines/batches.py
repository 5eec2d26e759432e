"""Sequences as batches: padded in the order given, padded after sorting by length, or packed.

numpy alone, since the processes of apart.py are read for what an engine itself brings along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Token ids of some sequences.

    ids: (B, N) int64, zeros in the padding; packed: (1, sum of lengths). lengths: (B,) int64.
    places: (B,) int64, which of all sequences they are.
    """

    ids: np.ndarray
    lengths: np.ndarray
    places: np.ndarray
    packed: bool = False

    def mask(self) -> np.ndarray:
        """(B, N) int64, 1 for a token and 0 for padding."""
        return (np.arange(self.ids.shape[1]) < self.lengths[:, None]).astype(np.int64)

    @property
    def full(self) -> bool:
        """Returns whether the batch has no padding."""
        return self.ids.size == int(self.lengths.sum())

    def rows(self, output: np.ndarray) -> list[np.ndarray]:
        """Copies of the real tokens of an output (B, N, C), (length, C) for each sequence."""
        if self.packed:
            return [x.copy() for x in np.split(output[0], np.cumsum(self.lengths)[:-1])]
        return [output[i, :n].copy() for i, n in enumerate(self.lengths)]


def padded(sequences: Sequence[np.ndarray], size: int) -> list[Batch]:
    """Batches of `size` sequences in the order given, each padded to its longest."""
    return [_pad(sequences, order) for order in _cut(np.arange(len(sequences)), size)]


def by_length(sequences: Sequence[np.ndarray], size: int) -> list[Batch]:
    """Batches of `size` sequences of similar length, each padded to its longest."""
    order = np.argsort([len(x) for x in sequences], kind="stable")
    return [_pad(sequences, own) for own in _cut(order, size)]


def packed(sequences: Sequence[np.ndarray], size: int) -> list[Batch]:
    """Batches of `size` sequences in the order given, one after the other in a row."""
    return [
        Batch(
            np.concatenate([sequences[i] for i in own])[None], _lengths(sequences, own), own, True
        )
        for own in _cut(np.arange(len(sequences)), size)
    ]


BATCHINGS: dict[str, Callable[[Sequence[np.ndarray], int], list[Batch]]] = {
    "padded": padded,
    "sorted": by_length,
    "packed": packed,
}


def outputs(batches: Sequence[Batch], run: Callable[[Batch], Any]) -> list[np.ndarray]:
    """The real tokens' outputs (length, C) of every sequence, in the order of the sequences.

    What `run` returns for a batch is copied before the next batch is run.
    """
    found: dict[int, np.ndarray] = {}
    for batch in batches:
        rows = batch.rows(as_numpy(run(batch)))
        found.update(zip(batch.places.tolist(), rows, strict=True))
    return [found[i] for i in range(len(found))]


def as_numpy(output: Any) -> np.ndarray:
    """fp32 of a tensor or an array."""
    return output.float().numpy() if hasattr(output, "numpy") else np.asarray(output, np.float32)


def padding_share(batches: Sequence[Batch]) -> float:
    return 1 - sum(int(x.lengths.sum()) for x in batches) / sum(x.ids.size for x in batches)


def save(batch: Batch, path: Path) -> None:
    np.savez(path, **batch._asdict())


def load(path: Path) -> Batch:
    found = np.load(path)
    return Batch(found["ids"], found["lengths"], found["places"], bool(found["packed"]))


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[i : i + size] for i in range(0, len(order), size)]


def _lengths(sequences: Sequence[np.ndarray], own: np.ndarray) -> np.ndarray:
    return np.array([len(sequences[i]) for i in own], dtype=np.int64)


def _pad(sequences: Sequence[np.ndarray], own: np.ndarray) -> Batch:
    lengths = _lengths(sequences, own)
    ids = np.zeros((len(own), lengths.max()), dtype=np.int64)
    for row, i in zip(ids, own, strict=True):
        row[: len(sequences[i])] = sequences[i]
    return Batch(ids, lengths, own)
