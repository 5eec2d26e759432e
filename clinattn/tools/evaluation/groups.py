"""Subgroups of rows, by a column of the predictions or of a table, or by a code of the patient."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from clinattn.tools.evaluation.predictions import Predictions, read_table
from clinattn.tools.evaluation.settings import EvaluateSettings

if TYPE_CHECKING:
    import pyarrow as pa

    from clinattn.workloads import Source

UNKNOWN = "unknown"
MOST_VALUES = 12  # of a column of numbers, each a group; others are cut at their quartiles
MOST_GROUPS = 50
NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Grouping:
    """title: what parts the rows. names: of the groups. of_row: (N,) numbers of names."""

    title: str
    names: tuple[str, ...]
    of_row: np.ndarray


def groupings(settings: EvaluateSettings, predictions: Predictions) -> list[Grouping]:
    """The groupings that the settings ask for, in their order. Raises ValueError."""
    columns = {name: predictions.table[name] for name in predictions.table.column_names}
    if settings.table is not None:
        columns |= _joined(settings, predictions)
    codes = [name for name in settings.by if name not in columns]
    if codes and settings.data is None:
        raise ValueError(
            f"by={codes[0]!r} is no column, of {sorted(columns)}: expected one, or for a code "
            "data=meds:DIR"
        )
    if settings.data is not None and not codes:
        raise ValueError(f"data={settings.data!r}: expected only with a code as by")
    by_code = _by_codes(codes, settings, predictions) if codes else {}
    return [
        by_code[name] if name in by_code else _by_column(name, columns[name])
        for name in settings.by
    ]


def _joined(settings: EvaluateSettings, predictions: Predictions) -> dict[str, Any]:
    """Columns of the table, by row of the predictions; null for patients that it lacks."""
    where = f"table={str(settings.table)!r}"
    assert settings.table is not None
    table = read_table(settings.table, where)
    if "subject_id" not in table.column_names:
        raise ValueError(f"{where} has the columns {table.column_names}: expected subject_id")
    subjects = [str(x) for x in table["subject_id"].to_pylist()]
    place = {subject: i for i, subject in enumerate(subjects)}
    if len(place) < len(subjects):
        raise ValueError(f"{where} has a subject_id twice: expected one row for each")
    at = [place.get(subject) for subject in _subjects(predictions, where)]
    if all(x is None for x in at):
        raise ValueError(f"{where} has none of the patients: expected the subject_id of some")
    import pyarrow as pa

    chosen = pa.array(at, pa.int64())
    return {name: table[name].take(chosen) for name in table.column_names if name != "subject_id"}


def _subjects(predictions: Predictions, where: str) -> list[str]:
    if "subject_id" not in predictions.table.column_names:
        raise ValueError(f"{where}: the predictions have no subject_id: expected some")
    return [str(x) for x in predictions.table["subject_id"].to_pylist()]


def _by_column(name: str, column: pa.ChunkedArray) -> Grouping:
    import pyarrow as pa

    kinds = pa.types
    number = kinds.is_floating(column.type) or kinds.is_integer(column.type)
    values = column.to_pylist()
    known = sorted({x for x in values if x is not None and x == x}, key=lambda x: (str(type(x)), x))
    if number and len(known) > MOST_VALUES:
        return _by_quartiles(name, values)
    if len(known) > MOST_GROUPS:
        raise ValueError(f"by={name!r} has {len(known):,} values: expected at most {MOST_GROUPS}")
    names = [str(x) for x in known]
    place = {x: i for i, x in enumerate(known)}
    return _grouping(name, names, [place.get(x, -1) for x in values])


def _by_quartiles(name: str, values: list[Any]) -> Grouping:
    x = np.array([np.nan if v is None else v for v in values], dtype=float)
    known = x[np.isfinite(x)]
    edges = np.unique(np.quantile(known, (0, 0.25, 0.5, 0.75, 1)))
    inner = edges[1:-1]
    at = np.where(np.isfinite(x), np.searchsorted(inner, x, side="left"), -1)
    names = []
    for i in range(len(inner) + 1):
        own = x[at == i]
        names.append(f"{own.min():g} to {own.max():g}" if len(own) else "")
    return _grouping(f"{name}, in quarters", names, at.tolist())


def _grouping(title: str, names: list[str], at: list[int]) -> Grouping:
    """at: numbers of names, -1 for an unknown one; groups without rows are left out."""
    numbers = np.array(at)
    kept = [i for i in range(len(names)) if (numbers == i).any()]
    of_row = np.full(len(numbers), len(kept))
    for new, old in enumerate(kept):
        of_row[numbers == old] = new
    unknown = (UNKNOWN,) if (numbers < 0).any() else ()
    return Grouping(title, (*(names[i] for i in kept), *unknown), of_row)


def _by_codes(
    globs: list[str], settings: EvaluateSettings, predictions: Predictions
) -> dict[str, Grouping]:
    """Rows of patients with such an event at or before the time of prediction, and the others."""
    from clinattn.workloads import open_source
    from clinattn.workloads.code_names import code_descriptions, with_meaning

    assert settings.data is not None
    folder = settings.data.partition(":")[2]
    subjects = _subjects(predictions, f"data={settings.data!r}")
    times = _times(predictions)
    source = open_source(settings.data)
    meanings = code_descriptions(folder)
    places = {str(subject): i for i, subject in enumerate(source.subjects)}
    found = {}
    for glob in globs:
        matching = np.array([fnmatchcase(code, glob) for code in source.vocabulary.tokens])
        matching &= source.vocabulary.ordinary()
        if not matching.any():
            raise ValueError(
                f"by={glob!r}: no code of {settings.data!r} and no column matches: expected one"
            )
        earliest = _earliest(source, matching)
        numbers = [
            -1 if subject not in places or time is None else int(earliest[places[subject]] > time)
            for subject, time in zip(subjects, times, strict=True)
        ]
        said = with_meaning(glob, source.vocabulary.tokens, meanings)
        found[glob] = _grouping(f"code {said}", ["had it", "had not"], numbers)
    return found


def _earliest(source: Source, matching: np.ndarray) -> np.ndarray:
    """(S,) int64: the time of each sequence's first event with such an id (V,) bool, or NEVER."""
    assert source.times is not None
    found = np.full(len(source), NEVER)
    for part in source.parts():
        at = np.where(matching[source.ids[part.at]], source.times[part.at], NEVER)
        full = part.indices[source.ends[part.indices] > source.begins[part.indices]]
        if len(full):
            found[full] = np.minimum.reduceat(at, source.begins[full] - part.at.start)
    return found


def _times(predictions: Predictions) -> list[int | None]:
    """Times of prediction in microseconds since 1970-01-01. Raises ValueError without them."""
    import pyarrow as pa

    table = predictions.table
    if "prediction_time" not in table.column_names:
        raise ValueError("by a code: the predictions have no prediction_time: expected times")
    column = table["prediction_time"]
    if not (pa.types.is_timestamp(column.type) or pa.types.is_null(column.type)):
        raise ValueError(f"prediction_time has type {column.type}: expected timestamps")
    return column.cast(pa.timestamp("us"), safe=False).cast(pa.int64()).to_pylist()
