"""Timelines to predict for: at the cuts of training, or at the end."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from clinattn.tools.prediction.rows import Rows
from clinattn.training.corpus import cut_at, cuts_of, marks_of
from clinattn.training.data import Example, Tokens
from clinattn.training.settings import TrainingSettings
from clinattn.workloads.source import Source


class Moment(NamedTuple):
    """owner: the sequence. end, until: as in Cut. outcome: None where it is not known."""

    owner: int
    end: int
    until: int
    outcome: bool | None


def timeline_rows(
    source: Source,
    events: Tokens,
    chosen: np.ndarray,
    training: TrainingSettings,
    at_end: bool,
) -> Rows:
    """The rows of the sequences chosen (S,) bool, by subject and time.

    events: of the whole source, as the encoder takes them. Sequences without a timed event have no
    time to predict at, and are left out.
    Raises ValueError where no code is label_code's, or no row is left.
    """
    assert source.times is not None
    try:
        marks = marks_of(source, training.label_code)
    except ValueError:
        if not at_end:
            raise
        marks = None  # the codes of the outcome are not there, and need not be left out
    if marks is None:
        marks = np.zeros(len(source.ids), dtype=bool)
    moments: list[Moment] = []
    left = 0
    for index in np.flatnonzero(chosen).tolist():
        _, timed, end = source.bounds(index)
        if at_end:
            found = [Moment(index, end, end, None)] if end > timed else []
        else:
            found = [
                Moment(index, cut.end, cut.until, bool(marks[cut.end : cut.until].any()))
                for cut in cuts_of(source, index, marks, training)
            ]
        moments += found
        left += not found
    if not moments:
        raise ValueError(f"{source.where}: no timeline has events to predict from: expected some")

    def sequences(row: int) -> list[Example]:
        index, end, until, _ = moments[row]
        return [cut_at(source, index, marks, training, end, until).sequence(source, events)]

    where = "its end" if at_end else "the cuts of training"
    notes = [f"each timeline is predicted at {where}"]
    if left:
        notes.append(f"{left:,} of {chosen.sum():,} timelines are left out: no time to predict at")
    return Rows(
        title=source.title,
        unit="predictions",
        sequences=sequences,
        columns={
            "subject_id": np.array([source.subjects[m.owner] for m in moments], dtype=np.int64),
            "prediction_time": np.array([source.times[m.end - 1] for m in moments]),
        },
        outcomes=[m.outcome for m in moments],
        notes=tuple(notes),
    )
