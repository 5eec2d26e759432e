"""Splits of a MEDS folder: the owner's list, folders that say splits, and the hash without both."""

from __future__ import annotations

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from patients import write_events, write_splits  # noqa: E402

from clinattn.workloads import MedsError, open_source, read_meds  # noqa: E402
from clinattn.workloads.seeds import is_held_out  # noqa: E402
from clinattn.workloads.splits import (  # noqa: E402
    ALL,
    chosen_split,
    divide,
    splits_of,
    standing,
)

LISTED = {1: "train", 2: "train", 3: "tuning", 4: "held_out", 5: "prospective", 99: "train"}
SHARE = 0.4


def ward(root, of=None, subjects=range(1, 8)):
    """Subjects 6 and 7 are in no list."""
    write_events(root, [(subject, i, f"OF//{subject}") for subject in subjects for i in range(3)])
    return root if of is None else write_splits(root, of)


@pytest.fixture
def source(tmp_path):
    return open_source(f"meds:{ward(tmp_path, LISTED)}")


def test_the_owners_list_is_each_sequences_split(source):
    assert source.splits == ["train", "train", "tuning", "held_out", "prospective", None, None]
    expected = ["train", "train", "tuning", "held_out", "prospective", "", ""]
    assert splits_of(source, SHARE).tolist() == expected
    assert np.flatnonzero(chosen_split(source, "held_out", SHARE)).tolist() == [3]
    assert chosen_split(source, ALL, SHARE).all()
    with pytest.raises(ValueError, match=r"split='dev': meds_dir=.* has \['held_out', .*'all'"):
        chosen_split(source, "dev", SHARE)


def test_training_reads_train_and_is_evaluated_on_tuning(source):
    division = divide(source, SHARE)
    assert division.train.tolist() == [True, True, *[False] * 5]
    assert np.flatnonzero(division.evaluated).tolist() == [2] and division.name == "tuning"
    assert division.line == (
        "splits by the data's own list: 2 of 'train' to train on, 1 of 'tuning' to evaluate; not "
        "read: 1 of 'prospective', 1 of 'held_out', 2 in no split"
    )


def test_without_tuning_a_share_of_train_is_evaluated_and_no_held_out(tmp_path):
    of = {s: "held_out" if s % 3 == 0 else "train" for s in range(1, 60)}
    source = open_source(f"meds:{ward(tmp_path, of, range(1, 60))}")
    division = divide(source, SHARE)
    for i, subject in enumerate(source.subjects):
        hashed = is_held_out(subject, SHARE)
        assert division.train[i] == (subject % 3 != 0 and not hashed)
        assert division.evaluated[i] == (subject % 3 != 0 and hashed)
    assert "by a hash, since none is of 'tuning'" in division.line


def test_without_a_list_the_hash_decides_and_says_so(tmp_path):
    source = open_source(f"meds:{ward(tmp_path)}")
    assert source.splits is None and source.splits_digest == ""
    division = divide(source, SHARE)
    expected = [is_held_out(subject, SHARE) for subject in source.subjects]
    assert division.evaluated.tolist() == expected and division.name == "held_out"
    assert (division.train == ~division.evaluated).all()
    assert (splits_of(source, SHARE) == np.where(expected, "held_out", "train")).all()
    assert division.line.startswith("the data name no splits, so a hash of each subject decides: ")


