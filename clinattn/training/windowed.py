"""Windows of timelines to pretrain on, found from their numbers: no list of them is held."""

from __future__ import annotations

import numpy as np

from .examples import Examples
from .reading import Reader
from .sequences import Digest, Example, sequence


class Windows(Examples):
    """The windows of some sequences of a source, each sequence's as sequences.windows cuts them.

    at: (P,) which sequences. subjects: (P,) their numbers. room: tokens of a window. end: of a
    token behind each, or None.
    """

    def __init__(
        self, reader: Reader, at: np.ndarray, subjects: np.ndarray, room: int, end: int | None
    ):
        source = reader.source
        self.reader, self.at, self.of, self.end = reader, at, subjects, end
        taken = 1 if end is None else 2
        self.static = np.minimum((source.starts - source.begins)[at], (room - taken) // 2)
        self.room = room - taken - self.static
        events = (source.ends - source.starts)[at]
        self.bounds = np.r_[0, np.cumsum(np.maximum(1, -(-events // self.room)))]
        self.marks = taken

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def _places(self, at: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The number of each window's sequence, and that of the window in it."""
        if at is None:
            at = np.arange(len(self))
        owner = np.searchsorted(self.bounds, at, side="right") - 1
        return owner, at - self.bounds[owner]

    def _begins(self, owner: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first event of each window, and the one after its last."""
        source, index = self.reader.source, self.at[owner]
        begins = source.starts[index] + part * self.room[owner]
        return begins, np.minimum(begins + self.room[owner], source.ends[index])

    def make(self, index: int) -> Example:
        owner, part = self._places(np.array([index]))
        begin, end = self._begins(owner, part)
        place = int(self.at[owner[0]])
        first = int(self.reader.source.begins[place])
        static = self.reader.take(place, slice(first, first + int(self.static[owner[0]])))
        events = self.reader.take(place, slice(int(begin[0]), int(end[0])))
        return sequence(
            self.reader.vocabulary.cls,
            static,
            events,
            subject=int(self.of[owner[0]]),
            end=self.end,
            part=int(part[0]),
        )

    def lengths(self, at: np.ndarray | None = None) -> np.ndarray:
        owner, part = self._places(at)
        begins, ends = self._begins(owner, part)
        return self.marks + self.static[owner] + ends - begins

    def subjects(self, at: np.ndarray | None = None) -> np.ndarray:
        return self.of[self._places(at)[0]]

    def starts(self, at: np.ndarray | None = None) -> np.ndarray:
        return 1 + self.static[self._places(at)[0]]

    def feed(self, digest: Digest) -> None:
        """By whole sequences, of which the windows follow."""
        source, at = self.reader.source, self.at
        digest.update(repr(self.end).encode())
        for numbers in (self.of, self.room, (source.ends - source.starts)[at]):
            digest.update(numbers.tobytes())
        digest.update((source.starts - source.begins)[at].tobytes())
        digest.update(self.reader.hashes(at, source.ends[at]).tobytes())
