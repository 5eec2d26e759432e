"""Sequences at the prediction times of task labels: what was known then, and no more."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clinattn.workloads.labels import TaskLabels
from clinattn.workloads.source import Source


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
        subjects = np.asarray(source.subjects)
        index = np.minimum(np.searchsorted(subjects, labels.subjects), len(subjects) - 1)
        rows = np.flatnonzero(subjects[index] == labels.subjects)
        if not len(rows):
            raise ValueError(
                f"{labels.where}: none of its {len(labels)} rows has a subject of {source.where}, "
                "expected some"
            )
        end = []
        index = index[rows]
        for row, own in zip(rows.tolist(), index.tolist(), strict=True):
            _, timed, stop = source.bounds(own)
            times = source.times[timed:stop]
            end.append(timed + np.searchsorted(times, labels.times[row], side="right"))
        return cls(rows, index, np.array(end, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def only(self, sequences: np.ndarray) -> Moments:
        """Keeps the moments of the chosen sequences (S,) bool of the source."""
        kept = sequences[self.index]
        return Moments(self.rows[kept], self.index[kept], self.end[kept])

    def until(self, source: Source) -> np.ndarray:
        """(S,) int64: what stands before it is read, static facts and until the last moment."""
        until = source.begins.copy()
        np.maximum.at(until, self.index, self.end)
        return until

    def without_events(self, source: Source) -> int:
        """Counts moments before the first event; static facts are none."""
        return int((self.end == source.starts[self.index]).sum())
