"""The parquet files of predictions and embeddings, for their owner alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clinattn.files.disk import parse_json, written_whole
from clinattn.tools.environment import environment
from clinattn.tools.evaluation.predictions import FACTS
from clinattn.tools.prediction.job import Job
from clinattn.tools.prediction.parts import Part, Parts
from clinattn.tools.prediction.settings import PredictionSettings

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
ROWS = 16_384  # of a row group


def write_files(job: Job, settings: PredictionSettings, parts: Parts) -> dict[str, Any]:
    """Writes what the settings ask for; returns the columns of predictions."""
    about = metadata(job, settings)
    rows = _table(job.rows.columns)
    predicted: dict[str, Any] = {}
    if settings.output is not None:
        logits = np.concatenate([part.logits for part in parts])
        predicted = job.answer.columns(logits, job.rows.outcomes)
        table = rows
        for name, column in predicted.items():
            table = table.append_column(name, column)
        slices = (table.slice(start, ROWS) for start in range(0, len(table), ROWS))
        _write(settings.output, table.schema, slices, about)
    if settings.embeddings is not None:
        schema = _embedded(rows, [next(iter(parts))]).schema
        pieces = (_embedded(rows, piece) for piece in _pieces(parts))
        _write(settings.embeddings, schema, pieces, about)
    return predicted


def metadata(job: Job, settings: PredictionSettings) -> dict[str, Any]:
    """Facts on a file: what was predicted, by what, from what, and where."""
    return {
        "format": FORMAT,
        "checkpoint": dict(job.about),
        "data": job.rows.title,
        "split": job.split,
        "rows": len(job.rows),
        "classes": list(job.answer.classes),
        "independent": job.answer.independent,
        "notes": list(job.rows.notes),
        "settings": {
            "dtype": settings.dtype,
            "device": settings.device,
            "batch_tokens": settings.batch_tokens,
            "at_end": settings.at_end,
            "labels": None if settings.labels is None else settings.labels.name,
        },
        "identity": dict(job.identity),
        "environment": environment(torch.device(settings.device)),
    }


def read_metadata(path: Path) -> dict[str, Any]:
    """The facts on a file that `write_files` has written. Raises ValueError for another file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = parse_json((pq.read_schema(path).metadata or {}).get(FACTS, b"null"))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is no file of clinattn predict")
    return found


def _write(
    path: Path, schema: pa.Schema, tables: Iterable[pa.Table], about: Mapping[str, Any]
) -> None:
    import pyarrow.parquet as pq

    known = schema.with_metadata({FACTS: json.dumps(about).encode()})
    with written_whole(path, private=True) as partial, pq.ParquetWriter(partial, known) as file:
        for table in tables:
            file.write_table(table.replace_schema_metadata(known.metadata))


def _pieces(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Consecutive parts of about ROWS rows together."""
    held: list[Part] = []
    for part in parts:
        held.append(part)
        if part.end - held[0].first >= ROWS:
            yield held
            held = []
    if held:
        yield held


def _embedded(rows: pa.Table, parts: list[Part]) -> pa.Table:
    """The rows of consecutive parts, with their states."""
    import pyarrow as pa

    states = np.concatenate([part.states for part in parts])
    column = pa.FixedSizeListArray.from_arrays(pa.array(states.reshape(-1)), states.shape[1])
    return rows.slice(parts[0].first, len(states)).append_column("embedding", column)


def _table(columns: Mapping[str, Any]) -> pa.Table:
    """Columns as a table; a time is in microseconds, as MEDS has it."""
    import pyarrow as pa

    kinds = {"prediction_time": pa.timestamp("us")}
    return pa.table({name: pa.array(x, kinds.get(name)) for name, x in columns.items()})
