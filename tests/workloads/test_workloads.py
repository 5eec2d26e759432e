"""Length profiles and the MEDS reader, on folders made here and on the real demo where it lies."""

from __future__ import annotations

import datetime as dt
import os
from pathlib import Path

import numpy as np
import pytest
from places import ROOT

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from clinattn.workloads import (  # noqa: E402
    PROFILES,
    SPECIAL_TOKENS,
    MedsError,
    Vocabulary,
    read_meds,
    sample_lengths,
)
from clinattn.workloads.meds import NO_TIME, unknown_share  # noqa: E402

UNK, CLS = SPECIAL_TOKENS.index("[UNK]"), SPECIAL_TOKENS.index("[CLS]")
DEMO = Path(
    os.environ.get("CLINATTN_MEDS_DIR")
    or ROOT.parent / "shared" / "data" / "mimic-iv-demo-meds"
)
needs_demo = pytest.mark.skipif(
    not DEMO.is_dir(), reason="no MEDS demo: set CLINATTN_MEDS_DIR to a MEDS folder"
)


def at(hour: float) -> dt.datetime:
    return dt.datetime(2150, 1, 1) + dt.timedelta(hours=hour)


def write_shard(root: Path, name: str, rows: list[tuple], **columns) -> Path:
    """rows: (subject_id, time, code, numeric_value); columns replace or (None) remove one."""
    path = root / "data" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    subject, time, code, value = zip(*rows, strict=True) if rows else ((), (), (), ())
    table = {
        "subject_id": pa.array(subject, pa.int64()),
        "time": pa.array(time, pa.timestamp("us")),
        "code": pa.array(code, pa.string()),
        "numeric_value": pa.array(value, pa.float32()),
    } | columns
    pq.write_table(pa.table({k: v for k, v in table.items() if v is not None}), path)
    return root


TWO_PATIENTS = [
    (7, at(5), "HR", 80.0),
    (7, at(1), "ADMIT", None),
    (7, None, "SEX//F", None),
    (7, at(5), "BP", 120.0),
    (3, at(0), "HR", 75.0),
    (3, at(2), "HR", 76.0),
    (3, at(2), "RARE", None),
]


def codes_of(dataset, index: int, **kwargs) -> list[str]:
    return [dataset.vocabulary.tokens[i] for i in dataset.timeline(index, **kwargs).token_ids]


def test_events_become_sorted_tokens_with_times_and_values(tmp_path):
    dataset = read_meds(write_shard(tmp_path, "train/0.parquet", TWO_PATIENTS))
    assert dataset.subject_ids.tolist() == [3, 7]
    assert codes_of(dataset, 0) == ["[CLS]", "HR", "HR", "RARE"]
    assert codes_of(dataset, 1) == ["[CLS]", "SEX//F", "ADMIT", "HR", "BP"]  # ties in file order
    timeline = dataset.timeline(1)
    assert timeline.subject_id == 7
    assert timeline.hours.tolist() == [0, 0, 0, 4, 4]
    assert timeline.values[-2:].tolist() == [80.0, 120.0] and timeline.values[:3].isnan().all()
    assert dataset.times[3] == NO_TIME
    assert dataset.times[4] == int((at(1) - dt.datetime(1970, 1, 1)).total_seconds()) * 10**6
    assert dataset.lengths().tolist() == [4, 5]


def test_vocabulary_is_by_frequency_then_code_and_independent_of_file_order(tmp_path):
    one = write_shard(tmp_path / "one", "train/0.parquet", TWO_PATIENTS)
    two = write_shard(tmp_path / "two", "train/0.parquet", TWO_PATIENTS[4:][::-1])
    write_shard(two, "train/1.parquet", TWO_PATIENTS[:4][::-1])
    expected = (*SPECIAL_TOKENS, "HR", "ADMIT", "BP", "RARE", "SEX//F")
    assert read_meds(one).vocabulary.tokens == expected
    assert read_meds(two).vocabulary.tokens == expected


def test_rare_codes_become_unknown(tmp_path):
    root = write_shard(tmp_path, "0.parquet", TWO_PATIENTS)
    common = read_meds(root, min_count=2)
    assert common.vocabulary.tokens == (*SPECIAL_TOKENS, "HR")
    assert codes_of(common, 0) == ["[CLS]", "HR", "HR", "[UNK]"]
    assert unknown_share(common) == 4 / 7
    assert read_meds(root, max_vocab=7).vocabulary.tokens == (*SPECIAL_TOKENS, "HR", "ADMIT")
    with pytest.raises(ValueError, match="max_size=5"):
        read_meds(root, max_vocab=5)


