"""Files of predictions, by the MEDS evaluation schema, and the record of their evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clinattn.tools.evaluation.evaluate import evaluated
from clinattn.tools.evaluation.settings import EvaluateSettings


def write_binary(path: Path, truth, probability, subject=None, facts=None, **columns) -> Path:
    """A row for each of truth; columns: others, which may replace these. Returns the path."""
    rows = len(truth)
    table = {
        "subject_id": pa.array(range(rows) if subject is None else subject, pa.int64()),
        "prediction_time": pa.array(range(rows), pa.timestamp("us")),
        "boolean_value": pa.array(truth, pa.bool_()),
        "predicted_boolean_probability": pa.array(probability, pa.float32()),
    }
    made = pa.table({name: x for name, x in (table | columns).items() if x is not None})
    if facts is not None:
        made = made.replace_schema_metadata({b"clinattn": json.dumps(facts).encode()})
    pq.write_table(made, path)
    return path


def drawn(rows: int, seed: int, slope: float = 1.0, shift: float = 0.0):
    """Outcomes (rows,), and probabilities whose recalibration has this slope and intercept."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(-1, 1.5, rows)
    truth = rng.random(rows) < 1 / (1 + np.exp(-odds))
    return truth, 1 / (1 + np.exp(-(odds - shift) / slope))


def evaluate_file(path: Path, by=(), **settings):
    """The record of a file, without progress."""
    return evaluated(EvaluateSettings(path, tuple(by), **settings), lambda *_: None)
