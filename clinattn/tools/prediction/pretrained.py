"""A folder of transformers and the notes that its tokenizer reads.

Encoders of families that clinattn has are computed by it, packed; others by transformers, padded,
with their attention replaced.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
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
from clinattn.tools.prediction.texts import note_rows
from clinattn.tools.pretrained_folder import PretrainedFolder, open_folder, require_classifier
from clinattn.training.origin import Origin
from clinattn.training.sequences import Tokens
from clinattn.training.settings import TrainingSettings
from clinattn.training.windows import FIRST
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
    rows = read_rows(path, False, **settings.table).rows
    answer = Answer(pool=settings.pool or TrainingSettings.pool)
    if folder.is_classifier:
        answer = replace(answer, classes=folder.classes, independent=folder.independent)
    if answer.independent and answer.pool == "readmission":
        raise ValueError("pool='readmission': expected another for classes that exclude none other")
    own = _own(folder)
    limit = folder.limit if own is None else _limit(own)
    windows = _windows(folder, limit, [row.text for row in rows], settings, answer.pool)
    if (empty := next((i for i, found in enumerate(windows) if not found), None)) is not None:
        raise ValueError(f"text_file={place!r}: row {empty} has no tokens: expected some")
    chosen = np.ones(len(rows), dtype=bool)
    found = note_rows(path, rows, chosen, windows.__getitem__, answer.classes)
    device = torch.device(settings.device)
    if own is None:
        return _padded(folder, settings, device), answer, found, ALL
    model = PackedModel(placed(own, device, settings.dtype), device, settings.dtype)
    return model, answer, found, ALL


def _windows(
    folder: PretrainedFolder,
    limit: int | None,
    texts: list[str],
    settings: PredictionSettings,
    pool: str,
) -> list[list[Tokens]]:
    """The windows of each text, with the special tokens of the folder's tokenizer around each.

    limit: the most tokens that the model has positions for, None for no limit.
    """
    most = folder.most_tokens(limit)
    overlap = TrainingSettings.overlap if settings.overlap is None else settings.overlap
    room = most - folder.tokenizer.num_special_tokens_to_add()
    encoded = folder.tokenizer(
        texts,
        truncation=True,
        max_length=most,
        stride=min(round(overlap * room), room - 1),
        return_overflowing_tokens=pool != FIRST,
        verbose=False,
    )
    of_window = encoded.get("overflow_to_sample_mapping", range(len(texts)))
    found: list[list[Tokens]] = [[] for _ in texts]
    for row, ids in zip(of_window, encoded["input_ids"], strict=True):
        if ids:
            found[row].append(Tokens(torch.tensor(ids)))
    return found


def _own(folder: PretrainedFolder) -> Any:
    """The encoder of clinattn with these weights; None of another family."""
    kind: Any = SequenceClassifier if folder.is_classifier else Encoder
    try:
        return kind.from_pretrained(folder.path)
    except (ValueError, FileNotFoundError, NotImplementedError):
        return None


def _limit(own: Any) -> int:
    config = getattr(own, "encoder", own).config
    return int(config.max_positions - config.position_offset)


def _padded(
    folder: PretrainedFolder, settings: PredictionSettings, device: torch.device
) -> PaddedModel:
    module = folder.model
    replace_attention(module)
    return PaddedModel(
        placed(module, device, settings.dtype),
        folder.is_classifier,
        pad=module.config.pad_token_id,
        states=settings.embeddings is not None,
        masked="attention_mask" in inspect.signature(module.forward).parameters,
        device=device,
        dtype=settings.dtype,
    )