def test_a_vocabulary_of_the_training_split_serves_the_others(tmp_path):
    write_shard(tmp_path, "train/0.parquet", TWO_PATIENTS[:4])
    write_shard(tmp_path, "held_out/0.parquet", TWO_PATIENTS[4:])
    train = read_meds(tmp_path, split="train")
    held_out = read_meds(tmp_path, split="held_out", vocabulary=train.vocabulary)
    assert train.subject_ids.tolist() == [7] and held_out.subject_ids.tolist() == [3]
    assert codes_of(held_out, 0) == ["[CLS]", "HR", "HR", "[UNK]"]


def test_subject_splits_table_decides_over_folders(tmp_path):
    write_shard(tmp_path, "train/0.parquet", TWO_PATIENTS)
    (tmp_path / "metadata").mkdir()
    splits = pa.table({"subject_id": [3, 7], "split": ["tuning", "train"]})
    pq.write_table(splits, tmp_path / "metadata" / "subject_splits.parquet")
    assert read_meds(tmp_path, split="tuning").subject_ids.tolist() == [3]
    with pytest.raises(MedsError, match=r"no split='test': expected one of \['train', 'tuning'\]"):
        read_meds(tmp_path, split="test")


@pytest.mark.parametrize(
    ("max_tokens", "codes", "hours"),
    [
        (1, ["[CLS]"], [0]),
        (2, ["[CLS]", "SEX//F"], [0, 0]),
        (3, ["[CLS]", "SEX//F", "BP"], [0, 0, 0]),
        (4, ["[CLS]", "SEX//F", "HR", "BP"], [0, 0, 0, 0]),
        (5, ["[CLS]", "SEX//F", "ADMIT", "HR", "BP"], [0, 0, 0, 4, 4]),
        (99, ["[CLS]", "SEX//F", "ADMIT", "HR", "BP"], [0, 0, 0, 4, 4]),
    ],
)
def test_truncation_keeps_static_facts_and_the_latest_events(tmp_path, max_tokens, codes, hours):
    dataset = read_meds(write_shard(tmp_path, "0.parquet", TWO_PATIENTS))
    assert codes_of(dataset, 1, max_tokens=max_tokens) == codes
    timeline = dataset.timeline(1, max_tokens)
    assert timeline.hours.tolist() == hours and len(timeline.values) == len(codes)
    assert dataset.lengths(max_tokens)[1] == len(codes)


@pytest.mark.parametrize(
    "columns",
    [
        {"numeric_value": None},
        {"code": pa.array([r[2] for r in TWO_PATIENTS], pa.large_string())},
        {"code": pa.array([r[2] for r in TWO_PATIENTS]).dictionary_encode()},
        {"time": pa.array([r[1] for r in TWO_PATIENTS], pa.timestamp("ns"))},
        {"time": pa.array([r[1] for r in TWO_PATIENTS], pa.timestamp("us", "UTC"))},
        {"subject_id": pa.array([r[0] for r in TWO_PATIENTS], pa.int32())},
        {"text_value": pa.array(["note"] * len(TWO_PATIENTS))},
    ],
    ids=["no_value", "large_string", "dictionary", "ns", "utc", "int32", "extra_column"],
)
def test_column_variants_read_alike(tmp_path, columns):
    plain = read_meds(write_shard(tmp_path / "plain", "0.parquet", TWO_PATIENTS))
    other = read_meds(write_shard(tmp_path / "other", "0.parquet", TWO_PATIENTS, **columns))
    assert plain.vocabulary == other.vocabulary
    np.testing.assert_array_equal(plain.token_ids, other.token_ids)
    np.testing.assert_array_equal(plain.times, other.times)
    if "numeric_value" in columns:
        assert np.isnan(other.values).all()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"code": None},
            r"no column \['code'\] \(it has \['subject_id', 'time', 'numeric_value'\]",
        ),
        ({"time": pa.array(["noon"] * 7)}, r"'time' has type string: expected timestamp\[us\]"),
        ({"subject_id": pa.array(["a"] * 7)}, "'subject_id' has type string: expected int64"),
        ({"code": pa.array([1] * 7)}, "'code' has type int64: expected string"),
        ({"code": pa.array(["A", None] + ["B"] * 5)}, "'code' has 1 nulls: expected none"),
        ({"subject_id": pa.array([None] + [1] * 6, pa.int64())}, "'subject_id' has 1 nulls"),
    ],
    ids=["missing", "time_type", "subject_type", "code_type", "code_null", "subject_null"],
)
def test_bad_columns_are_named(tmp_path, columns, message):
    root = write_shard(tmp_path, "train/0.parquet", TWO_PATIENTS, **columns)
    with pytest.raises(MedsError, match=f"meds_dir='.*': data/train/0.parquet .*{message}"):
        read_meds(root)


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(MedsError, match="meds_dir='.*absent' does not exist: expected a MEDS"):
        read_meds(tmp_path / "absent")
    with pytest.raises(MedsError, match=r"no data/\*\*/\*.parquet \(it holds \[\]\)"):
        read_meds(tmp_path)
    (tmp_path / "0.parquet").write_bytes(b"")
    with pytest.raises(MedsError, match=r"it holds \['0.parquet'\]"):
        read_meds(tmp_path)
    with pytest.raises(MedsError, match="is a file: expected a MEDS folder"):
        read_meds(tmp_path / "0.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not a parquet file at all" * 9])
