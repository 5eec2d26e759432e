"""Rows of texts and labels from files: csv, tsv, jsonl and parquet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clinattn.files.disk import parse_json

from .encodings import decoded

ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
LONGEST = 2**31 - 1  # characters of a field; csv's own limit is less than some notes have
Records = Iterator[tuple[int, dict[str, Any]]]  # each with its line, or its row in a parquet file


class Row(NamedTuple):
    text: str
    label: str | None
    subject: str  # rows of one subject are in one split


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read. id: joins a file of labels to the rows of texts."""

    text: str = "text"
    label: str = "label"
    id: str = "id"
    subject: str = "subject_id"

    @property
    def expected(self) -> str:
        return (
            f"a .csv or .tsv file with a header, or a .jsonl or .parquet file, with columns "
            f"{self.text} and {self.label}"
        )


COLUMNS = Columns()


@dataclass(frozen=True)
class Table:
    """The records of a file, each with its line. unit: what a line is called, "line" or "row"."""

    where: str
    unit: str
    records: list[tuple[int, dict[str, Any]]]
    encoding: str

    def value(self, line: int, record: dict[str, Any], column: str, expected: str) -> str:
        """A cell as a string. Raises ValueError for one that is missing or empty."""
        found = record.get(column)
        if found in (None, ""):
            raise ValueError(
                f"{self.where} {self.unit} {line} has no {column!r} (it has "
                f"{sorted(map(str, record))}): expected {expected}"
            )
        return str(found)


class Rows(NamedTuple):
    """encoding: of the file, as `decoded` names it."""

    rows: list[Row]
    encoding: str


def read_rows(
    path: Path,
    labelled: bool,
    *,
    columns: Columns = COLUMNS,
    labels: Path | None = None,
    encoding: str | None = None,
) -> Rows:
    """The rows with their line in every complaint.

    labelled: a row needs a label. labels: a file of ids and labels, where they are not in the rows
    themselves; a row whose id it lacks has no label. Raises ValueError.
    """
    table = read_table(path, "text_file", columns.expected, encoding)
    of_id = None if labels is None else read_labels(labels, columns, encoding)
    rows = []
    for line, record in table.records:
        text = table.value(line, record, columns.text, columns.expected)
        if of_id is not None:
            key = table.value(line, record, columns.id, f"the column that {labels} has too")
            label = of_id.get(key)
            if label is None and labelled:
                raise ValueError(
                    f"labels={str(labels)!r} has no label for {columns.id} {key!r} of "
                    f"{table.where} {table.unit} {line}: expected one for each row"
                )
        else:
            found = record.get(columns.label)
            if labelled:
                found = table.value(line, record, columns.label, columns.expected)
            label = None if found is None else str(found)
        subject = record.get(columns.subject)
        rows.append(Row(text, label, text if subject in (None, "") else str(subject)))
    return Rows(rows, table.encoding)


def read_labels(path: Path, columns: Columns, encoding: str | None) -> dict[str, str]:
    """Labels by id. Raises ValueError for an id with two labels."""
    expected = f"columns {columns.id} and {columns.label}"
    table = read_table(path, "labels", expected, encoding)
    found: dict[str, str] = {}
    for line, record in table.records:
        key = table.value(line, record, columns.id, expected)
        label = table.value(line, record, columns.label, expected)
        if found.setdefault(key, label) != label:
            raise ValueError(
                f"{table.where} {table.unit} {line} gives {columns.id} {key!r} the label {label!r} "
                f"besides {found[key]!r}: expected one"
            )
    return found


def read_table(path: Path, name: str, expected: str, encoding: str | None) -> Table:
    """All records of a file. name: of the argument, for messages. Raises ValueError."""
    where = f"{name}={str(path)!r}"
    if path.suffix not in ENDINGS:
        raise ValueError(f"{where}: expected {expected}")
    try:
        if path.suffix == ".parquet":
            records, used, unit = list(_parquet(path, where)), "utf-8", "row"
        else:
            text, used = decoded(path.read_bytes(), encoding, where)
            records, unit = list(_lines(path.suffix, text, where)), "line"
    except (OSError, csv.Error) as error:
        raise ValueError(f"{where} cannot be read: {error}") from None
    if not records:
        raise ValueError(f"{where} has no rows: expected {expected}")
    return Table(where, unit, records, used)


def _lines(suffix: str, text: str, where: str) -> Records:
    if suffix == ".jsonl":
        return _jsonl(text, where)
    return _separated(text, "\t" if suffix == ".tsv" else ",")


def _separated(text: str, delimiter: str) -> Records:
    before = csv.field_size_limit(LONGEST)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        for record in reader:
            yield reader.line_num, record
    finally:
        csv.field_size_limit(before)


def _jsonl(text: str, where: str) -> Records:
    for line, row in enumerate(io.StringIO(text), 1):
        if not row.strip():
            continue
        try:
            record = parse_json(row)
        except ValueError as error:
            raise ValueError(f"{where} line {line}: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where} line {line}: expected a JSON object")
        yield line, record


def _parquet(path: Path, where: str) -> Records:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ValueError(f"{where} needs: pip install pyarrow") from None
    try:
        return enumerate(parquet.read_table(path).to_pylist(), 1)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{where} cannot be read: {str(error).splitlines()[0]}") from None
