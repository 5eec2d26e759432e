"""From a job to its files: batches, parts on the way, and the rows in their order at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clinattn.files.claims import claimed
from clinattn.tools.prediction.files import read_metadata, write_files
from clinattn.tools.prediction.job import Job
from clinattn.tools.prediction.models import Outputs
from clinattn.tools.prediction.parts import MANIFEST, Part, Parts, require_same
from clinattn.tools.prediction.rows import Progress
from clinattn.tools.prediction.settings import PredictionSettings
from clinattn.training.interruption import Stop, deferred_signals
from clinattn.training.sequences import Tokens
from clinattn.training.windows import pooled

BATCHES = 4  # of a part: what a kill may lose


class Result(NamedTuple):
    """signal: of the one that ended the run, 0 to the end. rows: that have been computed, of all.

    tokens, seconds: of this run, without those before it. columns: of predictions, by name.
    """

    signal: int
    rows: int
    tokens: int
    seconds: float
    columns: dict[str, Any]


def partial_folder(settings: PredictionSettings) -> Path:
    """The folder for results on the way, beside the first of the files."""
    path = next(iter(settings.files.values()))
    return path.with_name(f"{path.name}.partial")


def require_start(settings: PredictionSettings) -> None:
    """Raises ValueError where files or results of another run are in the way, or none to resume."""
    folder = partial_folder(settings)
    there = {name: path for name, path in settings.files.items() if path.is_file()}
    begun = (folder / MANIFEST).is_file()
    if settings.resume and not begun and len(there) < len(settings.files):
        raise ValueError(f"resume: {str(folder)!r} is not there: no run to go on with")
    if settings.resume:
        return
    if begun:
        raise ValueError(
            f"{str(folder)!r} has results of a run that was interrupted: expected resume, or that "
            "folder removed"
        )
    for name, path in there.items():
        raise ValueError(f"{name}={str(path)!r} is there: expected another file")


def is_finished(job: Job, settings: PredictionSettings) -> bool:
    """Returns whether all files of a run to resume are there. Raises ValueError for other files."""
    if not settings.resume or (partial_folder(settings) / MANIFEST).is_file():
        return False
    for path in settings.files.values():
        require_same(job.identity, read_metadata(path)["identity"], repr(str(path)))
    return True


def run(job: Job, settings: PredictionSettings, progress: Progress) -> Result:
    """Computes what is missing and writes the files, unless a signal comes.

    Raises ValueError where another run is at it, or the results there are of other input.
    """
    folder = partial_folder(settings)
    parts = Parts(folder, job.identity)
    with claimed(folder):
        if settings.resume:
            parts.check()
        else:
            parts.start()
        with deferred_signals() as stop:
            result = compute(job, settings, parts, progress, stop)
        if result.signal:
            return result
        progress("writing", result.rows, result.rows)
        result = result._replace(columns=write_files(job, settings, parts))
    parts.remove()
    return result


def compute(
    job: Job, settings: PredictionSettings, parts: Parts, progress: Progress, stop: Stop
) -> Result:
    """Adds the parts that are missing, or those before a signal."""
    first, total = parts.done(), len(job.rows)
    started, tokens = time.perf_counter(), 0
    while first < total and not stop.signal:
        end = _end(job.lengths, first, BATCHES * settings.batch_tokens)
        windows = [job.rows.sequences(row) for row in range(first, end)]
        flat = [sequence for of_row in windows for sequence in of_row]
        found: dict[int, Outputs] = {}
        for batch in job.model.batches([len(x) for x in flat], settings.batch_tokens):
            if stop.signal:
                break
            done = first + len(found) * (end - first) // len(flat)
            progress(f"predicting: row {done:,} of {total:,}", done, total)
            out = job.model([flat[i] for i in batch])
            for at, i in enumerate(batch):
                logits = None if out.logits is None else out.logits[at]
                found[i] = Outputs(logits, out.states[at])
            tokens += sum(len(flat[i]) for i in batch)
        if len(found) == len(flat):
            outputs = [found[i] for i in range(len(flat))]
            parts.add(_part(job, settings, first, windows, outputs))
            first = end
    seconds = time.perf_counter() - started
    return Result(stop.signal if first < total else 0, first, tokens, seconds, {})


def _end(lengths: np.ndarray, first: int, tokens: int) -> int:
    """The row after those from `first` on that have so many tokens together, or after one row."""
    reached = lengths[first : first + tokens].cumsum()
    return first + max(1, int(np.searchsorted(reached, tokens, "right")))


def _part(
    job: Job,
    settings: PredictionSettings,
    first: int,
    windows: Sequence[Sequence[Tokens]],
    outputs: Sequence[Outputs],
) -> Part:
    """The results of rows from those of their windows, which follow each other in outputs."""
    logits = np.zeros((len(windows), job.answer.outputs))
    states = np.zeros((len(windows), 0), dtype=np.float32)
    ends = np.cumsum([len(of_row) for of_row in windows]).tolist()
    of_rows = [outputs[end - len(of_row) : end] for of_row, end in zip(windows, ends, strict=True)]
    if job.answer.outputs:
        known = [torch.stack([x.logits for x in row if x.logits is not None]) for row in of_rows]
        logits = np.stack([pooled(x, job.answer.pool).numpy() for x in known])
    if settings.embeddings is not None:
        pairs = zip(windows, of_rows, strict=True)
        states = np.stack([_mean([x.states for x in row], of_row) for of_row, row in pairs])
    return Part(first, logits, states)


def _mean(states: Sequence[Tensor], windows: Sequence[Tokens]) -> np.ndarray:
    """The mean (hidden,) of the states of windows, each for as much as it has tokens."""
    if len(states) == 1:
        return states[0].numpy()
    weights = np.array([len(x) for x in windows])
    found: np.ndarray = np.average(torch.stack(list(states)).numpy(), 0, weights)
    return found.astype(np.float32)
