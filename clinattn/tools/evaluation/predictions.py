"""Predictions read from a parquet file: a yes or no, one of several classes, or a number each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clinattn.files.disk import file_sha256, parse_json

if TYPE_CHECKING:
    import pyarrow as pa

YES, SAID_YES, PROBABILITY = (
    "boolean_value",
    "predicted_boolean_value",
    "predicted_boolean_probability",
)
LABEL, SAID_LABEL, OF_CLASS = "label", "predicted_label", "probability_"
VALUE, SAID_VALUE = "value", "predicted_value"
EXPECTED = (
    f"expected subject_id with {YES} and {PROBABILITY} or {SAID_YES}, {LABEL} and "
    f"{OF_CLASS}<class>, or {VALUE} and {SAID_VALUE}"
)
FACTS = b"clinattn"  # key of the metadata that `clinattn predict` writes
NOT_ONE = 0.01  # by which probabilities of the classes of a row may miss 1


@dataclass(frozen=True)
class Predictions:
    """Labelled rows of a file.

    kind: "binary", "classes" or "numbers". table: all columns of the N rows. patient: (N,) numbers
    from 0 of the patients. truth: (N,) bool, class numbers or fp64. scores: (N,) or (N, C) fp64,
    None for decisions alone. decided: (N,) bool or class numbers; None where the file has none.
    unlabelled: rows left out. duplicates: rows of a patient and time that were there before.
    unit: what is drawn for intervals, patients or rows. facts: where the file comes from.
    """

    kind: str
    table: pa.Table
    patient: np.ndarray
    truth: np.ndarray
    scores: np.ndarray | None
    decided: np.ndarray | None
    classes: tuple[str, ...]
    unlabelled: int
    duplicates: int
    unit: str
    facts: dict[str, Any]

    @property
    def calibrated(self) -> bool:
        """The scores are of a yes or no, and between 0 and 1 as probabilities are."""
        x = self.scores if self.kind == "binary" else None
        return x is not None and bool(((x >= 0) & (x <= 1)).all())


def read_predictions(path: str | Path) -> Predictions:
    """Raises ValueError for a file that is none, has no labels, or a prediction that is missing."""
    where = f"predictions={str(path)!r}"
    table = read_table(path, where)
    names = set(table.column_names)
    kind, truth, said = _kind(names, where)
    if not len(table):
        raise ValueError(f"{where} has no rows: expected predictions")
    given = table
    table = table.filter(table[truth].is_valid())
    if not len(table):
        raise ValueError(f"{where}: all {len(given):,} rows have null {truth}: expected labels")
    has_subject = "subject_id" in names
    patient = _numbered(table["subject_id"]) if has_subject else np.arange(len(table))
    if has_subject and table["subject_id"].null_count:
        raise ValueError(f"{where}: subject_id has nulls: expected none")
    read = {"binary": _binary, "classes": _classes, "numbers": _numbers}[kind]
    found = read(table, said, where)
    return Predictions(
        kind=kind,
        table=table,
        patient=patient,
        unlabelled=len(given) - len(table),
        duplicates=_duplicates(table, patient),
        unit="patients" if has_subject else "rows",
        facts=_facts(table, path),
        **found,
    )


def read_table(path: str | Path, where: str) -> pa.Table:
    """A table of parquet, or by its name of csv or tsv. Raises ValueError."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    suffix = Path(path).suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            parse = pa.csv.ParseOptions(delimiter="," if suffix == ".csv" else "\t")
            return pa.csv.read_csv(path, parse_options=parse)
        return pq.read_table(path, partitioning=None)
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror or error}") from None
    except pa.ArrowException as error:
        raise ValueError(f"{where} cannot be read ({error}): expected a parquet file") from None


def _kind(names: set[str], where: str) -> tuple[str, str, list[str]]:
    """Returns the kind of prediction, the column of the truth, and those of the predictions."""
    of_classes = sorted(name for name in names if name.startswith(OF_CLASS))
    yes = [name for name in (PROBABILITY, SAID_YES) if name in names]
    for kind, truth, said in (
        ("binary", YES, yes),
        ("classes", LABEL, of_classes),
        ("numbers", VALUE, [SAID_VALUE] if SAID_VALUE in names else []),
    ):
        if truth in names and said:
            return kind, truth, said
    raise ValueError(f"{where} has the columns {sorted(names)}: {EXPECTED}")


