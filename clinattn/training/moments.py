"""Sequences at the prediction times of task labels: what was known then, and no more."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clinattn.workloads.labels import TaskLabels
from clinattn.workloads.source import Source

from .corpus import Cut, cut_at
from .settings import TrainingSettings


@dataclass(frozen=True)
class Moments:
    """Rows of labels whose subject is in a source, each with the events up to its prediction time.

    The package meds says of prediction_time in LabelSchema: "data may be used from this subject up
    to and including this time". An event at the same microsecond is read, as meds-torch-data reads
    events with time <= prediction_time, and nothing later is. Static facts are known throughout,
    so a row without an event until then has static facts alone.
    """

    rows: np.ndarray  # (M,) of the labels
    index: np.ndarray  # (M,) the sequence of each in the source
    end: np.ndarray  # (M,) the first event that is not read

    @classmethod
    def of(cls, source: Source, labels: TaskLabels) -> Moments:
        """Raises ValueError where no subject of the labels is in the source."""
        assert source.times is not None
        places = {subject: index for index, subject in enumerate(source.subjects)}
        found = [(row, places.get(subject)) for row, subject in enumerate(labels.subjects.tolist())]
        known = [(row, index) for row, index in found if index is not None]
        if not known:
            raise ValueError(
                f"{labels.where}: none of its {len(labels)} rows has a subject of {source.where}, "
                "expected some"
            )
        end = []
        for row, index in known:
            _, timed, stop = source.bounds(index)
            times = source.times[timed:stop]
            end.append(timed + np.searchsorted(times, labels.times[row], side="right"))
        rows, index = np.array(known, dtype=np.int64).T
        return cls(rows, index, np.array(end, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def only(self, sequences: np.ndarray) -> Moments:
        """Keeps the moments of the chosen sequences (S,) bool of the source."""
        kept = sequences[self.index]
        return Moments(self.rows[kept], self.index[kept], self.end[kept])

    def read(self, source: Source) -> np.ndarray:
        """(E,) bool: static facts of these sequences, and events until their last moment."""
        until = source.offsets[:-1].copy()
        np.maximum.at(until, self.index, self.end)
        return np.arange(len(source.ids)) < source.of_events(until)

    def without_events(self, source: Source) -> int:
        """Counts moments before the first event; static facts are none."""
        return int((self.end == source.starts[self.index]).sum())

    def cut(self, source: Source, i: int, settings: TrainingSettings) -> Cut:
        """The cut at moment i: static facts, and the latest events that fit."""
        end = int(self.end[i])
        return cut_at(source, int(self.index[i]), None, settings, end, end)
