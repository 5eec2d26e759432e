"""Source: events, splits, vocabulary and labels, wherever the data come from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .pieces import Column, bounds_of, through
from .seeds import HOLD_OUT_RANGE, hold_out_draw
from .vocabulary import Vocabulary

NO_TIME = np.iinfo(np.int64).min  # a static fact; sorts before every event
BIRTH = "MEDS_BIRTH"
MICROSECONDS_PER_HOUR = 3_600_000_000
MICROSECONDS_PER_DAY = 24 * MICROSECONDS_PER_HOUR
AT_ONCE = 2**20  # events of a Part


class Part(NamedTuple):
    """Sequences whose events stand together: at, in the columns. indices: in that order."""

    at: slice
    indices: np.ndarray


@dataclass(frozen=True)
class Source:
    """Sequences: sequence i owns the events begins[i] : ends[i], in columns one beside the other.

    Its static facts, if any, are the events before starts[i]. [CLS] is no event. The columns are
    arrays, or pieces of files that are mapped, which no method holds in memory as a whole.
    name: for rows of a benchmark. title, unit, note: for people, as in `description`. where: the
    input, for error messages.
    subjects: who each sequence is about; a split holds out whole subjects.
    closed: the vocabulary is that of a tokenizer, and serves every split.
    times: microseconds since 1970-01-01, NO_TIME for a static fact. values: NaN without one.
    origins: the time that days are counted from, as origins_of gives it.
    labels: a class for each sequence, where the files have one.
    splits: the split of each sequence by the list of the data's owner, None for one that the list
    does not name; None without a list. splits_digest: the same for the same list.
    draws: hold_out_draw of each subject, where they are known beforehand.
    """

    name: str
    title: str
    unit: str
    where: str
    subjects: Sequence[int | str] | np.ndarray  # (S,)
    begins: np.ndarray  # (S,) int64
    starts: np.ndarray  # (S,) int64
    ends: np.ndarray  # (S,) int64
    ids: Column  # (E,) integers, ids of `vocabulary`
    vocabulary: Vocabulary
    closed: bool = False
    times: Column | None = None  # (E,) int64
    values: Column | None = None  # (E,) float32
    origins: np.ndarray | None = None  # (S,) int64
    labels: Sequence[str | None] | None = None  # (S,)
    splits: Sequence[str | None] | None = None  # (S,)
    splits_digest: str = ""
    draws: np.ndarray | None = None  # (S,) uint64
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
        return np.minimum(self.ends - self.begins + 1, max_tokens)

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
        """Indices where a sequence begins, its events after the static facts, and where it ends."""
        return int(self.begins[index]), int(self.starts[index]), int(self.ends[index])

    def held_out(self, share: float) -> np.ndarray:
        """(S,) bool: the sequences of about `share` of the subjects, by a hash of the subject."""
        draws = self.draws
        if draws is None:
            draws = np.array([hold_out_draw(x) for x in _plain(self.subjects)], dtype=np.uint64)
        return draws < np.uint64(math.ceil(share * HOLD_OUT_RANGE))

    def parts(self) -> Iterator[Part]:
        """The sequences as the columns have them, for one pass over all events in bounded memory.

        AT_ONCE events at a time, or one sequence, and never of two parts of a column, so that
        slices are views.
        """
        order = np.lexsort((self.ends, self.begins))
        begins, ends = self.begins[order], self.ends[order]
        bounds = bounds_of(self.ids)
        cuts = np.searchsorted(begins, bounds)
        cuts[-1] = len(self)  # a sequence without events may begin where the columns end
        for first, last in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            while first < last:
                fits = int(np.searchsorted(ends[:last], begins[first] + AT_ONCE, side="right"))
                end = max(first + 1, fits)
                yield Part(slice(int(begins[first]), int(ends[end - 1])), order[first:end])
                first = end

    def within(self, part: Part, until: np.ndarray) -> np.ndarray:
        """(size of the part,) bool: its events that a sequence i has before the place until[i]."""
        inner = np.c_[self.begins, until][part.indices].ravel()
        sizes = np.diff(np.r_[part.at.start, inner, part.at.stop])
        return np.repeat(np.arange(len(sizes)) % 2 == 1, sizes)

    def until(self, chosen: np.ndarray) -> np.ndarray:
        """(S,) int64: the end of each sequence chosen (S,) bool, and the beginning of others."""
        return np.where(chosen, self.ends, self.begins)

    def counts(self, until: np.ndarray | None = None) -> np.ndarray:
        """(V,) int64: how often each id is among the events before until[i]; None for all."""
        until, size = self.ends if until is None else until, len(self.vocabulary)
        total = np.zeros(size, dtype=np.int64)
        for part in self.parts():
            kept = self.within(part, until)
            ids = self.ids[part.at]
            total += np.bincount(ids if kept.all() else ids[kept], minlength=size)
        return total

    def only(self, chosen: np.ndarray) -> Source:
        """The chosen sequences (S,) bool as a source, with the vocabulary of these alone."""
        vocabulary = self.vocabulary_of(self.until(chosen))

        def of_chosen(column: Any) -> list[Any] | None:
            return None if column is None else [column[i] for i in np.flatnonzero(chosen).tolist()]

        return replace(
            self,
            subjects=of_chosen(_plain(self.subjects)) or [],
            begins=self.begins[chosen],
            starts=self.starts[chosen],
            ends=self.ends[chosen],
            ids=self.ids if self.closed else through(self.ids, self.table_of(vocabulary)),
            vocabulary=vocabulary,
            origins=None if self.origins is None else self.origins[chosen],
            labels=of_chosen(self.labels),
            splits=of_chosen(self.splits),
            draws=None if self.draws is None else self.draws[chosen],
        )

    def vocabulary_of(
        self, until: np.ndarray, min_count: int = 1, max_size: int | None = None
    ) -> Vocabulary:
        """The vocabulary of the events before until[i]; the source's own where it is closed."""
        if self.closed:
            return self.vocabulary
        return Vocabulary.build(self.vocabulary.tokens, self.counts(until), min_count, max_size)

    def table_of(self, vocabulary: Vocabulary) -> np.ndarray:
        """(V,) int32: ids of another vocabulary for ids of this one, [UNK] for what it has not."""
        if self.closed:
            return np.arange(len(self.vocabulary), dtype=np.int32)
        return vocabulary.ids(self.vocabulary.tokens)

    def days(self, index: int | np.ndarray, times: np.ndarray) -> np.ndarray:
        """fp64: days from the origin of a sequence to `times` of its events; 0 for static facts.

        index: of the sequence, or of that of each time.

        Raises ValueError for a source without times.
        """
        if self.origins is None:
            raise ValueError(f"{self.where} has no times: expected a source of timed events")
        origin = self.origins[index]
        return (np.where(times == NO_TIME, origin, times) - origin) / MICROSECONDS_PER_DAY

    def unknown_share(self, vocabulary: Vocabulary | None = None) -> float | None:
        """The share of events that are [UNK], in another vocabulary if one is given.

        None where the vocabulary has no such token.
        """
        known = vocabulary or self.vocabulary
        if known.unknown is None:
            return None
        counts = self.counts()
        table = self.table_of(known)
        return float(counts[table == known.unknown].sum() / counts.sum())


def origins_of(
    begins: np.ndarray, ends: np.ndarray, times: np.ndarray, births: np.ndarray
) -> np.ndarray:
    """(S,) int64: the time of each sequence's birth, or else of its first timed event, or else 0.

    begins, ends: as in Source, for all events in order. times (E,), births (E,) bool: of events.
    """
    origins = np.zeros(len(begins), dtype=np.int64)
    timed = times != NO_TIME
    for known in (timed, timed & births):  # the later overrules
        at = np.flatnonzero(known)
        first = np.searchsorted(at, begins)
        found = first < np.searchsorted(at, ends)
        origins[found] = times[at[first[found]]]
    return origins


def _plain(subjects: Any) -> Any:
    """Subjects as Python's own numbers and strings."""
    return subjects.tolist() if isinstance(subjects, np.ndarray) else subjects


def latest(start: int, timed: int, end: int, max_tokens: int) -> np.ndarray:
    """Indices of the events that fit beside [CLS]: static facts first, then the latest events."""
    room = min(max_tokens - 1, end - start)
    static = min(timed - start, room)
    return np.r_[start : start + static, end - (room - static) : end]
