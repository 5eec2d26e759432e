"""Task labels of MEDS: for a subject at a prediction time, what a model is to tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clinattn.files.shapes import LARGEST

from .meds_files import MedsError, place, read_columns
from .time_zones import has_time_zone

if TYPE_CHECKING:  # pyarrow takes a fifth of a second to import
    import pyarrow as pa

VALUES = {  # LabelSchema's columns, and the types that each is taken from
    "boolean_value": ("bool", ("boolean",)),
    "integer_value": ("int64", ("integer",)),
    "float_value": ("double", ("floating", "integer")),
    "categorical_value": ("string", ("string", "large_string")),
}
NUMBERS = ("integer_value", "float_value")
FORM = (
    "parquet files with subject_id, prediction_time and one of "
    "boolean_value, integer_value, float_value, categorical_value"
)


@dataclass(frozen=True)
class TaskLabels:
    """Rows of labels, in the order of their files.

    where: the input, for messages. column: that of the values, None where no row has one.
    times: microseconds since 1970-01-01. values: None where a row has none.
    """

    where: str
    column: str | None
    subjects: np.ndarray  # (R,) int64
    times: np.ndarray  # (R,) int64
    values: list[Any]  # (R,)

    def __len__(self) -> int:
        return len(self.subjects)

    @property
    def numeric(self) -> bool:
        """True where a number is predicted, and no class."""
        return self.column in NUMBERS

    def classes(self, rows: np.ndarray) -> tuple[str, ...]:
        """Returns the classes of the rows in order; false and true for boolean_value."""
        if self.column == "boolean_value":
            return ("false", "true")
        return tuple(sorted({self.values[row] for row in rows}))

    def value(self, row: int, classes: tuple[str, ...]) -> float:
        """Returns a row's number, or the number of its class."""
        value = self.values[row]
        if self.column == "categorical_value":
            return classes.index(value)
        return value if self.numeric else int(value)


def read_labels(labels: str | Path, meds_dir: str | Path, required: bool = True) -> TaskLabels:
    """Reads the labels of a task from a parquet file, or from all in a folder and below.

    The schema is LabelSchema of the package meds 0.4; other columns are not read. A row that is
    there twice is taken once. prediction_time may have any unit and is taken to the microsecond; it
    has a time zone where the times of events in meds_dir have one, and none where they have none.
    meds_dir: a MEDS folder, or a cohort of meds-torch-data.
    required: every row has a value; else rows may be without one, as for patients of today.
    Raises MedsError for no file or no row, nulls, values in two columns, NaN, infinity, other
    types, or two values for one subject and time.
    """
    import pyarrow as pa

    root = Path(labels)
    zoned = has_time_zone(Path(meds_dir))
    tables = [_read(root, path, zoned) for path in _files(root)]
    where = f"labels={str(root)!r}"
    table = pa.concat_tables(tables, promote_options="default")
    if not len(table):
        raise MedsError(f"{where} has no rows: expected {FORM}")
    given = [name for name in VALUES if len(table) > table[name].null_count]
    if len(given) > 1 or (required and not given):
        found = f"values in {given}" if given else "no values"
        raise MedsError(f"{where} has {found}: expected them in one of {list(VALUES)}")
    column = given[0] if given else None
    values = [None] * len(table) if column is None else table[column].to_pylist()
    if required and (nulls := sum(value is None for value in values)):
        raise MedsError(f"{where} has {nulls} rows without {column}: expected a value in each")
    if column == "float_value":
        bad = sum(value is not None and not abs(value) < LARGEST for value in values)
        if bad:
            raise MedsError(
                f"{where} has {bad} rows of NaN, infinity or above {LARGEST:g}: expected numbers"
            )
    subjects, times = (table[name].to_pylist() for name in ("subject_id", "prediction_time"))
    once: dict[tuple[int, int], Any] = {}
    for key, value in zip(zip(subjects, times, strict=True), values, strict=True):
        if once.setdefault(key, value) != value:
            moment = np.datetime64(key[1], "us")
            raise MedsError(
                f"{where} has {once[key]!r} and {value!r} for subject {key[0]} at {moment}: "
                "expected one value"
            )
    keys = np.array(list(once), dtype=np.int64).reshape(-1, 2)
    return TaskLabels(where, column, keys[:, 0], keys[:, 1], list(once.values()))


def _files(root: Path) -> list[Path]:
    where = f"labels={str(root)!r}"
    if not root.exists():
        raise MedsError(f"{where} does not exist: expected {FORM}")
    if root.is_file():
        return [root]
    found = sorted(path for path in root.rglob("*.parquet") if path.is_file())
    if not found:
        raise MedsError(f"{where} has no **/*.parquet: expected {FORM}")
    return found


def _read(root: Path, path: Path, zoned: bool) -> pa.Table:
    """The columns of a file in the types of LabelSchema, times as int64; absent ones are null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = read_columns(root, path, ["subject_id", "prediction_time"], list(VALUES), "labels")
    where = place(root, path, "labels")

    def column(name: str, kind: str, taken: tuple[str, ...]) -> pa.ChunkedArray:
        if name not in table.column_names:
            return pa.chunked_array([pa.nulls(len(table))])
        found = table[name]
        if pa.types.is_dictionary(found.type):
            found = found.cast(found.type.value_type)
        fits = any(getattr(pa.types, f"is_{one}")(found.type) for one in taken)
        optional = name in VALUES
        if not fits and not (optional and pa.types.is_null(found.type)):
            raise MedsError(f"{where} column {name!r} has type {found.type}: expected {kind}")
        if not optional and found.null_count:
            raise MedsError(f"{where} column {name!r} has {found.null_count} nulls: expected none")
        return found

    subject = column("subject_id", "int64", ("integer",))
    time = column("prediction_time", "timestamp[us]", ("timestamp", "date"))
    if (getattr(time.type, "tz", None) is not None) != zoned:
        has, have = ("no", "one") if zoned else ("a", "none")
        raise MedsError(
            f"{where} column 'prediction_time' has {has} time zone, and times of events have "
            f"{have}: expected both or neither"
        )
    others = {name: column(name, *known) for name, known in VALUES.items()}
    try:
        naive = pc.cast(time, options=pc.CastOptions(pa.timestamp("us"), allow_time_truncate=True))
        columns = {"subject_id": subject.cast("int64"), "prediction_time": naive.cast("int64")}
        columns |= {name: found.cast(VALUES[name][0]) for name, found in others.items()}
    except pa.ArrowInvalid as error:
        raise MedsError(f"{where} cannot be read ({error}): expected {FORM}") from None
    return pa.table(columns)
