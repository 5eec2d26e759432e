"""clinattn prepare: stores of every kind of MEDS folder hold what the folder holds."""

from __future__ import annotations

import json
import stat

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
pytest.importorskip("filelock")

import pyarrow.parquet as pq  # noqa: E402
import stores  # noqa: E402
from patients import write_splits  # noqa: E402

from clinattn.workloads import MedsError  # noqa: E402
from clinattn.workloads.code_names import code_descriptions  # noqa: E402
from clinattn.workloads.labels import read_labels  # noqa: E402
from clinattn.workloads.seeds import derived_seed  # noqa: E402
from clinattn.workloads.store import prepare  # noqa: E402
from clinattn.workloads.store.format import about  # noqa: E402
from clinattn.workloads.store.reading import store_source  # noqa: E402
from clinattn.workloads.time_zones import has_time_zone  # noqa: E402


@pytest.mark.parametrize("events", [50, 10**6], ids=lambda x: f"{x} events a piece")
@pytest.mark.parametrize("kind", stores.KINDS)
def test_a_store_is_what_its_folder_is(tmp_path, kind, events):
    root = stores.KINDS[kind](tmp_path / "ward", stores.events())
    folder = stores.made(root, tmp_path / "store", events)
    store = stores.assert_store_of(folder, root)
    assert has_time_zone(folder) == has_time_zone(root) == (kind == "a time zone")
    pieces = about(folder)["events"]
    assert sum(pieces) == len(store.ids)
    assert len(pieces) == 1 if events > 10**5 else len(pieces) > 5
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [".lock", *about(folder)["files"], "store.json"]
    )


def test_events_of_one_time_keep_the_order_of_files_and_rows(tmp_path):
    rows = 64
    table = pa.table(
        {
            "subject_id": pa.array([5] * rows, pa.int64()),
            "time": pa.array([7] * rows, pa.timestamp("us")),
            "code": [f"{i:02d}" for i in range(rows)],
        }
    )
    root = stores.write(tmp_path / "ward", stores.thirds(table), row_group_size=5)
    store = store_source(stores.made(root, tmp_path / "store"))
    assert [store.vocabulary.tokens[i] for i in store.ids[:]] == table["code"].to_pylist()


def test_the_fingerprint_is_that_of_the_patients_however_files_and_pieces_are_cut(tmp_path):
    def fingerprint(name, files, events=50):
        root = stores.write(tmp_path / name, files)
        return about(stores.made(root, tmp_path / f"{name} store", events))["fingerprint"]

    table = stores.events()
    one = fingerprint("one", {"0.parquet": table})
    assert fingerprint("fine", {"0.parquet": table}, events=3) == one
    assert fingerprint("apart", stores.apart(table)) == one
    assert fingerprint("thirds", stores.thirds(table)) == one
    values = table["numeric_value"].to_numpy().copy()
    values[np.flatnonzero(~np.isnan(values))[3]] += 1
    other = stores.with_column(table, "numeric_value", pa.array(values, from_pandas=True))
    assert fingerprint("value", {"0.parquet": other}) != one
    assert fingerprint("event less", {"0.parquet": table[1:]}) != one


def test_the_store_has_a_patients_hash_digest_and_split(tmp_path):
    root = stores.write(tmp_path / "ward", {"0.parquet": stores.events()})
    subjects = np.unique(stores.events()["subject_id"].to_numpy()).tolist()
    write_splits(root, {subject: ("train", "tuning")[subject % 2] for subject in subjects[:-4]})
    folder = stores.made(root, tmp_path / "store")
    store = stores.assert_store_of(folder, root)
    assert store.splits[-4:] == [None] * 4 and {*store.splits} == {"train", "tuning", None}
    assert about(folder)["splits"]["names"] == ["train", "tuning"]
    assert store.draws.tolist() == [derived_seed("held out", str(x)) for x in subjects]
    table = pa.ipc.open_file(folder / "patients.arrow").read_all()
    assert table["subject_id"].to_pylist() == subjects and len(set(table["digest"].to_pylist())) > 9
    assert table["split"].to_pylist() == store.splits


