"""A patient's timeline as events in visits, up to the moment that a classifier predicts at."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from clinattn.tools.explanation.case import Case, Group, Model, Unit, shown
from clinattn.tools.explanation.moment import minute, moment_of
from clinattn.tools.explanation.settings import ExplainSettings
from clinattn.training.reading import Reader
from clinattn.training.sequences import Example
from clinattn.training.settings import TrainingSettings
from clinattn.training.start import of_checkpoint
from clinattn.workloads import Vocabulary, open_source
from clinattn.workloads.code_names import code_descriptions
from clinattn.workloads.opening import parse_data
from clinattn.workloads.source import BIRTH, MICROSECONDS_PER_HOUR, NO_TIME, Source
from clinattn.workloads.splits import standing

FACTS = "Static facts"


def timeline_case(
    settings: ExplainSettings,
    saved: dict[str, Any],
    training: TrainingSettings,
    make: Callable[[Example, Vocabulary], Model],
    facts: dict[str, str],
) -> Case:
    """The case of a patient at a moment. saved: the checkpoint; training: its settings.

    Raises MedsError or ValueError where the folder, patient or moment cannot be used.
    """
    assert settings.data is not None
    config, vocabulary, standard = of_checkpoint(saved)
    source = open_source(settings.data)
    assert source.times is not None and source.values is not None
    index = _patient(source, str(settings.patient))
    meanings = code_descriptions(parse_data(settings.data).place)
    moment = moment_of(source, index, settings, training, saved, meanings)
    cut = moment.cut
    reader = Reader(
        source,
        vocabulary,
        times=config.positions == "rotary_time",
        standard=standard if config.numeric_values else None,
    )
    at = np.r_[cut.static, cut.past]
    if not len(at):
        raise ValueError(
            f"patient={settings.patient}: no event is before the prediction: expected some"
        )
    units, groups = _events(source, vocabulary, at, settings.visit_gap, meanings)
    stands = standing(source, index, training.held_out, saved.get("split"))
    facts |= {
        "patient": f"{settings.patient}, of {source.title}",
        "this patient in training": stands.words,
        "prediction at": moment.when,
        "events read": f"{len(at):,} of {cut.end - source.bounds(index)[0]:,} until then",
        "values of events": "read" if config.numeric_values else "shown, but not read",
        "times of events": "read" if config.positions == "rotary_time" else "only their order",
    }
    if moment.outcome is not None:
        facts["what followed in the record"] = moment.outcome
    warnings = []
    if stands.trained_on is None:
        warnings.append("Whether the model was trained on this patient is not known.")
    elif stands.trained_on:
        warnings.append("The model was trained on this patient: it may know the outcome by heart.")
    example = cut.sequence(reader)
    return Case(
        model=make(example, vocabulary),
        title=f"patient {settings.patient}",
        unit="event",
        units=units,
        of_token=torch.arange(-1, len(at)),
        groups=groups,
        predicted=moment.meaning,
        facts=facts,
        warnings=warnings,
    )


def _patient(source: Source, patient: str) -> int:
    for index, subject in enumerate(source.subjects):
        if str(subject) == patient:
            return index
    raise ValueError(
        f"patient={patient!r} is none of the {len(source)} patients of {source.where}: expected "
        f"one such as {source.subjects[0]}"
    )


def _events(
    source: Source, vocabulary: Vocabulary, at: np.ndarray, gap: float, meanings: dict[str, str]
) -> tuple[list[Unit], list[Group]]:
    """The events at the indices `at`, and their visits: what `gap` hours do not separate.

    Static facts, and a birth, are a group of their own.
    """
    assert source.times is not None and source.values is not None
    codes = [source.vocabulary.tokens[i] for i in source.ids[at]]
    times, values = source.times[at], source.values[at]
    known = set(vocabulary.tokens)
    facts = (times == NO_TIME) | np.array([code == BIRTH for code in codes])
    long = np.r_[False, np.diff(times) > gap * MICROSECONDS_PER_HOUR] & ~facts
    begins = np.r_[True, facts[1:] != facts[:-1]] | long
    group = begins.cumsum() - 1
    units = [
        Unit(
            shown(code),
            f"{value:g}" if np.isfinite(value) else "",
            shown(meanings.get(code, "")),
            minute(time),
            code in known,
            int(number),
        )
        for code, value, time, number in zip(codes, values, times, group, strict=True)
    ]
    first = np.flatnonzero(begins)
    last = np.r_[first[1:], len(units)] - 1
    visits = accumulate(int(not facts[i]) for i in first)
    groups = [
        Group(FACTS if facts[i] else f"Visit {number}", units[i].when, units[j].when)
        for i, j, number in zip(first, last, visits, strict=True)
    ]
    return units, groups
