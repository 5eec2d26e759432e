"""Cuts of timelines to predict at, and the sequences that a classifier reads before them."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from clinattn.encoder.heads import IGNORE
from clinattn.workloads import SPECIAL_TOKENS
from clinattn.workloads.source import Source

from .examples import Examples
from .reading import Reader
from .sequences import Digest, Example, sequence
from .settings import TrainingSettings


def matching_of(source: Source, label_code: str | None) -> np.ndarray | None:
    """(V,) bool: the codes that match the pattern. Raises ValueError where none does."""
    if label_code is None:
        return None
    codes = source.vocabulary.tokens
    matching = np.array([fnmatchcase(code, label_code) for code in codes])
    if not matching.any():
        raise ValueError(
            f"label_code={label_code!r} matches no code: expected a pattern of codes "
            f"such as {codes[len(SPECIAL_TOKENS)]!r}"
        )
    return matching


class Cut(NamedTuple):
    """A moment of a timeline to predict at, in sequence `owner`.

    static, past: places of the events that a classifier then sees, static facts and the latest
    before the cut. end: the first event after the cut; until: the first which the label no longer
    depends on.
    """

    owner: int
    static: np.ndarray
    past: np.ndarray
    end: int
    until: int

    def sequence(self, reader: Reader, label: float = IGNORE, subject: int = 0) -> Example:
        """The sequence that the classifier reads."""
        static, past = (reader.take(self.owner, at) for at in (self.static, self.past))
        return sequence(reader.vocabulary.cls, static, past, label, subject)

    def marked(self, source: Source, matching: np.ndarray) -> bool:
        """Returns whether a code that matches follows before `until`."""
        return bool(matching[source.ids[self.end : self.until]].any())


def cuts_of(
    source: Source, index: int, matching: np.ndarray, settings: TrainingSettings
) -> list[Cut]:
    """The cuts of a sequence that training makes, from the first to the last."""
    return [
        cut_at(source, index, matching, settings, end, until)
        for end, until in places_of(source, index, settings)
    ]


def places_of(source: Source, index: int, settings: TrainingSettings) -> list[tuple[int, int]]:
    """Cut.end and Cut.until of the cuts of a sequence.

    A cut lies where the time changes: what happens at one time is all input or all future.
    """
    assert source.times is not None
    _, timed, end = source.bounds(index)
    times = source.times[timed:end]
    parts = settings.cuts + 1
    cuts = [len(times) * part // parts for part in range(1, parts)]
    first = [int(np.searchsorted(times, times[cut])) for cut in cuts if cut < len(times)]
    edges = sorted({0, *first, len(times)})
    return [(timed + cut, timed + until) for cut, until in zip(edges[1:], edges[2:], strict=False)]


def cut_at(
    source: Source,
    index: int,
    matching: np.ndarray | None,
    settings: TrainingSettings,
    end: int,
    until: int,
) -> Cut:
    """The cut of a sequence before the event `end`. Codes that match are not seen."""
    start, timed, _ = source.bounds(index)
    room = settings.max_tokens - 1
    if matching is None:
        static = np.arange(start, min(timed, start + room // 2))
        past = np.arange(max(timed, end - (room - len(static))), end)
        return Cut(index, static, past, end, until)
    static, past = (
        first + np.flatnonzero(~matching[source.ids[first:last]])
        for first, last in ((start, timed), (timed, end))
    )
    static = static[: room // 2]
    return Cut(index, static, past[max(0, len(past) - (room - len(static))) :], end, until)


class Cuts(Examples):
    """Sequences before cuts, one for each: sequence, end and label of each, (N,), in this order.

    matching: (V,) bool, codes that are not seen. Its subject is the number of the sequence.
    """

    def __init__(
        self,
        reader: Reader,
        owners: np.ndarray,
        end: np.ndarray,
        label: np.ndarray,
        matching: np.ndarray | None,
        settings: TrainingSettings,
    ):
        self.reader, self.owners, self.end, self.label = reader, owners, end, label
        self.matching, self.settings = matching, settings
        self._lengths: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.owners)

    def cut(self, i: int) -> Cut:
        end = int(self.end[i])
        return cut_at(
            self.reader.source, int(self.owners[i]), self.matching, self.settings, end, end
        )

    def make(self, index: int) -> Example:
        label = self.label[index].item()
        return self.cut(index).sequence(self.reader, label, int(self.owners[index]))

    def lengths(self, at: np.ndarray | None = None) -> np.ndarray:
        places = np.arange(len(self)) if at is None else at
        if self.matching is None:
            source, room = self.reader.source, self.settings.max_tokens - 1
            index = self.owners[places]
            static = np.minimum((source.starts - source.begins)[index], room // 2)
            return 1 + static + np.minimum(self.end[places] - source.starts[index], room - static)
        if self._lengths is None:  # only the events tell how many of them are seen
            cuts = [self.cut(i) for i in range(len(self))]
            self._lengths = np.array([1 + len(x.static) + len(x.past) for x in cuts])
        return self._lengths[places]

    def subjects(self, at: np.ndarray | None = None) -> np.ndarray:
        return self.owners if at is None else self.owners[at]

    def starts(self, at: np.ndarray | None = None) -> np.ndarray:
        places = range(len(self)) if at is None else at.tolist()
        return np.array([1 + len(self.cut(i).static) for i in places], dtype=np.int64)

    def labels(self, at: np.ndarray | None = None) -> np.ndarray:
        return self.label if at is None else self.label[at]

    def feed(self, digest: Digest) -> None:
        """By the events until the last cut of each sequence, and where and what the cuts are."""
        source = self.reader.source
        known, owner = np.unique(self.owners, return_inverse=True)
        last = np.zeros(len(known), dtype=np.int64)
        np.maximum.at(last, owner, self.end)
        digest.update(self.reader.hashes(known, last).tobytes())
        sizes = self.end - source.begins[self.owners]
        static = (source.starts - source.begins)[self.owners]
        digest.update(np.c_[sizes, static].astype(np.int64).tobytes())
        digest.update(self.label.tobytes())
        digest.update(self.settings.max_tokens.to_bytes(8, "little"))


def futures(
    reader: Reader, at: np.ndarray, matching: np.ndarray, settings: TrainingSettings
) -> Cuts:
    """The cuts of some sequences (P,), labelled by whether a match stands before the next one."""
    rows = [
        (index, end, int(matching[reader.source.ids[end:until]].any()))
        for index in at.tolist()
        for end, until in places_of(reader.source, index, settings)
    ]
    owners, end, label = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return Cuts(reader, owners, end, label, matching, settings)