def _floats(table: pa.Table, name: str, where: str) -> np.ndarray:
    """A column as fp64. Raises ValueError for nulls, NaN and what is no number."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = table[name]
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise ValueError(f"{where}: {name} has type {column.type}: expected floating numbers")
    x = pc.fill_null(column.cast(pa.float64()), float("nan")).to_numpy()
    if bad := int((~np.isfinite(x)).sum()):
        raise ValueError(
            f"{where}: {name} is null, NaN or infinite in {bad:,} of {len(x):,} labelled rows: "
            "expected a prediction in each"
        )
    return x


def _booleans(table: pa.Table, name: str, where: str) -> np.ndarray:
    import pyarrow as pa

    column = table[name]
    if not pa.types.is_boolean(column.type) or column.null_count:
        nulls = f", {column.null_count:,} nulls" if column.null_count else ""
        raise ValueError(f"{where}: {name} has type {column.type}{nulls}: expected booleans")
    return column.to_numpy()


def _binary(table: pa.Table, said: list[str], where: str) -> dict[str, Any]:
    # a column of nulls alone is as good as absent, by the MEDS evaluation schema
    said = [name for name in said if table[name].null_count < len(table)]
    if not said:
        raise ValueError(f"{where}: all predictions are null: {EXPECTED}")
    return {
        "truth": _booleans(table, YES, where),
        "scores": _floats(table, PROBABILITY, where) if PROBABILITY in said else None,
        "decided": _booleans(table, SAID_YES, where) if SAID_YES in said else None,
        "classes": ("no", "yes"),
    }


def _classes(table: pa.Table, said: list[str], where: str) -> dict[str, Any]:
    classes = tuple(name.removeprefix(OF_CLASS) for name in said)
    number = {name: i for i, name in enumerate(classes)}
    scores = np.stack([_floats(table, name, where) for name in said], 1)
    sums = scores.sum(1)
    if ((scores < 0) | (scores > 1)).any() or (np.abs(sums - 1) > NOT_ONE).any():
        raise ValueError(
            f"{where}: {OF_CLASS}<class> are from {scores.min():g} to {scores.max():g}, and add up "
            f"to {sums.min():g} to {sums.max():g}: expected probabilities, which add up to 1"
        )

    def numbers(name: str) -> np.ndarray:
        texts = [str(x) for x in table[name].to_pylist()]
        if unknown := sorted(set(texts) - set(classes)):
            raise ValueError(f"{where}: {name}={unknown[0]!r}: expected one of {list(classes)}")
        return np.array([number[x] for x in texts])

    decided = numbers(SAID_LABEL) if SAID_LABEL in table.column_names else scores.argmax(1)
    return {"truth": numbers(LABEL), "scores": scores, "decided": decided, "classes": classes}


def _numbers(table: pa.Table, said: list[str], where: str) -> dict[str, Any]:
    return {
        "truth": _floats(table, VALUE, where),
        "scores": _floats(table, said[0], where),
        "decided": None,
        "classes": (),
    }


def _numbered(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers from 0 of the different values."""
    return column.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)


def _duplicates(table: pa.Table, patient: np.ndarray) -> int:
    keys = [patient]
    for name in ("prediction_time", "row"):
        if name in table.column_names:
            keys.append(_numbered(table[name].cast("string").fill_null("")))
    return len(table) - len(np.unique(np.stack(keys, 1), axis=0))


def _facts(table: pa.Table, path: str | Path) -> dict[str, Any]:
    """Name and checksum of the file, and the facts that `clinattn predict` has put in it."""
    found: dict[str, Any] = {"file": Path(path).name, "sha256": file_sha256(path)}
    said = (table.schema.metadata or {}).get(FACTS)
    if said is not None:
        try:
            known = parse_json(said)
        except ValueError:
            known = None
        found |= known if isinstance(known, dict) else {}
    return found
