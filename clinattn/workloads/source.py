"""Source: events, splits, vocabulary and labels, wherever the data come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .seeds import is_held_out
from .vocabulary import Vocabulary

NO_TIME = np.iinfo(np.int64).min  # a static fact; sorts before every event
BIRTH = "MEDS_BIRTH"
MICROSECONDS_PER_HOUR = 3_600_000_000
MICROSECONDS_PER_DAY = 24 * MICROSECONDS_PER_HOUR


@dataclass(frozen=True)
class Source:
    """Sequences end to end: sequence i owns the events offsets[i] : offsets[i + 1].

    Its static facts, if any, are the events before starts[i]. [CLS] is no event.
    name: for rows of a benchmark. title, unit, note: for people, as in `description`. where: the
    input, for error messages.
    subjects: who each sequence is about; a split holds out whole subjects.
    closed: the vocabulary is that of a tokenizer, and serves every split.
    times: microseconds since 1970-01-01, NO_TIME for a static fact. values: NaN without one.
    labels: a class for each sequence, where the files have one.
    splits: the split of each sequence by the list of the data's owner, None for one that the list
    does not name; None without a list. splits_digest: the same for the same list.
    """

    name: str
    title: str
    unit: str
    where: str
    subjects: Sequence[int | str]  # (S,)
    offsets: np.ndarray  # (S + 1,) int64
    starts: np.ndarray  # (S,) int64
    ids: np.ndarray  # (E,) integers, ids of `vocabulary`
    vocabulary: Vocabulary
    closed: bool = False
    times: np.ndarray | None = None  # (E,) int64
    values: np.ndarray | None = None  # (E,) float32
    labels: Sequence[str | None] | None = None  # (S,)
    splits: Sequence[str | None] | None = None  # (S,)
    splits_digest: str = ""
    note: str = ""

    def __len__(self) -> int:
        return len(self.subjects)

    @property
    def counted(self) -> str:
        """The source and its number of sequences, such as "MEDS folder demo, 80 patients"."""
        return f"{self.title}, {len(self)} {self.unit}"

    @property
    def description(self) -> str:
        """The source in a line: its note, where there is one, says more than the number."""
        return f"{self.title}: {self.note}" if self.note else self.counted

    def lengths(self, max_tokens: int) -> np.ndarray:
        """Tokens of each sequence, [CLS] included, after a cut to max_tokens: (S,) int64."""
        return np.minimum(np.diff(self.offsets) + 1, max_tokens)

    def sequence(self, index: int, max_tokens: int) -> Tensor:
        """Token ids (N,) int64 of a sequence: [CLS], the static facts, and the events that fit.

        The latest events of a timeline fit, and the first words of a text.
        """
        start, timed, end = self.bounds(index)
        if self.times is None:
            kept = np.arange(start, min(end, start + max_tokens - 1))
        else:
            kept = latest(start, timed, end, max_tokens)
        return torch.from_numpy(np.r_[self.vocabulary.cls, self.ids[kept]].astype(np.int64))

    def bounds(self, index: int) -> tuple[int, int, int]:
        """Indices where a sequence begins, its events after the static facts, and the next one."""
        return int(self.offsets[index]), int(self.starts[index]), int(self.offsets[index + 1])

    def held_out(self, share: float) -> np.ndarray:
        """(S,) bool: the sequences of about `share` of the subjects, by a hash of the subject."""
        return np.array([is_held_out(subject, share) for subject in self.subjects], dtype=bool)

    def only(self, chosen: np.ndarray) -> Source:
        """The chosen sequences (S,) bool as a source, with the vocabulary of these alone."""
        events = self.of_events(chosen)
        vocabulary = self.vocabulary_of(events)
        sizes, static = np.diff(self.offsets)[chosen], (self.starts - self.offsets[:-1])[chosen]
        offsets = np.r_[0, np.cumsum(sizes)].astype(np.int64)

        def of_chosen(column: Sequence[Any] | None) -> list[Any] | None:
            return None if column is None else [column[i] for i in np.flatnonzero(chosen).tolist()]

        return replace(
            self,
            subjects=of_chosen(self.subjects) or [],
            offsets=offsets,
            starts=offsets[:-1] + static,
            ids=self.ids_of(vocabulary)[events],
            vocabulary=vocabulary,
            times=None if self.times is None else self.times[events],
            values=None if self.values is None else self.values[events],
            labels=of_chosen(self.labels),
            splits=of_chosen(self.splits),
        )

    def vocabulary_of(
        self, events: np.ndarray, min_count: int = 1, max_size: int | None = None
    ) -> Vocabulary:
        """The vocabulary of the chosen events (E,) bool; the source's own where it is closed."""
        if self.closed:
            return self.vocabulary
        codes = self.vocabulary.tokens
        counts = np.bincount(self.ids[events], minlength=len(codes))
        return Vocabulary.build(codes, counts, min_count, max_size)

    def ids_of(self, vocabulary: Vocabulary) -> np.ndarray:
        """(E,) int64: the events as ids of another vocabulary, [UNK] for what it has not."""
        if self.closed:
            return self.ids.astype(np.int64)
        return vocabulary.ids(self.vocabulary.tokens)[self.ids].astype(np.int64)

    def of_events(self, of_sequences: np.ndarray) -> np.ndarray:
        """Repeats a value of each sequence (S,) for each of its events: (E,)."""
        return np.repeat(of_sequences, np.diff(self.offsets))

    def days(self) -> np.ndarray:
        """(E,) fp64: days since the birth, or else since the first timed event; 0 if static.

        Raises ValueError for a source without times.
        """
        if self.times is None:
            raise ValueError(f"{self.where} has no times: expected a source of timed events")
        timed = self.times != NO_TIME
        births = np.zeros(len(timed), dtype=bool)
        if BIRTH in self.vocabulary.tokens:
            births = timed & (self.ids == self.vocabulary.tokens.index(BIRTH))
        origin = np.zeros(len(self), dtype=np.int64)
        owner = self.of_events(np.arange(len(self)))
        for known in (timed, births):  # the later overrules
            at = np.flatnonzero(known)
            owners, first = np.unique(owner[at], return_index=True)
            origin[owners] = self.times[at[first]]
        passed = np.where(timed, self.times, origin[owner]) - origin[owner]
        return passed / MICROSECONDS_PER_DAY

    def unknown_share(self) -> float | None:
        """The share of events that are [UNK]; None where the vocabulary has no such token."""
        unknown = self.vocabulary.unknown
        return None if unknown is None else float((self.ids == unknown).mean())


def latest(start: int, timed: int, end: int, max_tokens: int) -> np.ndarray:
    """Indices of the events that fit beside [CLS]: static facts first, then the latest events."""
    room = min(max_tokens - 1, end - start)
    static = min(timed - start, room)
    return np.r_[start : start + static, end - (room - static) : end]
