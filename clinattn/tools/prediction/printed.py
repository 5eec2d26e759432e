"""Lines that a run of `clinattn predict` begins and ends with."""

from __future__ import annotations

from collections import Counter
from typing import Any

from clinattn.tools.prediction.job import Job
from clinattn.tools.prediction.predict import Result
from clinattn.tools.prediction.settings import PredictionSettings

MOST = 6  # classes that are named


def notes(job: Job) -> list[str]:
    """Lines on the rows that are predicted for, those left out, and the checkpoint that is read."""
    tokens = f"{job.lengths.sum():,} tokens"
    passed = job.about["passed_over"]
    return [
        f"{job.rows.title}, split {job.split}: {len(job.rows):,} {job.rows.unit}, {tokens}",
        *(f"{message}; {job.about['name']} is read instead" for message in passed),
        *job.rows.notes,
    ]


def ending(job: Job, settings: PredictionSettings, result: Result) -> list[str]:
    """The classes, predicted and as far as they are known, the speed and the files."""
    lines = []
    if result.columns:
        predicted = next(
            result.columns[name].to_pylist()
            for name in ("predicted_boolean_value", "predicted_label", "predicted_value")
            if name in result.columns
        )
        lines.append(f"predicted: {_described(job, predicted)}")
        known = [outcome for outcome in job.rows.outcomes if outcome is not None]
        if known:
            of = "" if len(known) == len(job.rows) else f", for {len(known):,} of the rows"
            lines.append(f"known: {_described(job, known)}{of}")
    if result.seconds > 0 and result.tokens:
        rate = result.tokens / result.seconds
        lines.append(f"{result.tokens:,} tokens in {result.seconds:,.1f} s: {rate:,.0f} tokens/s")
    for path in settings.files.values():
        lines.append(f"wrote {path}, {result.rows:,} rows, which have the data of persons")
    return lines


def _described(job: Job, values: list[Any]) -> str:
    """The share of each class, the most frequent first; of numbers the mean and the range."""
    if job.answer.scale is not None:
        mean = sum(values) / len(values)
        return f"mean {mean:.6g}, from {min(values):.6g} to {max(values):.6g}"
    counts = Counter(job.answer.named(values)).most_common(MOST + 1)
    shown = [f"{name} {count / len(values):.1%}" for name, count in counts[:MOST]]
    return ", ".join(shown) + (", ..." if len(counts) > MOST else "")
