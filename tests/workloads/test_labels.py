"""Task labels of MEDS: which files, types and rows are taken, and what is refused in a line."""

from __future__ import annotations

import datetime

import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from patients import DAY, write_events, write_labels  # noqa: E402

from clinattn.workloads import MedsError  # noqa: E402
from clinattn.workloads.labels import read_labels  # noqa: E402

ROWS = [(1, 5 * DAY, True), (2, 3 * DAY, False)]


@pytest.fixture
def ward(tmp_path):
    return write_events(tmp_path / "ward", [(p, i * DAY, "A") for p in (1, 2) for i in range(9)])


def rows_of(labels):
    times = (labels.times // DAY).tolist()
    return list(zip(labels.subjects.tolist(), times, labels.values, strict=True))


def test_a_file_and_a_folder_of_files_are_read(ward, tmp_path):
    write_labels(tmp_path / "task" / "train" / "0.parquet", ROWS[:1])
    write_labels(tmp_path / "task" / "held_out.parquet", ROWS[1:])
    (tmp_path / "task" / "log.txt").write_text("made by hand")
    labels = read_labels(tmp_path / "task", ward)
    assert rows_of(labels) == [(2, 3, False), (1, 5, True)] and not labels.numeric
    assert labels.column == "boolean_value" and labels.classes([0]) == ("false", "true")
    one = read_labels(tmp_path / "task" / "held_out.parquet", ward)
    assert rows_of(one) == [(2, 3, False)]


def test_the_packages_own_schema_is_read(ward, tmp_path):
    schema = pytest.importorskip("meds").LabelSchema
    times = [datetime.datetime(1970, 1, 6), datetime.datetime(1970, 1, 4)]
    given = {"subject_id": [1, 2], "prediction_time": times, "categorical_value": ["b", "a"]}
    pq.write_table(schema.align(pa.Table.from_pydict(given)), tmp_path / "l.parquet")
    labels = read_labels(tmp_path / "l.parquet", ward)
    assert rows_of(labels) == [(1, 5, "b"), (2, 3, "a")] and labels.classes([0, 1]) == ("a", "b")
    assert [labels.value(row, ("a", "b")) for row in (0, 1)] == [1, 0]


@pytest.mark.parametrize(
    ("column", "values", "numeric"),
    [
        ("integer_value", pa.array([3, 4], pa.uint8()), True),
        ("float_value", pa.array([3, 4], pa.float32()), True),
        ("float_value", pa.array([3, 4], pa.int64()), True),
        ("categorical_value", pa.array(["3", "4"]).dictionary_encode(), False),
        ("categorical_value", pa.array(["3", "4"], pa.large_string()), False),
    ],
    ids=["uint8", "float32", "whole floats", "dictionary", "large_string"],
)
def test_types_that_fit_are_taken(ward, tmp_path, column, values, numeric):
    others = {"boolean_value": pa.nulls(2), "note": ["x", "y"]}
    write_labels(tmp_path / "l.parquet", ROWS, column, **{column: values} | others)
    labels = read_labels(tmp_path / "l.parquet", ward)
    assert labels.column == column and labels.numeric == numeric
    assert [str(value)[:1] for value in labels.values] == ["3", "4"]


@pytest.mark.parametrize(
    "kind", [pa.timestamp("s"), pa.timestamp("ms"), pa.timestamp("ns"), pa.date32()], ids=str
)
def test_times_of_any_unit_are_taken(ward, tmp_path, kind):
    days = [datetime.datetime(1970, 1, 6), datetime.datetime(1970, 1, 4)]
    write_labels(tmp_path / "l.parquet", ROWS, prediction_time=pa.array(days).cast(kind))
    assert rows_of(read_labels(tmp_path / "l.parquet", ward)) == [(1, 5, True), (2, 3, False)]


def zoned(ward):
    table = pq.read_table(ward / "data" / "0.parquet")
    times = table["time"].cast(pa.timestamp("us", tz="UTC"))
    pq.write_table(table.set_column(1, "time", times), ward / "data" / "0.parquet")


def test_time_zones_are_on_both_sides_or_on_none(ward, tmp_path):
    path = write_labels(tmp_path / "l.parquet", ROWS)
    times = pa.array([5 * DAY, 3 * DAY], pa.timestamp("us", tz="America/New_York"))
    other = write_labels(tmp_path / "z.parquet", ROWS, prediction_time=times)
    with pytest.raises(MedsError, match="has a time zone, and times of events have none"):
        read_labels(other, ward)
    zoned(ward)
    with pytest.raises(MedsError, match="has no time zone, and times of events have one"):
        read_labels(path, ward)
    assert rows_of(read_labels(other, ward)) == [(1, 5, True), (2, 3, False)]
    write_events(tmp_path / "more", [(3, 0, "A")])
    (tmp_path / "more" / "data" / "0.parquet").rename(ward / "data" / "1.parquet")
    with pytest.raises(MedsError, match="times with a time zone, and 1.parquet without"):
        read_labels(other, ward)


def test_a_row_twice_is_one_row(ward, tmp_path):
    write_labels(tmp_path / "l.parquet", [*ROWS, ROWS[0], (1, 6 * DAY, False)])
    assert rows_of(read_labels(tmp_path / "l.parquet", ward)) == [
        (1, 5, True),
        (2, 3, False),
        (1, 6, False),
    ]


def test_rows_without_a_value_are_for_predictions_alone(ward, tmp_path):
    path = write_labels(tmp_path / "l.parquet", [ROWS[0], (2, DAY, None)])
    with pytest.raises(MedsError, match="has 1 rows without boolean_value: expected a value"):
        read_labels(path, ward)
    assert read_labels(path, ward, required=False).values == [True, None]
    write_labels(path, [(2, DAY, None)])
    with pytest.raises(MedsError, match="has no values: expected them in one of"):
        read_labels(path, ward)
    none = read_labels(path, ward, required=False)
    assert none.column is None and none.values == [None]


NAN = float("nan")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"integer_value": [1, 2]}, r"values in \['boolean_value', 'integer_value'\]: expected"),
        ({"boolean_value": ["yes", "no"]}, "'boolean_value' has type string: expected bool"),
        ({"boolean_value": [1, 0]}, "column 'boolean_value' has type int64: expected bool"),
        ({"boolean_value": pa.nulls(2), "integer_value": [1.5, 2.0]}, "double: expected int64"),
        ({"boolean_value": pa.nulls(2), "float_value": [1.5, NAN]}, "has 1 rows of NaN, infinity"),
        ({"boolean_value": pa.nulls(2), "categorical_value": [1, 2]}, "int64: expected string"),
        ({"subject_id": ["1", "2"]}, "column 'subject_id' has type string: expected int64"),
        ({"subject_id": pa.array([1, None])}, "column 'subject_id' has 1 nulls: expected none"),
        ({"prediction_time": [1, 2]}, r"has type int64: expected timestamp\[us\]"),
        ({"prediction_time": pa.array([DAY, None], pa.timestamp("us"))}, "has 1 nulls: expected"),
        ({"prediction_time": pa.array([2**60, 0], pa.timestamp("ms"))}, "out of bounds timestamp"),
        ({"subject_id": [1, 1], "prediction_time": pa.array([0, 0], pa.timestamp("us"))},
         "has True and False for subject 1 at 1970-01-01T00:00:00.000000: expected one value"),
    ],
    ids=[
        "two columns", "text", "numbers", "halves", "nan", "codes", "text ids", "null id",
        "numbers for times", "null time", "far time", "contradiction",
    ],
)  # fmt: skip
def test_labels_that_cannot_be_meant_are_refused(ward, tmp_path, columns, message):
    path = write_labels(tmp_path / "l.parquet", ROWS, **columns)
    with pytest.raises(MedsError, match=message) as error:
        read_labels(path, ward)
    assert str(error.value).startswith(f"labels={str(path)!r}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist: expected parquet files with subject_id"),
        (lambda path: path.mkdir(), r"has no \*\*/\*.parquet: expected parquet files"),
        (lambda path: path.write_text("no"), r"labels=.* cannot be read .*: expected a parquet"),
        (lambda path: pq.write_table(pa.table({"subject_id": [1]}), path),
         r"has no column \['prediction_time'\] \(it has \['subject_id'\]\)"),
        (lambda path: pq.write_table(pa.table({
            "subject_id": pa.array([], "int64"),
            "prediction_time": pa.array([], pa.timestamp("us")),
            "boolean_value": pa.array([], "bool"),
        }), path), "has no rows: expected parquet files"),
    ],
    ids=["absent", "empty folder", "no parquet", "no time", "no rows"],
)  # fmt: skip
def test_what_holds_no_labels_is_refused(ward, tmp_path, make, message):
    make(tmp_path / "l")
    with pytest.raises(MedsError, match=message):
        read_labels(tmp_path / "l", ward)
