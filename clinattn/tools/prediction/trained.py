"""A checkpoint of `clinattn train`, and the data as its training read them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clinattn.encoder import SequenceClassifier
from clinattn.tools.prediction.answers import Answer
from clinattn.tools.prediction.models import Model, PackedModel, placed
from clinattn.tools.prediction.rows import Progress, Rows
from clinattn.tools.prediction.settings import PredictionSettings
from clinattn.tools.prediction.texts import note_rows
from clinattn.tools.prediction.timelines import Timelines, unread
from clinattn.tools.vocabularies import require_words, tokenizer_for
from clinattn.training.checkpoint import model_of
from clinattn.training.origin import Origin
from clinattn.training.reading import Reader
from clinattn.training.sequences import Example
from clinattn.training.settings import TrainingSettings
from clinattn.training.start import check_source, of_checkpoint
from clinattn.training.windows import note_windows
from clinattn.workloads import Source, Vocabulary, open_source
from clinattn.workloads.labels import TaskLabels, read_labels
from clinattn.workloads.opening import parse_data
from clinattn.workloads.splits import chosen_split, default_split, trained_on
from clinattn.workloads.tables import read_rows
from clinattn.workloads.text import source_of_rows
from clinattn.workloads.timelines import BESIDE, silent


def read_trained(
    settings: PredictionSettings, origin: Origin, progress: Progress = silent
) -> tuple[Model, Answer, Rows, str]:
    """Model, answer, rows and split. Raises MedsError or ValueError for data that do not fit."""
    saved = origin.saved
    assert saved is not None and settings.data is not None
    where = f"checkpoint {str(origin.path)!r}"
    kind = parse_data(settings.data).kind
    target = saved.get("target")
    classifies = saved["settings"]["task"] == "classify"
    of_timelines = target is not None or saved["settings"].get("label_code") is not None
    if classifies and of_timelines == (kind == "text"):
        trained, expected = ("timelines", "meds:DIR") if of_timelines else ("texts", "text:FILE")
        raise ValueError(f"{where} was trained on {trained}: expected data {expected}")
    # task labels are no setting of a checkpoint, which has their column
    known = {"data": settings.data, "labels": None if target is None else target["column"]}
    training = TrainingSettings(**saved["settings"] | known)
    check_source(of_checkpoint(saved)[0], training)
    if kind == "text":
        rows, split = _notes(settings, training, saved)
    else:
        rows, split = _timelines(settings, training, saved, progress)
    device = torch.device(settings.device)
    module = placed(model_of(saved, where), device, settings.dtype)
    answer = Answer()
    if isinstance(module, SequenceClassifier):
        numbers = {}
        if target is not None and target["scale"] is not None:
            numbers = {"mean": target["mean"], "scale": target["scale"]}
        answer = Answer(
            tuple(saved["classes"]),
            boolean=of_timelines and _column(saved) == "boolean_value",
            pool=settings.pool or training.pool,
            **numbers,
        )
    return PackedModel(module, device, settings.dtype), answer, rows, split


def _timelines(
    settings: PredictionSettings,
    training: TrainingSettings,
    saved: dict[str, Any],
    progress: Progress,
) -> tuple[Rows, str]:
    assert training.data is not None
    config, vocabulary, standard = of_checkpoint(saved)
    labels = None
    if settings.labels is not None:
        folder = parse_data(training.data).place
        labels = read_labels(settings.labels, folder, required=False)
        _require_column(labels, saved)
    written = next(iter(settings.files.values()))
    beside = written.with_suffix(f".{BESIDE}")
    source = open_source(training.data, beside=beside, progress=progress)
    notes = unknown_note(source, vocabulary)
    split, chosen, more = _chosen(settings, training, saved, source)
    reader = Reader(
        source,
        vocabulary,
        times=config.positions == "rotary_time",
        standard=standard if config.numeric_values else None,
    )
    at_cuts = training.label_code is not None and labels is None and not settings.at_end
    timelines = Timelines(reader, chosen, training, unread(source, training, required=at_cuts))
    if labels is not None:
        rows = timelines.at_labels(labels)
    else:
        rows = timelines.at_cuts() if at_cuts else timelines.at_ends()
    return replace(rows, notes=(*rows.notes, *notes, *more)), split


def _column(saved: dict[str, Any]) -> str:
    """The column of task labels that a classifier of timelines predicts."""
    return str((saved.get("target") or {"column": "boolean_value"})["column"])


def _require_column(labels: TaskLabels, saved: dict[str, Any]) -> None:
    """Raises ValueError where the labels hold something else than the model predicts."""
    if saved["settings"]["task"] != "classify" or labels.column is None:
        return
    if labels.column != (column := _column(saved)):
        raise ValueError(
            f"{labels.where} has {labels.column}: expected {column}, which the checkpoint predicts"
        )


def _notes(
    settings: PredictionSettings, training: TrainingSettings, saved: dict[str, Any]
) -> tuple[Rows, str]:
    assert training.data is not None
    vocabulary = of_checkpoint(saved)[1]
    tokenizer = tokenizer_for(saved, settings.tokenizer)
    if tokenizer is None:
        require_words(vocabulary, settings.checkpoint)
    else:
        vocabulary = tokenizer.vocabulary
    path = Path(parse_data(training.data).place)
    read = read_rows(path, False, **settings.table)
    source = source_of_rows(path, read, tokenizer)
    reader = Reader(source, vocabulary)
    notes = unknown_note(source, vocabulary)
    split, chosen, more = _chosen(settings, training, saved, source)
    overlap = training.overlap if settings.overlap is None else settings.overlap
    pool = settings.pool or training.pool

    def sequences(row: int) -> list[Example]:
        ids = reader.whole(row).ids
        return note_windows(ids, vocabulary, training.room, overlap, pool)

    rows = note_rows(path, read.rows, chosen, sequences, saved["classes"])
    return replace(rows, notes=(*rows.notes, *notes, *more)), split


def _chosen(
    settings: PredictionSettings, training: TrainingSettings, saved: dict[str, Any], source: Source
) -> tuple[str, np.ndarray, list[str]]:
    """The split, its sequences (S,) bool, and a line on those that training has learnt from."""
    share = training.held_out
    split = settings.split or default_split(source, share)
    chosen = chosen_split(source, split, share)
    return split, chosen, seen_note(trained_on(source, share, saved.get("split")), chosen)


def unknown_note(source: Source, vocabulary: Vocabulary) -> list[str]:
    """A line on the share of events or words that are [UNK], where there are some.

    Raises ValueError where all are: the data are coded in another way than those of training.
    """
    share = source.unknown_share(vocabulary)
    if share == 1:
        raise ValueError(
            f"{source.where}: the checkpoint knows none of its codes or words: expected such as "
            f"{vocabulary.tokens[-1]!r}"
        )
    return [f"{share:.1%} of events or words are new to the model, [UNK]"] if share else []


def seen_note(seen: np.ndarray | None, chosen: np.ndarray) -> list[str]:
    """A line on the sequences chosen (S,) bool that training has learnt from, where there are."""
    if seen is None:
        return ["whether the model was trained on these subjects is not known: other splits"]
    count = int((seen & chosen).sum())
    if not count:
        return []
    return [
        f"{count:,} of {chosen.sum():,} are subjects that the model was trained on, if its data "
        "were these: their figures say nothing of others"
    ]
