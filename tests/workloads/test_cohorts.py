"""Cohorts of meds-torch-data in files made by hand: what is read, and what is refused in a line."""

from __future__ import annotations

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
save_file = pytest.importorskip("safetensors.numpy").save_file

from clinattn.workloads import MedsError, open_source  # noqa: E402
from clinattn.workloads.source import NO_TIME  # noqa: E402

TENSORS = {
    "dim1/bounds": np.array([2, 3]),
    "dim1/time_delta_days": np.array([np.nan, 1, np.nan], dtype=np.float32),
    "dim2/bounds": np.array([1, 3, 4]),
    "dim2/code": np.array([2, 3, 2, 7]),
    "dim2/numeric_value": np.array([0.5, np.nan, -1, np.nan], dtype=np.float32),
}
SCHEMA = {
    "subject_id": [4, 6, 5],  # the second has static facts alone, and is not in data
    "static_code": [[1, None], [1], None],
    "static_numeric_value": [[None, None], [2.0], None],
    "time": pa.array([[10, 20], None, [5]], pa.list_(pa.timestamp("us"))),
}
CODES = {"code": ["SEX", "HR", "ADMIT", "HR", "RARE"], "code/vocab_index": [1, 2, 3, 7, None]}


@pytest.fixture
def cohort(tmp_path):
    def write(tensors=(), schema=(), codes=(), split="train"):
        for path in ("metadata", f"data/{split}", f"tokenization/schemas/{split}"):
            (tmp_path / path).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(CODES | dict(codes)), tmp_path / "metadata" / "codes.parquet")
        shard = tmp_path / "tokenization" / "schemas" / split / "0.parquet"
        pq.write_table(pa.table(SCHEMA | dict(schema)), shard)
        content = {k: v for k, v in (TENSORS | dict(tensors)).items() if v is not None}
        save_file(content, tmp_path / "data" / split / "0.nrt")
        return tmp_path

    return write


def test_static_codes_come_first_and_nulls_are_none(cohort):
    source = open_source(f"meds-torch:{cohort()}")
    assert source.subjects == [4, 5, 6] and source.splits == ["train"] * 3
    assert [source.vocabulary.tokens[i] for i in source.ids] == [
        *("SEX", "HR", "ADMIT", "HR"),
        "HR #7",  # a modifier makes another index of a code
        "SEX",
    ]
    assert source.times.tolist() == [NO_TIME, 10, 20, 20, 5, NO_TIME]
    expected = np.array([np.nan, 0.5, np.nan, -1, np.nan, 2], dtype=np.float32)
    np.testing.assert_array_equal(source.values, expected)
    assert source.bounds(0) == (0, 1, 4) and source.bounds(2) == (5, 6, 6)


def test_files_beside_no_split_have_none(cohort):
    assert open_source(f"meds-torch:{cohort(split='.')}").splits is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tensors": {"dim2/code": None}}, "has no dim2/code"),
        ({"tensors": {"dim1/bounds": np.array([1, 3])}}, "has other events than 0.parquet"),
        ({"tensors": {"dim2/bounds": np.array([1, 3, 5])}}, "has other events than 0.parquet"),
        ({"tensors": {"dim2/bounds": np.array([3, 1, 4])}}, "has falling dim2/bounds"),
        ({"tensors": {"dim2/code": np.array([2, 3, 2, 9])}}, "has code 9: expected a code/vocab"),
        ({"codes": {"code/vocab_index": [1, 2, 2, 7, 9]}}, "expected different numbers from 1"),
        ({"codes": {"code/vocab_index": [0, 2, 3, 7, 9]}}, "expected different numbers from 1"),
        ({"schema": {"subject_id": ["a", "b", "c"]}}, "'subject_id' has type string: expected int"),
        ({"schema": {"time": [1, 2, 3]}}, "column 'time' has type int64: expected lists of times"),
        ({"schema": {"static_code": [1, 2, 3]}}, "'static_code' has type int64: expected lists"),
    ],
    ids=[
        "no code",
        "lengths",
        "sum",
        "falling",
        "unknown",
        "twice",
        "padding",
        "text ids",
        "times",
        "static",
    ],
)
def test_files_that_contradict_are_refused(cohort, given, message):
    folder = cohort(**given)
    with pytest.raises(MedsError, match=message) as error:
        open_source(f"meds-torch:{folder}")
    assert str(error.value).startswith(f"cohort={str(folder)!r}")


def test_what_is_no_cohort_is_refused(cohort, tmp_path):
    with pytest.raises(MedsError, match="has no tokenization/schemas: expected a cohort of MTD"):
        open_source(f"meds-torch:{tmp_path}")
    with pytest.raises(MedsError, match="is no folder: expected a cohort of MTD_preprocess"):
        open_source(f"meds-torch:{tmp_path / 'absent'}")
    folder = cohort()
    (folder / "data" / "train" / "0.nrt").write_bytes(b"no tensors")
    with pytest.raises(MedsError, match="0.nrt cannot be read"):
        open_source(f"meds-torch:{folder}")
    (folder / "data" / "train" / "0.nrt").unlink()
    with pytest.raises(MedsError, match="0.nrt cannot be read"):
        open_source(f"meds-torch:{folder}")


def test_a_subject_in_two_splits_is_refused(cohort):
    cohort()
    folder = cohort(split="held_out")
    with pytest.raises(MedsError, match="subject 4 in the splits"):
        open_source(f"meds-torch:{folder}")
