"""Events of a source as an encoder takes them, read where they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from clinattn.workloads import Vocabulary
from clinattn.workloads.source import Source

from .sequences import Tokens
from .standard import Standard


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
        source = self.source
        ids = torch.from_numpy(self.table[source.ids[at]])
        days = values = None
        if self.times and source.times is not None:
            days = torch.from_numpy(source.days(index, source.times[at]))
        if self.standard is not None and source.values is not None:
            values = self.standard(ids, torch.from_numpy(source.values[at].copy()))
        return Tokens(ids, days, values)

    def whole(self, index: int, until: int | None = None) -> Tokens:
        """The events of a sequence, static facts first, before the place `until`."""
        start, _, end = self.source.bounds(index)
        return self.take(index, slice(start, end if until is None else until))


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
