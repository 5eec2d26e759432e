"""A MEDS folder with task labels as training sequences: one for each label, of what was known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from clinattn.workloads import Vocabulary, open_source
from clinattn.workloads.labels import TaskLabels, read_labels
from clinattn.workloads.opening import parse_data
from clinattn.workloads.source import Source
from clinattn.workloads.splits import Division, divide
from clinattn.workloads.timelines import BESIDE, Progress, silent

from .cuts import Cuts
from .data import Corpus, Target
from .examples import sampled
from .moments import Moments
from .reading import Reader, fit_standard
from .settings import TrainingSettings
from .standard import Standard


def read_labelled(
    settings: TrainingSettings,
    vocabulary: Vocabulary | None = None,
    *,
    times: bool = False,
    values: bool = False,
    standard: Standard | None = None,
    progress: Progress = silent,
) -> Corpus:
    """The sequences of settings.data at the moments of settings.labels, as Moments reads them.

    Otherwise as read_corpus, but that vocabulary and scales are those of the events which the
    training sequences may read: nothing after the last prediction time of a subject counts.
    Raises MedsError or ValueError where the folder or the labels cannot be used.
    """
    assert settings.data is not None and settings.labels is not None
    labels = read_labels(settings.labels, parse_data(settings.data).place)
    source = open_source(
        settings.data, beside=Path(settings.output) / BESIDE, progress=progress
    )
    division = divide(source, settings.held_out)
    moments = Moments.of(source, labels)
    train, evaluated = moments.only(division.train), moments.only(division.evaluated)
    for part, name in ((train, "train"), (evaluated, division.name)):
        if not len(part):
            raise ValueError(
                f"{labels.where}: none of its {len(labels)} rows has a subject of the split "
                f"{name!r} of {source.where}, expected some"
            )
    classes, target = _target(labels, train, evaluated)
    fitted = train.until(source)
    if vocabulary is None:
        vocabulary = source.vocabulary_of(fitted, settings.min_count, settings.max_vocab)
    if values and standard is None:
        standard = fit_standard(source, vocabulary, fitted)
    reader = Reader(source, vocabulary, times, standard if values else None)

    def examples(part: Moments) -> Cuts:
        found = np.array([labels.value(row, classes) for row in part.rows.tolist()])
        return Cuts(reader, part.index, part.end, found, None, settings)

    sample = sampled(examples(evaluated), settings.eval_tokens)
    read = f"{division.line}; {_line(labels, source, moments, division)}{sample.line}"
    return Corpus(
        source=f"{source.counted} ({read})",
        tokens=vocabulary.tokens,
        special=vocabulary.special,
        mask=vocabulary.mask,
        train=examples(train),
        held_out=sample.examples,
        classes=classes,
        standard=standard,
        evaluated=division.name,
        split=division.record,
        target=target,
    )


def _target(
    labels: TaskLabels, train: Moments, evaluated: Moments
) -> tuple[tuple[str, ...], Target]:
    """Classes, () for numbers, and what the labels hold; from the training rows alone.

    Raises ValueError where these rows all have the same value, or others have a class of their own.
    """
    assert labels.column is not None
    found = {labels.values[row] for row in train.rows}
    if len(found) < 2:
        raise ValueError(
            f"{labels.where} gives all {len(train)} training rows {labels.column} {found.pop()!r}: "
            "expected two values or more"
        )
    if labels.numeric:
        numbers = torch.tensor([labels.values[row] for row in train.rows], dtype=torch.float64)
        scale = float(numbers.std(correction=0))
        return (), Target(labels.column, float(numbers.mean()), scale)
    unseen = {labels.values[row] for row in evaluated.rows} - found
    if unseen and labels.column == "categorical_value":
        raise ValueError(
            f"{labels.where} has classes {sorted(unseen)} in the rows to evaluate alone: expected "
            f"those of the training rows, {sorted(found)}"
        )
    return labels.classes(train.rows), Target(labels.column)


def _line(labels: TaskLabels, source: Source, moments: Moments, division: Division) -> str:
    """Says how many rows are read, and why the others are left out."""
    used = moments.only(division.train | division.evaluated)
    left = {
        "of subjects that the data have not": len(labels) - len(moments),
        "of other splits": len(moments) - len(used),
    }
    said = [f"{len(used):,} of {len(labels):,} rows of {labels.column} are read"]
    said += [f"{count:,} are {why}" for why, count in left.items() if count]
    if bare := used.without_events(source):
        said.append(f"{bare:,} have no event up to prediction_time, and are static facts alone")
    return ", ".join(said)
