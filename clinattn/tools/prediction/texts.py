"""Notes of a file to predict for, one row each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clinattn.tools.prediction.rows import Rows
from clinattn.training.data import Tokens, windows
from clinattn.workloads import Source
from clinattn.workloads.tables import Row


def note_rows(
    path: Path,
    rows: Sequence[Row],
    chosen: np.ndarray,
    tokens: Callable[[int], Tokens],
    classes: Sequence[str],
) -> Rows:
    """The rows chosen (R,) bool, in the order of the file. tokens: of a row of the file.

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
        tokens=lambda row: tokens(at[row]),
        columns=columns,
        outcomes=labels,
        notes=tuple(notes),
    )


def _subjects(names: list[str]) -> Any:
    """Whole numbers as MEDS has them, where all names are such; else the names."""
    whole = all(name.lstrip("-").isdigit() and len(name) < 19 for name in names)
    return np.array([int(name) for name in names], dtype=np.int64) if whole else names


def beginnings(source: Source, events: Tokens, cls: int, room: int) -> Callable[[int], Tokens]:
    """A function from a row to its first words, after [CLS], as a classifier is trained on them."""
    nothing = events.take(slice(0, 0))

    def tokens(row: int) -> Tokens:
        start, _, end = source.bounds(row)
        return windows(nothing, events.take(slice(start, min(end, start + room))), cls, room)[0]

    return tokens


def of_ids(ids: Sequence[Sequence[int]]) -> Callable[[int], Tokens]:
    """A function from a row to its ids as tokens."""
    return lambda row: Tokens(torch.tensor(ids[row], dtype=torch.int64))
