"""A checkpoint of `clinattn train`, and the data as its training read them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from clinattn.encoder import SequenceClassifier
from clinattn.tools.prediction.answers import Answer
from clinattn.tools.prediction.models import Model, PackedModel, placed
from clinattn.tools.prediction.rows import Rows
from clinattn.tools.prediction.settings import PredictionSettings
from clinattn.tools.prediction.texts import beginnings, note_rows
from clinattn.tools.prediction.timelines import timeline_rows
from clinattn.tools.vocabularies import require_same, require_words
from clinattn.training.checkpoint import model_of
from clinattn.training.corpus import tokens_of
from clinattn.training.origin import Origin
from clinattn.training.settings import TrainingSettings
from clinattn.training.start import check_source, of_checkpoint
from clinattn.workloads import Vocabulary, open_source
from clinattn.workloads.opening import parse_data
from clinattn.workloads.splits import chosen_split, default_split, trained_on
from clinattn.workloads.tables import read_rows


def read_trained(
    settings: PredictionSettings, origin: Origin
) -> tuple[Model, Answer, Rows, str]:
    """Model, answer, rows and split. Raises MedsError or ValueError for data that do not fit."""
    saved = origin.saved
    assert saved is not None and settings.data is not None
    where = f"checkpoint {str(origin.path)!r}"
    kind = parse_data(settings.data).kind
    classifies = saved["settings"]["task"] == "classify"
    of_timelines = saved["settings"].get("label_code") is not None
    if classifies and of_timelines != (kind == "meds"):
        trained, expected = ("timelines", "meds:DIR") if of_timelines else ("texts", "text:FILE")
        raise ValueError(f"{where} was trained on {trained}: expected data {expected}")
    training = TrainingSettings(
        **saved["settings"] | {"data": settings.data, "tokenizer": settings.tokenizer}
    )
    config, vocabulary, standard = of_checkpoint(saved)
    check_source(config, training)
    source = open_source(settings.data, tokenizer=settings.tokenizer)
    if settings.tokenizer is not None:
        require_same(source.vocabulary, vocabulary, settings.tokenizer)
    elif kind == "text":
        require_words(vocabulary, str(origin.path))
    notes = unknown_note(source.ids_of(vocabulary), vocabulary, source.where)
    split = settings.split or default_split(source, training.held_out)
    chosen = chosen_split(source, split, training.held_out)
    notes += seen_note(trained_on(source, training.held_out, saved.get("split")), chosen)
    events = tokens_of(
        source,
        vocabulary,
        times=config.positions == "rotary_time",
        standard=standard if config.numeric_values else None,
    )
    if kind == "meds":
        at_end = settings.at_end or not classifies
        rows = timeline_rows(source, events, chosen, training, at_end)
    else:
        path = Path(parse_data(settings.data).place)
        tokens = beginnings(source, events, vocabulary.cls, training.room)
        rows = note_rows(path, read_rows(path, False)[0], chosen, tokens, saved["classes"])
    device = torch.device(settings.device)
    module = placed(model_of(saved, where), device, settings.dtype)
    answer = Answer()
    if isinstance(module, SequenceClassifier):
        answer = Answer(tuple(saved["classes"]), boolean=of_timelines)
    rows = replace(rows, notes=(*rows.notes, *notes))
    return PackedModel(module, device, settings.dtype), answer, rows, split


def unknown_note(ids: np.ndarray, vocabulary: Vocabulary, where: str) -> list[str]:
    """A line on the share of events or words that are [UNK], where there are some.

    Raises ValueError where all are: the data are coded in another way than those of training.
    """
    share = float((ids == vocabulary.unknown).mean())
    if share == 1:
        raise ValueError(
            f"{where}: the checkpoint knows none of its codes or words: expected such as "
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
