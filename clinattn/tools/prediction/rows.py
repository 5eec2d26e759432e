"""The sequences to predict for: whose they are, when, what is known of the outcome, and tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clinattn.training.sequences import Tokens

Progress = Callable[[str, int, int], None]
SHOWN = 1000  # rows between two words on progress


@dataclass(frozen=True)
class Rows:
    """The rows of a file of predictions, in their order.

    title: the data, for people and the file. sequences: of a row, made when they are asked for;
    several are the windows of a note. columns: of the file, by name, besides predictions.
    outcomes: (R,) the known outcome of each row, True or False, a class or a number, else None.
    unit: what a row is. notes: lines on what was chosen and left out.
    """

    title: str
    unit: str
    sequences: Callable[[int], Sequence[Tokens]]
    columns: dict[str, Any]
    outcomes: Sequence[Any]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.outcomes)

    def measured(self, progress: Progress) -> tuple[np.ndarray, str]:
        """Tokens of each row (R,) int64, and a hash that is the same for the same rows."""
        digest = hashlib.blake2b(digest_size=16)
        lengths = np.zeros(len(self), dtype=np.int64)
        for name, column in self.columns.items():
            digest.update(f"{name} {list(column)!r}".encode())
        digest.update(repr(list(self.outcomes)).encode())
        for index in range(len(self)):
            if index % SHOWN == 0:
                progress(f"read: {index:,} of {len(self):,} rows", index, len(self))
            for tokens in self.sequences(index):
                lengths[index] += len(tokens)
                digest.update(f"{len(tokens)} ".encode())
                for field in (tokens.ids, tokens.days, tokens.values):
                    digest.update(b"-" if field is None else field.numpy().tobytes())
        return lengths, digest.hexdigest()
