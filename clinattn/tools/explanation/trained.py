"""A patient or a note as a checkpoint of `clinattn train --task classify` reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clinattn.encoder import SequenceClassifier
from clinattn.tools.explanation.case import Case
from clinattn.tools.explanation.note import by_tokenizer, by_words, note_case
from clinattn.tools.explanation.settings import ExplainSettings
from clinattn.tools.explanation.timeline import timeline_case
from clinattn.tools.vocabularies import tokenizer_for
from clinattn.training.batches import consecutive, packed
from clinattn.training.checkpoint import model_of
from clinattn.training.sequences import Example
from clinattn.training.settings import TrainingSettings
from clinattn.training.start import of_checkpoint
from clinattn.training.windows import note_windows
from clinattn.workloads import Vocabulary

BATCH = 16_384  # tokens computed at once


@dataclass(frozen=True)
class Trained:
    """An encoder's classifier and an example; a Model of case.py."""

    module: SequenceClassifier
    classes: tuple[str, ...]
    device: torch.device
    example: Example
    vocabulary: Vocabulary
    independent: bool = False

    @property
    def inputs(self) -> dict[str, Tensor]:
        """A batch of one, (1, N)."""
        given = {
            "inputs": self.example.ids,
            "positions": self.example.days,
            "values": self.example.values,
        }
        return {name: x[None].to(self.device) for name, x in given.items() if x is not None}

    @property
    def baseline(self) -> dict[str, Tensor]:
        """Every code and word is [MASK], and no value is known."""
        ordinary = torch.from_numpy(self.vocabulary.ordinary())[self.example.ids]
        ids = self.example.ids.masked_fill(ordinary, self.vocabulary.mask)
        given = {"inputs": ids}
        if self.example.values is not None:
            given["values"] = torch.full_like(self.example.values, float("nan"))
        return {name: x[None].to(self.device) for name, x in given.items()}

    def logits(self, kept: Sequence[Tensor]) -> Tensor:
        """Packed, as in training; sequences of BATCH tokens at once."""
        batches = consecutive(enumerate(map(len, kept)), BATCH)
        found = []
        with torch.inference_mode():
            for batch in batches:
                ids, arguments = packed([self.example.take(kept[i]) for i in batch], self.device)
                found.append(self.module(ids, **arguments).logits.double().cpu())
        return torch.cat(found)

    def without_attention(self) -> None:
        return None


def read_checkpoint(
    settings: ExplainSettings, path: Path, saved: dict[str, Any], text: str | None
) -> Case:
    """The case of a checkpoint at `path`. text: of a note, or None for a patient.

    Raises ValueError for one that is no classifier, and bad input.
    """
    module = model_of(saved, f"checkpoint {str(path)!r}")
    task = saved["settings"]["task"]
    if not isinstance(module, SequenceClassifier):
        raise ValueError(
            f"checkpoint {str(path)!r} was trained with task={task!r}: expected 'classify'"
        )
    target = saved.get("target")
    if target is not None and not saved["classes"]:
        raise ValueError(
            f"checkpoint {str(path)!r} predicts a number ({target['column']}): expected one that "
            "predicts classes"
        )
    of_timelines = target is not None or saved["settings"].get("label_code") is not None
    if of_timelines != (text is None):
        expected = "data and patient" if of_timelines else "text"
        raise ValueError(
            f"checkpoint {str(path)!r} was trained on {'timelines' if of_timelines else 'texts'}: "
            f"expected {expected}"
        )
    device = torch.device(settings.device)
    # settings check the kind of the data; a note is no table, and is not read by them
    data = settings.data if of_timelines else f"text:{settings.text}"
    # nor are task labels: of their settings, checkpoints have the column
    labels = None if target is None else target["column"]
    training = TrainingSettings(**saved["settings"] | {"data": data, "labels": labels})
    shape = f"preset {training.preset}" if training.preset else saved["architecture"]
    facts = {"model": f"{path}, {shape}, step {saved['step']:,}"}
    make = partial(Trained, module.to(device), tuple(saved["classes"]), device)
    if text is None:
        return timeline_case(settings, saved, training, make, facts)
    return _note_case(text, settings, saved, training, make, facts)


def _note_case(
    text: str,
    settings: ExplainSettings,
    saved: dict[str, Any],
    training: TrainingSettings,
    make: Callable[[Example, Vocabulary], Trained],
    facts: dict[str, str],
) -> Case:
    vocabulary = of_checkpoint(saved)[1]
    tokenizer = tokenizer_for(saved, settings.tokenizer)
    if tokenizer is None:
        words = by_words(text, vocabulary, settings)
    else:
        words, vocabulary = by_tokenizer(text, tokenizer, settings), tokenizer.vocabulary
    windows = note_windows(
        torch.tensor(words.ids), vocabulary, training.room, training.overlap, training.pool
    )
    example = windows[0]
    read = len(example) - 1 - (vocabulary.end is not None)
    if len(windows) > 1:
        facts["window"] = (
            f"the first of {len(windows):,}, explained by itself; a prediction for the note pools "
            f"them ({training.pool})"
        )
    ending = [] if vocabulary.end is None else [-1]
    of_token = torch.tensor([-1, *words.of_token[:read], *ending])
    units = words.units(text, read)
    return note_case(
        make(example, vocabulary), settings, text, units, of_token, len(words.spans), facts
    )
