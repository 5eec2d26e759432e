"""The sequences of a split: held in memory, or made when they are read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from clinattn.encoder.heads import IGNORE
from clinattn.workloads.seeds import derived_seed

from .order import Order
from .sequences import Digest, Example


class Examples(Sequence[Example]):
    """Sequences of a split, made when they are read; what is asked about many is an array.

    at: numbers of examples (N,); None for all.
    """

    def __getitem__(self, at: Any) -> Any:
        """An example, or those of a slice."""
        if isinstance(at, slice):
            return Listed(self.make(i) for i in range(*at.indices(len(self))))
        if not -len(self) <= at < len(self):
            raise IndexError(f"{at} of {len(self)} sequences")
        return self.make(int(at) % len(self))

    @abstractmethod
    def make(self, index: int) -> Example: ...

    @abstractmethod
    def lengths(self, at: np.ndarray | None = None) -> np.ndarray:
        """Tokens of each, (N,) int64."""

    @abstractmethod
    def subjects(self, at: np.ndarray | None = None) -> np.ndarray:
        """The subject of each, (N,) int64."""

    @abstractmethod
    def starts(self, at: np.ndarray | None = None) -> np.ndarray:
        """The place in each where its events or words begin, (N,) int64."""

    def labels(self, at: np.ndarray | None = None) -> np.ndarray:
        """The label of each, (N,), as in Example."""
        return np.full(len(self) if at is None else len(at), IGNORE)

    def first(self) -> np.ndarray:
        """(N,) bool: those that are no later window of a note."""
        return np.ones(len(self), dtype=bool)

    @abstractmethod
    def feed(self, digest: Digest) -> None:
        """Tells a hash what the sequences are, and whose."""


class Listed(Examples):
    """Examples that are held in memory."""

    def __init__(self, examples: Iterable[Example]):
        self.examples = list(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def make(self, index: int) -> Example:
        return self.examples[index]

    def _of(self, name: str, at: np.ndarray | None) -> np.ndarray:
        kept = range(len(self)) if at is None else at.tolist()
        return np.array([getattr(self.examples[i], name) for i in kept])

    def lengths(self, at: np.ndarray | None = None) -> np.ndarray:
        kept = range(len(self)) if at is None else at.tolist()
        return np.array([len(self.examples[i]) for i in kept], dtype=np.int64)

    def subjects(self, at: np.ndarray | None = None) -> np.ndarray:
        return self._of("subject", at)

    def starts(self, at: np.ndarray | None = None) -> np.ndarray:
        return self._of("start", at)

    def labels(self, at: np.ndarray | None = None) -> np.ndarray:
        return self._of("label", at)

    def first(self) -> np.ndarray:
        return self._of("part", None) == 0

    def feed(self, digest: Digest) -> None:
        for example in self.examples:
            digest.update(f"{len(example)} {example.label} {example.subject} ".encode())
            digest.update(f"{example.start} {example.part} ".encode())
            example.feed(digest)


class Sample(NamedTuple):
    """line: says what was left out; empty where nothing was."""

    examples: Listed
    line: str


def sampled(examples: Examples, max_tokens: int) -> Sample:
    """Whole subjects of about max_tokens tokens in all, drawn by their number; all where they fit.

    One subject at least is taken.
    """
    lengths, subjects = examples.lengths(), examples.subjects()
    total = int(lengths.sum())
    if total <= max_tokens:
        return Sample(Listed(examples), "")
    known, owner = np.unique(subjects, return_inverse=True)
    sizes = np.bincount(owner, lengths)
    drawn = Order(len(known), derived_seed("evaluated"))[np.arange(len(known))]
    count = max(1, int(np.searchsorted(np.cumsum(sizes[drawn]), max_tokens, side="right")))
    chosen = np.zeros(len(known), dtype=bool)
    chosen[drawn[:count]] = True
    kept = np.flatnonzero(chosen[owner])
    line = f"; evaluated are {count:,} of {len(known):,} subjects, {max_tokens:,} tokens at most"
    return Sample(Listed(examples[i] for i in kept.tolist()), line)
