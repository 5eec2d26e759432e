"""Timelines to predict for: at the cuts of training, at the end, or at the times of task labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from clinattn.tools.prediction.rows import Rows
from clinattn.training.cuts import cut_at, cuts_of, matching_of
from clinattn.training.moments import Moments
from clinattn.training.reading import Reader
from clinattn.training.sequences import Example
from clinattn.training.settings import TrainingSettings
from clinattn.workloads.labels import TaskLabels
from clinattn.workloads.source import Source


class Moment(NamedTuple):
    """owner: the sequence. end, until: as in Cut. time: of the prediction. outcome: or None."""

    owner: int
    end: int
    until: int
    time: int
    outcome: Any = None


@dataclass(frozen=True)
class Timelines:
    """A source, as an encoder takes it, and the sequences chosen, (S,) bool.

    Codes that match, (V,) bool, are not read: they are of the outcome. None for none.
    """

    reader: Reader
    chosen: np.ndarray
    training: TrainingSettings
    matching: np.ndarray | None

    @property
    def source(self) -> Source:
        return self.reader.source

    def at_cuts(self) -> Rows:
        """At the cuts of training, with what follows."""
        assert self.matching is not None
        moments = []
        for index in np.flatnonzero(self.chosen).tolist():
            for cut in cuts_of(self.source, index, self.matching, self.training):
                outcome = cut.marked(self.source, self.matching)
                moments.append(self._after(index, cut.end, cut.until, outcome))
        return self._rows(moments, ["each timeline is predicted at the cuts of training"])

    def at_ends(self) -> Rows:
        """At the last event of each timeline, whose outcome is not known."""
        moments = []
        for index in np.flatnonzero(self.chosen).tolist():
            _, timed, end = self.source.bounds(index)
            if end > timed:
                moments.append(self._after(index, end, end))
        return self._rows(moments, ["each timeline is predicted at its end"])

    def at_labels(self, labels: TaskLabels) -> Rows:
        """At the prediction times of rows of labels, by subject and time.

        Raises ValueError where no row has a subject chosen.
        """
        known = Moments.of(self.source, labels)
        kept = known.only(self.chosen)
        if not len(kept):
            raise ValueError(
                f"{labels.where}: none of its {len(labels):,} rows has a subject of the split: "
                "expected some"
            )
        found = zip(kept.rows, kept.index.tolist(), kept.end.tolist(), strict=True)
        moments = [
            Moment(owner, end, end, int(labels.times[row]), labels.values[row])
            for row, owner, end in found
        ]
        moments.sort(key=lambda moment: (moment.owner, moment.time))
        said = f"{len(kept):,} of {len(labels):,} rows of labels are predicted"
        if absent := len(labels) - len(known):
            said += f", {absent:,} are of subjects that the data have not"
        if others := len(known) - len(kept):
            said += f", {others:,} are of other splits"
        notes = [said]
        if bare := kept.without_events(self.source):
            notes.append(f"{bare:,} have no event until prediction_time, only static facts")
        return self._rows(moments, notes)

    def _after(self, owner: int, end: int, until: int, outcome: bool | None = None) -> Moment:
        """A moment after the event before `end`, at the time of that event."""
        assert self.source.times is not None
        return Moment(owner, end, until, int(self.source.times[end - 1]), outcome)

    def _rows(self, moments: Sequence[Moment], notes: list[str]) -> Rows:
        """Raises ValueError where there is no moment."""
        source, left = self.source, self.chosen.sum() - len({moment.owner for moment in moments})
        if not moments:
            raise ValueError(f"{source.where}: no timeline has events to predict from")
        if left:
            notes.append(f"{left:,} of {self.chosen.sum():,} timelines have no prediction")

        def sequences(row: int) -> list[Example]:
            owner, end, until, *_ = moments[row]
            cut = cut_at(source, owner, self.matching, self.training, end, until)
            return [cut.sequence(self.reader)]

        return Rows(
            title=source.title,
            unit="predictions",
            sequences=sequences,
            columns={
                "subject_id": np.array([source.subjects[m.owner] for m in moments], np.int64),
                "prediction_time": np.array([m.time for m in moments]),
            },
            outcomes=[moment.outcome for moment in moments],
            notes=tuple(notes),
        )


def unread(source: Source, training: TrainingSettings, required: bool) -> np.ndarray | None:
    """(V,) bool: the codes that label_code matches, by which training made its classes.

    Raises ValueError where none does and one is required; None where none is.
    """
    try:
        return matching_of(source, training.label_code)
    except ValueError:
        if required:
            raise
        return None