def test_meanings_of_codes_are_those_of_the_folder(tmp_path):
    root = stores.write(tmp_path / "ward", {"0.parquet": stores.events()})
    (root / "metadata").mkdir()
    codes = {"code": ["SEX//F", "CODE//000", "ABSENT"], "description": ["female", None, "none"]}
    codes["parent_codes"] = pa.array([None, ["SEX//F"], None], pa.list_(pa.string()))
    pq.write_table(pa.table(codes), root / "metadata" / "codes.parquet")
    folder = stores.made(root, tmp_path / "store")
    assert code_descriptions(root)["CODE//000"] == "under female"
    assert code_descriptions(folder) == {"SEX//F": "female", "CODE//000": "under female"}
    table = pa.ipc.open_file(folder / "codes.arrow").read_all()
    assert table["code"].to_pylist()[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    counts = dict(zip(table["code"].to_pylist(), table["count"].to_pylist(), strict=True))
    found = stores.events()["code"].value_counts().to_pylist()
    assert {code: n for code, n in counts.items() if n} == {x["values"]: x["counts"] for x in found}


def test_labels_have_a_time_zone_where_the_files_of_a_store_had(tmp_path):
    for kind, good, bad in (("a time zone", "UTC", None), ("one file", None, "UTC")):
        root = stores.KINDS[kind](tmp_path / kind, stores.events())
        folder = stores.made(root, tmp_path / f"{kind} store")
        rows = {"subject_id": [1], "boolean_value": [True]}
        for zone in (good, bad):
            rows["prediction_time"] = pa.array([1], pa.timestamp("us", zone))
            pq.write_table(pa.table(rows), tmp_path / "labels.parquet")
            if zone == good:
                assert len(read_labels(tmp_path / "labels.parquet", folder)) == 1
            else:
                with pytest.raises(MedsError, match="time zone, and times of events have"):
                    read_labels(tmp_path / "labels.parquet", folder)


def test_files_that_differ_in_time_zone_are_told_of_where_it_matters(tmp_path):
    table = stores.events()
    zoned = stores.recast(table, "time", pa.timestamp("us", "UTC"))
    root = stores.write(tmp_path / "ward", {"0.parquet": table[:50], "1.parquet": zoned[50:]})
    folder = stores.made(root, tmp_path / "store")
    stores.assert_store_of(folder, root)
    with pytest.raises(MedsError, match="was made of files with times with a time zone and of"):
        has_time_zone(folder)


def test_a_store_is_for_its_owner_alone(tmp_path):
    root = stores.write(tmp_path / "ward", {"0.parquet": stores.events()})
    (tmp_path / "store").mkdir(mode=0o755)
    modes: set[tuple[bool, int]] = set()

    def look(*_):
        for path in (tmp_path / "store").rglob("*"):
            if path.name != ".lock":
                modes.add((path.is_dir(), stat.S_IMODE(path.stat().st_mode)))

    folder = stores.made(root, tmp_path / "store", progress=look)
    look()
    assert modes == {(True, 0o700), (False, 0o600)}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_other_programs_read_the_files(tmp_path):
    root = stores.write(tmp_path / "ward", {"0.parquet": stores.events()})
    folder = stores.made(root, tmp_path / "store", 10**6)
    table = pa.ipc.open_file(folder / "events-00000.arrow").read_all()
    table.validate(full=True)
    pq_table = stores.events()
    assert table["time"].to_pylist() == pq_table["time"].to_pylist()
    assert table["value"].to_pylist() == pq_table["numeric_value"].to_pylist()
    codes = pa.ipc.open_file(folder / "codes.arrow").read_all()["code"].to_pylist()
    assert [codes[i] for i in table["id"].to_pylist()] == pq_table["code"].to_pylist()


def test_polars_reads_the_files(tmp_path):
    pl = pytest.importorskip("polars")
    root = stores.write(tmp_path / "ward", {"0.parquet": stores.events()})
    subjects = np.unique(stores.events()["subject_id"].to_numpy()).tolist()
    write_splits(root, {subject: "train" for subject in subjects[3:]})
    folder = stores.made(root, tmp_path / "store", 10**6)
    found = pl.read_ipc(folder / "events-00000.arrow")
    assert found["time"].to_list() == stores.events()["time"].to_pylist()
    assert found["value"].to_list() == stores.events()["numeric_value"].to_pylist()
    patients = pl.read_ipc(folder / "patients.arrow")
    assert patients["subject_id"].to_list() == subjects
    assert patients["split"].to_list() == [None] * 3 + ["train"] * (len(subjects) - 3)
    bare = stores.write(tmp_path / "bare", {"0.parquet": stores.events()})
    patients = pl.read_ipc(stores.made(bare, tmp_path / "bare store") / "patients.arrow")
    assert patients["split"].to_list() == [None] * len(subjects)
    assert pl.read_ipc(folder / "codes.arrow").height == len(store_source(folder).vocabulary)


def test_a_folder_without_events_is_refused(tmp_path):
    root = stores.write(tmp_path / "ward", {"0.parquet": stores.events()[:0]})
    with pytest.raises(MedsError, match=r"has no events in its 1 parquet file\(s\): expected at"):
        prepare.prepare(root, tmp_path / "store", 1)
    assert not (tmp_path / "store" / "store.json").exists()


@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        ("code", pa.nulls, "data/0.parquet column 'code' has type null: expected string"),
        ("subject_id", lambda n: pa.array([None] + [1] * (n - 1)), "'subject_id' has 1 nulls"),
        ("code", lambda n: pa.array(["A"] * (n - 2) + [None] * 2), "'code' has 2 nulls: expected"),
    ],
)
def test_bad_columns_are_named(tmp_path, name, column, message):
    table = stores.events()
    table = stores.with_column(table, name, column(len(table)))
    root = stores.write(tmp_path / "ward", {"0.parquet": table}, row_group_size=60)
    with pytest.raises(MedsError, match=message):
        stores.made(root, tmp_path / "store")


def test_bad_splits_are_named_before_timelines_are_written(tmp_path):
    root = stores.write(tmp_path / "ward", {"0.parquet": stores.events()})
    write_splits(root, {}, subject_id=[1, 1], split=["train", "tuning"])
    with pytest.raises(MedsError, match=r"subject 1 in the splits \['train', 'tuning'\]"):
        stores.made(root, tmp_path / "store")
    assert not list((tmp_path / "store").glob("events-*"))


def test_json_of_a_store_says_where_it_is_from(tmp_path):
    root = stores.write(tmp_path / "ward", {"0.parquet": stores.events()})
    said = json.loads((stores.made(root, tmp_path / "store") / "store.json").read_text())
    assert said["made_from"] == f"meds:{root}" and said["title"] == "MEDS folder ward"
    assert said["format"] == 1 and said["splits"] is None and said["patients"] == stores.PATIENTS