def test_an_unreadable_file_is_named(tmp_path, content):
    write_shard(tmp_path, "train/0.parquet", TWO_PATIENTS)
    (tmp_path / "data" / "train" / "1.parquet").write_bytes(content)
    with pytest.raises(MedsError, match="data/train/1.parquet cannot be read"):
        read_meds(tmp_path)


def test_no_events_is_an_error(tmp_path):
    root = write_shard(tmp_path, "train/0.parquet", [])
    with pytest.raises(MedsError, match="has no events in its 1 parquet file"):
        read_meds(root)


def test_only_static_facts(tmp_path):
    root = write_shard(
        tmp_path, "0.parquet", [(1, None, "SEX//F", None)], time=pa.nulls(1, pa.null())
    )
    assert codes_of(read_meds(root), 0) == ["[CLS]", "SEX//F"]
    assert read_meds(root).timeline(0).hours.tolist() == [0, 0]


def test_vocabulary_never_doubles_a_special_token():
    vocabulary = Vocabulary.build(["[CLS]", "A"], np.array([5, 1]))
    assert vocabulary.tokens == (*SPECIAL_TOKENS, "A")
    assert vocabulary.ids(["A", "[CLS]", "B"]).tolist() == [5, CLS, UNK]


@needs_demo
def test_the_demo_reads_whole():
    dataset = read_meds(DEMO)
    assert len(dataset) == len(np.unique(dataset.subject_ids))
    events = np.diff(dataset.offsets)
    assert events.min() > 0 and unknown_share(dataset) == 0
    timeline = dataset.timeline(int(events.argmax()), max_tokens=4096)
    assert len(timeline.token_ids) == min(4096, events.max() + 1)
    assert (timeline.hours.diff() >= 0).all() and timeline.token_ids.max() < len(dataset.vocabulary)


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_are_reproducible_and_capped(profile):
    lengths = sample_lengths(profile, 1000, 2048, seed=3)
    assert len(lengths) == 1000 and lengths.min() >= 1 and lengths.max() <= 2048
    np.testing.assert_array_equal(lengths, sample_lengths(profile, 1000, 2048, seed=3))
    if profile != "fixed":
        assert (lengths != sample_lengths(profile, 1000, 2048, seed=4)).any()


@pytest.mark.parametrize(
    ("profile", "p50", "p90"),  # the published quantiles each fit stands for
    [("note_discharge", 2102, 3457), ("ehr_population", 71, 1380)],
)
def test_profiles_meet_their_quantiles(profile, p50, p90):
    lengths = sample_lengths(profile, 40_000, 10**6)
    assert np.quantile(lengths, [0.5, 0.9]) == pytest.approx([p50, p90], rel=0.12)


def test_note_chunks_fill_their_rows():
    lengths = sample_lengths("note_chunks", 5000, 512)
    assert (lengths == 128).mean() > 0.9 and lengths.max() == 128


def test_bad_profile_arguments_are_named():
    with pytest.raises(ValueError, match="profile='icu' is unknown: expected one of"):
        sample_lengths("icu", 1, 1)
    with pytest.raises(ValueError, match="max_tokens=0"):
        sample_lengths("fixed", 1, 0)
