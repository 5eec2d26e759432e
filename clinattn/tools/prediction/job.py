"""The job of a run: model, rows, and what the file says about both. All input is checked here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from clinattn.backends.cpu import instruction_set
from clinattn.tools.environment import versions
from clinattn.tools.prediction.answers import Answer
from clinattn.tools.prediction.models import Model
from clinattn.tools.prediction.rows import Progress, Rows
from clinattn.tools.prediction.settings import PredictionSettings
from clinattn.training.origin import resolve, sha256


@dataclass(frozen=True)
class Job:
    """model: predicts for sequences of rows, whose lengths are (R,) int64.

    split: of the rows. identity: of checkpoint, data and settings, by which an interrupted run is
    known again. about: more on the checkpoint, for the file.
    """

    model: Model
    answer: Answer
    rows: Rows
    split: str
    lengths: np.ndarray
    identity: Mapping[str, str]
    about: Mapping[str, Any]


def read_job(settings: PredictionSettings, progress: Progress = lambda *_: None) -> Job:
    """Raises MedsError or ValueError where the checkpoint or the data cannot be used."""
    origin = resolve(settings.checkpoint)
    if origin.saved is None:
        from clinattn.tools.prediction.pretrained import read_pretrained

        model, answer, rows, split = read_pretrained(settings, origin)
    else:
        from clinattn.tools.prediction.trained import read_trained

        model, answer, rows, split = read_trained(settings, origin, progress)
    if settings.output is not None and not answer.outputs:
        raise ValueError(
            f"checkpoint {str(origin.path)!r} predicts nothing: expected embeddings alone, or a "
            "classifier"
        )
    lengths, digest = rows.measured(progress)
    checkpoint = sha256(origin)
    return Job(
        model=model,
        answer=answer,
        rows=rows,
        split=split,
        lengths=lengths,
        identity={
            "checkpoint": checkpoint,
            "data": digest,
            "dtype": settings.dtype,
            "device": settings.device,
            "files": " and ".join(settings.files),
            "versions": f"{versions()}, {instruction_set()}",
        },
        about={
            "name": origin.path.resolve().name,
            "sha256": checkpoint,
            **({} if origin.saved is None else _trained(origin.saved)),
            "passed_over": list(origin.damaged),
        },
    )


def _trained(saved: dict[str, Any]) -> dict[str, Any]:
    known = saved["settings"]
    names = ("task", "preset", "label_code", "cuts", "max_tokens")
    return {"step": saved["step"], **{name: known.get(name) for name in names}}
