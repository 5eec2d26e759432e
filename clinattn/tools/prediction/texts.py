"""Notes of a file to predict for, one row each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clinattn.tools.prediction.rows import Rows
from clinattn.training.sequences import Tokens
from clinattn.workloads.tables import Row


def note_rows(
    path: Path,
    rows: Sequence[Row],
    chosen: np.ndarray,
    sequences: Callable[[int], Sequence[Tokens]],
    classes: Sequence[str],
) -> Rows:
    """The rows chosen (R,) bool, in the order of the file. sequences: of a row of the file.

    Their subject is a column where the file has one: without, it would be the text.
    """
    at = np.flatnonzero(chosen).tolist()
    labels = [rows[i].label for i in at]
    columns: dict[str, Any] = {"row": np.array(at, dtype=np.int64)}
    if any(row.subject != row.text for row in rows):
        columns["subject_id"] = _subjects([rows[i].subject for i in at])
    notes = []
    if others := sorted({x for x in labels if x is not None} - set(classes)):
        notes.append(f"{len(others)} labels are no class of the model, such as {others[0]!r}")
    return Rows(
        title=path.name,
        unit="rows",
        sequences=lambda row: sequences(at[row]),
        columns=columns,
        outcomes=labels,
        notes=tuple(notes),
    )


def _subjects(names: list[str]) -> Any:
    """Turns names into whole numbers, as MEDS has them, where all are such; else returns them."""
    whole = all(name.lstrip("-").isdigit() and len(name) < 19 for name in names)
    return np.array([int(name) for name in names], dtype=np.int64) if whole else names
