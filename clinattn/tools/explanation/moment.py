"""The moment that a patient's prediction is explained at, and what is predicted there."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np

from clinattn.tools.explanation.case import shown
from clinattn.tools.explanation.settings import ExplainSettings
from clinattn.training.cuts import Cut, cut_at, cuts_of, matching_of
from clinattn.training.settings import TrainingSettings
from clinattn.workloads.code_names import with_meaning
from clinattn.workloads.source import NO_TIME, Source


class Moment(NamedTuple):
    """cut: what is read. when, meaning: of the prediction, for people. outcome: None if unknown."""

    cut: Cut
    when: str
    meaning: str
    outcome: str | None = None


def moment_of(
    source: Source,
    index: int,
    settings: ExplainSettings,
    training: TrainingSettings,
    saved: dict[str, Any],
    meanings: Mapping[str, str],
) -> Moment:
    """The moment that the settings name for a sequence. saved: the checkpoint. meanings: of codes.

    Raises ValueError for a cut that there is not, or for a time or a cut with a checkpoint of the
    other kind of label.
    """
    if "target" in saved:
        return _at_time(source, index, settings, training, saved["target"]["column"])
    if settings.at is not None:
        raise ValueError(f"at={settings.at!r}: expected only with a checkpoint of task labels")
    return _at_cut(source, index, settings, training, saved["classes"], meanings)


def _at_cut(
    source: Source,
    index: int,
    settings: ExplainSettings,
    training: TrainingSettings,
    classes: list[str],
    meanings: Mapping[str, str],
) -> Moment:
    """A cut of training, or the end of the timeline."""
    assert source.times is not None
    matching = matching_of(source, training.label_code)
    assert matching is not None
    end = source.bounds(index)[2]
    cuts = cuts_of(source, index, matching, training)
    number = len(cuts) if settings.cut is None else settings.cut
    if number > len(cuts) or (settings.cut is None and not cuts):
        given = "the last" if settings.cut is None else number
        raise ValueError(
            f"cut={given}: the timeline of patient {settings.patient} has {len(cuts)} cuts of "
            "training; expected one of them from 1, or 0 for its end"
        )
    cut = cuts[number - 1] if number else cut_at(source, index, matching, training, end, end)
    last = _last(source, cut)
    assert training.label_code is not None
    code = shown(with_meaning(training.label_code, source.vocabulary.tokens, meanings))
    follows = f"Here “present” means that a code like {code} follows"
    unread = "; the model does not read such codes."
    if not number:
        return Moment(cut, f"{last}, the end of the timeline", follows + unread)
    when = f"{last}, after its last event before the cut, cut {number} of {len(cuts)}"
    outcome = classes[int(cut.marked(source, matching))]
    return Moment(cut, when, f"{follows} before the next cut{unread}", outcome)


def _at_time(
    source: Source, index: int, settings: ExplainSettings, training: TrainingSettings, column: str
) -> Moment:
    """A prediction time, whose own events are read, or the end of the timeline."""
    assert source.times is not None
    if settings.cut is not None:
        raise ValueError(
            f"cut={settings.cut}: expected none with a checkpoint of task labels, but a time (at)"
        )
    _, timed, end = source.bounds(index)
    when = ", the end of the timeline"
    if settings.at is not None:
        moment = np.datetime64(datetime.fromisoformat(settings.at), "us").astype(np.int64)
        end = timed + int(np.searchsorted(source.times[timed:end], moment, side="right"))
        when = f", the last event until {minute(moment)}"
    cut = cut_at(source, index, None, training, end, end)
    meaning = f"The classes are those of {column} in the task labels of training."
    return Moment(cut, f"{_last(source, cut) or 'no time'}{when}", meaning)


def _last(source: Source, cut: Cut) -> str:
    assert source.times is not None
    return minute(source.times[cut.past[-1]]) if len(cut.past) else ""


def minute(microseconds: Any) -> str:
    """A time to the minute; "" for that of a static fact."""
    if microseconds == NO_TIME:
        return ""
    return str(np.datetime64(int(microseconds), "us").astype("datetime64[m]")).replace("T", " ")
