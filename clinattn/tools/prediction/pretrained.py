"""A folder of transformers and the notes that its tokenizer reads.

Encoders of families that clinattn has are computed by it, packed; others by transformers, padded,
with their attention replaced.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from clinattn.encoder import Encoder, SequenceClassifier
from clinattn.integrations.replace import replace_attention
from clinattn.tools.prediction.answers import Answer
from clinattn.tools.prediction.models import Model, PackedModel, PaddedModel, placed
from clinattn.tools.prediction.rows import Rows
from clinattn.tools.prediction.settings import PredictionSettings
from clinattn.tools.prediction.texts import note_rows, of_ids
from clinattn.tools.pretrained_folder import PretrainedFolder, open_folder, require_classifier
from clinattn.training.origin import Origin
from clinattn.workloads.opening import parse_data
from clinattn.workloads.splits import ALL
from clinattn.workloads.tables import read_rows


def read_pretrained(
    settings: PredictionSettings, origin: Origin
) -> tuple[Model, Answer, Rows, str]:
    """Model, answer, rows and split. Raises ValueError for what cannot be used."""
    folder = open_folder(origin.path)
    assert settings.data is not None
    kind, place = parse_data(settings.data)
    if kind != "text":
        raise ValueError(f"{folder.where} is a model of transformers: expected data text:FILE")
    if settings.tokenizer is not None:
        raise ValueError(f"{folder.where} has its tokenizer: expected no other")
    if settings.split not in (None, ALL):
        raise ValueError(f"split={settings.split!r}: expected {ALL!r} for a model of transformers")
    if settings.output is not None:
        require_classifier(folder)
    path = Path(place)
    rows = read_rows(path, False)[0]
    encoded = folder.tokenizer(
        [row.text for row in rows], truncation=True, max_length=folder.max_tokens, verbose=False
    )["input_ids"]
    if (empty := next((i for i, ids in enumerate(encoded) if not ids), None)) is not None:
        raise ValueError(f"text_file={place!r}: row {empty} has no tokens: expected some")
    answer = Answer()
    if folder.is_classifier:
        answer = Answer(folder.classes, independent=folder.independent)
    chosen = np.ones(len(rows), dtype=bool)
    found = note_rows(path, rows, chosen, of_ids(encoded), answer.classes)
    return _model(folder, settings), answer, found, ALL


def _model(folder: PretrainedFolder, settings: PredictionSettings) -> Model:
    device = torch.device(settings.device)
    kind: Any = SequenceClassifier if folder.is_classifier else Encoder
    try:
        own = kind.from_pretrained(folder.path)
    except (ValueError, FileNotFoundError, NotImplementedError):  # of another family
        module = folder.model
        replace_attention(module)
        pad = module.config.pad_token_id
        module = placed(module, device, settings.dtype)
        return PaddedModel(module, folder.is_classifier, pad, device, settings.dtype)
    return PackedModel(placed(own, device, settings.dtype), device, settings.dtype)
