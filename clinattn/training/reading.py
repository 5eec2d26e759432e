"""Events of a source as an encoder takes them, read where they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from clinattn.workloads import Vocabulary
from clinattn.workloads.seeds import scattered
from clinattn.workloads.source import Source

from .sequences import Tokens
from .standard import Standard

ALL = slice(None)


@dataclass(frozen=True)
class Reader:
    """A source by a vocabulary. times: tokens have days, as Source.days gives them.

    standard: they have values, where the source has some, on this scale.
    """

    source: Source
    vocabulary: Vocabulary
    times: bool = False
    standard: Standard | None = None

    @cached_property
    def table(self) -> np.ndarray:
        return self.source.table_of(self.vocabulary).astype(np.int64)

    def take(self, index: int, at: slice | np.ndarray) -> Tokens:
        """The events of sequence `index` at places of the source's columns, which lie in it."""
        return self._tokens(index, at)

    def _tokens(
        self, index: int | np.ndarray, at: slice | np.ndarray, kept: np.ndarray | slice = ALL
    ) -> Tokens:
        """The events kept of those at some places. index: of the sequence, of all or of each."""
        source = self.source
        ids = torch.from_numpy(self.table[source.ids[at][kept]])
        days = values = None
        if self.times and source.times is not None:
            days = torch.from_numpy(source.days(index, source.times[at][kept]))
        if self.standard is not None and source.values is not None:
            values = self.standard(ids, torch.from_numpy(source.values[at][kept].copy()))
        return Tokens(ids, days, values)

    def hashes(self, chosen: np.ndarray, until: np.ndarray) -> np.ndarray:
        """(P,) uint64: of each sequence chosen (P,), of its tokens before the place until (P,).

        The same for the same tokens in the same order, days and values included where they are
        read; of the whole source in one pass.
        """
        source = self.source
        ends = source.begins.copy()
        ends[chosen] = until
        found = np.zeros(len(source), dtype=np.uint64)
        for part in source.parts():
            kept = source.within(part, ends)
            sizes = (ends - source.begins)[part.indices]
            full = sizes > 0
            owner, sizes = part.indices[full], sizes[full]
            if not len(owner):
                continue
            first = np.cumsum(sizes) - sizes
            places = np.arange(sizes.sum()) - np.repeat(first, sizes)
            tokens = self._tokens(np.repeat(owner, sizes), part.at, kept)
            x = scattered(tokens.ids.numpy().astype(np.uint64) ^ (places.astype(np.uint64) << 32))
            if tokens.days is not None:
                x = scattered(x ^ tokens.days.numpy().view(np.uint64))
            if tokens.values is not None:
                x = scattered(x ^ tokens.values.numpy().view(np.uint32))
            found[owner] = np.add.reduceat(x, first)
        return found[chosen]

    def whole(self, index: int) -> Tokens:
        """The events of a sequence, static facts first."""
        start, _, end = self.source.bounds(index)
        return self.take(index, slice(start, end))


def fit_standard(source: Source, vocabulary: Vocabulary, until: np.ndarray) -> Standard:
    """The scales of the values of the events before until[i], (S,), of each sequence."""
    table = source.table_of(vocabulary).astype(np.int64)

    def chunks():
        assert source.values is not None
        for part in source.parts():
            kept = source.within(part, until)
            ids = torch.from_numpy(table[source.ids[part.at][kept]])
            yield ids, torch.from_numpy(source.values[part.at][kept])

    return Standard.fit(chunks, len(vocabulary))