def folders(root, of):
    for folder, subjects in of.items():
        path = write_events(root / folder, [(s, i, "A") for s in subjects for i in range(2)])
        (root / "data" / folder).mkdir(parents=True)
        (path / "data" / "0.parquet").rename(root / "data" / folder / "0.parquet")
    return root


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        ({"train": [1, 2], "held_out": [3]}, ["train", "train", "held_out"]),
        ({"train": [1, 2, 3]}, None),
        ({"train": [1, 2], "other": [3]}, None),
        ({"tuning": [1, 2], "held_out": [3]}, None),
    ],
    ids=["splits", "one", "other", "no train"],
)
def test_folders_say_splits_where_all_are_of_meds(tmp_path, of, expected):
    assert open_source(f"meds:{folders(tmp_path, of)}").splits == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"subject_id": [1, 1], "split": ["train", "tuning"]}, r"1 in the splits \['train', 'tu"),
        ({"subject_id": ["1", "2"], "split": ["train"] * 2}, "'subject_id' has type string"),
        ({"subject_id": [1, None], "split": ["train"] * 2}, "'subject_id' has 1 nulls"),
        ({"subject_id": [1, 2], "split": ["train", None]}, "'split' has 1 nulls: expected none"),
        ({"subject_id": [1, 2], "split": [0, 1]}, "column 'split' has type int64: expected string"),
        ({"subject_id": [1, 2], "fold": ["a", "b"]}, r"has no column \['split'\]"),
    ],
    ids=["two splits", "text ids", "null subject", "null split", "numbers", "no split"],
)
def test_lists_that_do_not_say_splits_are_refused(tmp_path, columns, message):
    ward(tmp_path)
    (tmp_path / "metadata").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "metadata" / "subject_splits.parquet")
    with pytest.raises(MedsError, match=message):
        open_source(f"meds:{tmp_path}")
    with pytest.raises(MedsError, match=message):
        read_meds(tmp_path, split="train")


def test_a_subject_listed_twice_alike_and_names_in_a_dictionary_are_taken(tmp_path):
    ward(tmp_path)
    split = pa.array(["train", "train", "tuning"]).dictionary_encode()
    write_splits(tmp_path, {}, subject_id=[1, 1, 2], split=split)
    assert open_source(f"meds:{tmp_path}").splits[:3] == ["train", "tuning", None]


def test_a_list_without_train_is_refused(tmp_path):
    source = open_source(f"meds:{ward(tmp_path, {1: 'test', 2: 'dev'})}")
    with pytest.raises(ValueError, match="has no patients for 'train' .*'dev': 1, 'test': 1"):
        divide(source, SHARE)


def test_the_digest_is_that_of_the_list_not_of_its_order(tmp_path):
    one = open_source(f"meds:{ward(tmp_path / 'a', LISTED)}")
    two = open_source(f"meds:{ward(tmp_path / 'b', dict(reversed(LISTED.items())), [1, 3])}")
    other = open_source(f"meds:{ward(tmp_path / 'c', LISTED | {2: 'held_out'})}")
    assert one.splits_digest == two.splits_digest != other.splits_digest


def test_how_a_patient_stands_to_training(source, tmp_path):
    record = divide(source, SHARE).record
    found = [standing(source, i, SHARE, record) for i in range(7)]
    assert [s.trained_on for s in found] == [True, True, *[False] * 5]
    assert [s.words for s in found] == [
        "trained on",
        "trained on",
        "not trained on, but evaluated while training (tuning)",
        "held out, not trained on",
        "not trained on (prospective)",
        *["not trained on (in no split)"] * 2,
    ]
    for older in (None, {"by": "hash"}):  # the hash split then, whatever the list says
        for i, subject in enumerate(source.subjects):
            assert standing(source, i, SHARE, older).trained_on == (not is_held_out(subject, SHARE))
    other = open_source(f"meds:{ward(tmp_path / 'other', LISTED | {2: 'held_out'})}")
    assert standing(other, 1, SHARE, record).trained_on is None


def test_part_of_a_source_is_a_source(source):
    part = source.only(np.array([False, True, False, True, False, False, True]))
    assert part.subjects == [2, 4, 7] and part.splits == ["train", "held_out", None]
    assert part.vocabulary.tokens[5:] == ("OF//2", "OF//4", "OF//7")
    for index, subject in enumerate(part.subjects):
        ids = part.sequence(index, 9)
        assert [part.vocabulary.tokens[i] for i in ids] == ["[CLS]", *[f"OF//{subject}"] * 3]
    places = [slice(*part.bounds(index)[::2]) for index in range(3)]
    assert [part.times[at].tolist() for at in places] == [[0, 1, 2]] * 3
    assert (part.starts == part.begins).all() and part.counts().tolist() == [*[0] * 5, 3, 3, 3]
