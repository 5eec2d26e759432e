"""A note as a classifier of transformers reads it, from a folder with its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clinattn.explain import words_of
from clinattn.integrations.replace import replace_attention
from clinattn.tools.explanation.case import Case
from clinattn.tools.explanation.note import (
    Words,
    known_words,
    note_case,
    words_and_spans,
)
from clinattn.tools.explanation.settings import ExplainSettings
from clinattn.tools.pretrained_folder import open_folder, require_classifier

BATCH = 8_192  # tokens computed at once


@dataclass(frozen=True)
class Pretrained:
    """A model of transformers and what its tokenizer made of a note; a Model of case.py."""

    module: Any
    classes: tuple[str, ...]
    inputs: dict[str, Tensor]  # (1, N) each
    baseline: Tensor | None
    independent: bool
    replaced: bool

    def logits(self, kept: Sequence[Tensor]) -> Tensor:
        """Without padding: sequences of equal length are a batch."""
        most = BATCH if self.module.config.pad_token_id is not None else 1
        found: list[Tensor] = [torch.empty(0)] * len(kept)
        order = sorted(range(len(kept)), key=lambda i: len(kept[i]))
        for length, same in groupby(order, key=lambda i: len(kept[i])):
            chosen, rows = list(same), max(1, most // max(length, 1))
            for start in range(0, len(chosen), rows):
                batch = chosen[start : start + rows]
                at = torch.stack([kept[i] for i in batch])
                inputs = {name: x[0, at.to(x.device)] for name, x in self.inputs.items()}
                with torch.inference_mode():
                    logits = self.module(**inputs).logits.double().cpu()
                for i, row in zip(batch, logits, strict=True):
                    found[i] = row
        return torch.stack(found)

    def without_attention(self) -> str | None:
        name = type(self.module).__name__
        return None if self.replaced else f"no attention of {name} is one that clinattn replaces"


def read_folder(settings: ExplainSettings, text: str | None) -> Case:
    """The case of a folder of transformers. text: of the note.

    Raises ValueError for a folder without weights, a classifier or a fast tokenizer.
    """
    where = f"checkpoint {settings.checkpoint!r}"
    if text is None:
        raise ValueError(f"{where} is a model of transformers: expected text")
    if settings.tokenizer is not None:
        raise ValueError(f"{where} has its tokenizer: expected no other")
    folder = open_folder(Path(settings.checkpoint))
    require_classifier(folder)
    model, tokenizer = folder.model, folder.tokenizer
    most = folder.most_tokens(folder.limit)
    whole = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    if not whole["input_ids"]:
        raise ValueError(f"text={str(settings.text)!r} has no words: expected some")
    encoding = tokenizer(
        text, truncation=True, max_length=most, return_tensors="pt", return_offsets_mapping=True
    )
    offsets = encoding.pop("offset_mapping")[0].tolist()
    of_token, spans = _units(text, words_of(encoding)[0].tolist(), offsets)
    count = len(words_and_spans(text, whole.word_ids(), whole["offset_mapping"])[1])
    replaced = bool(replace_attention(model).replaced)
    device = torch.device(settings.device)
    model.to(device)
    inputs = {name: x.to(device) for name, x in encoding.items()}
    ids = inputs["input_ids"][0].tolist()
    words = Words(ids, of_token, spans, known_words(ids, of_token, tokenizer.unk_token_id))
    return note_case(
        Pretrained(
            model,
            folder.classes,
            inputs,
            _baseline(tokenizer, inputs["input_ids"], of_token),
            folder.independent,
            replaced,
        ),
        settings,
        text,
        words.units(text, len(of_token)),
        torch.tensor(of_token),
        count,
        {"model": f"{settings.checkpoint}, {type(model).__name__}"},
    )


def _units(
    text: str, words: list[int], offsets: list[tuple[int, int]]
) -> tuple[list[int], list[tuple[int, int]]]:
    """The unit of each token, -1 for a special one, and the places of units."""
    real = [i for i, word in enumerate(words) if word >= 0]
    numbers, spans = words_and_spans(text, [words[i] for i in real], [offsets[i] for i in real])
    found = [-1] * len(words)
    for i, number in zip(real, numbers, strict=True):
        found[i] = number
    return found, spans


def _baseline(tokenizer: Any, ids: Tensor, of_token: list[int]) -> Tensor | None:
    """The ids with [MASK], or else padding, for every word; None where there is neither."""
    token = tokenizer.mask_token_id
    token = tokenizer.pad_token_id if token is None else token
    if token is None:
        return None
    return torch.where(torch.tensor(of_token, device=ids.device) >= 0, token, ids)
