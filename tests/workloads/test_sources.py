"""Sources of every kind: what they hold, how they are opened, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from patients import DAY, write_events, write_patients  # noqa: E402

from clinattn.workloads import PROFILES, SPECIAL_TOKENS, MedsError, open_source  # noqa: E402
from clinattn.workloads.code_names import code_descriptions, with_meaning  # noqa: E402
from clinattn.workloads.opening import from_words, parse_data  # noqa: E402
from clinattn.workloads.profiles import POOL, sample_lengths  # noqa: E402
from clinattn.workloads.vocabulary import CLS, UNK  # noqa: E402

EVENTS = [
    (7, None, "SEX//F", None),
    (7, 10 * DAY, "MEDS_BIRTH", None),
    (7, 12 * DAY, "HR", 80.0),
    (7, 13 * DAY, "HR", 90.0),
    (9, 5 * DAY, "ADMIT", None),
    (9, 6 * DAY, "HR", 75.0),
]
ROWS = [
    {"text": "Pain, pain. Rest!", "label": "b", "subject_id": 4},
    {"text": "no PAIN", "label": "a", "subject_id": 4},
    {"text": "rest", "label": "a", "subject_id": "five"},
]


@pytest.fixture
def meds(tmp_path):
    return open_source(f"meds:{write_events(tmp_path / 'ward', EVENTS)}")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "notes.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return open_source(f"text:{tmp_path / 'notes.jsonl'}")


@pytest.fixture
def profile():
    return open_source("profile:note_discharge", max_tokens=64, vocab_size=20, seed=3)


def words(source, ids) -> list[str]:
    return [source.vocabulary.tokens[i] for i in ids]


def test_a_meds_folder_has_times_values_and_static_facts(meds):
    assert meds.name == "meds" and meds.description == "MEDS folder ward, 2 patients"
    assert len(meds) == 2 and meds.subjects == [7, 9] and meds.labels is None
    assert meds.bounds(0) == (0, 1, 4) and meds.bounds(1) == (4, 4, 6)
    assert words(meds, meds.sequence(0, 99)) == ["[CLS]", "SEX//F", "MEDS_BIRTH", "HR", "HR"]
    assert words(meds, meds.sequence(0, 3)) == ["[CLS]", "SEX//F", "HR"]  # the latest event
    assert meds.sequence(0, 1).tolist() == [CLS]
    assert meds.lengths(4).tolist() == [4, 3]
    days = [meds.days(i, meds.times[at]).tolist() for i, at in ((0, slice(4)), (1, slice(4, 6)))]
    assert days == [[0, 0, 2, 3], [0, 1]]  # since birth, or the first timed event
    np.testing.assert_array_equal(meds.values[2:4], [80, 90])
    assert meds.unknown_share() == 0


def test_a_text_has_words_labels_and_subjects(text):
    assert text.name == "text" and text.description == "notes.jsonl, 3 rows"
    assert text.subjects == ["4", "4", "five"] and text.labels == ["b", "a", "a"]
    assert words(text, text.sequence(0, 99)) == ["[CLS]", "pain", ",", "pain", ".", "rest", "!"]
    assert words(text, text.sequence(0, 3)) == ["[CLS]", "pain", ","]  # the first words
    assert text.lengths(5).tolist() == [5, 3, 2]
    assert text.times is None and text.values is None
    with pytest.raises(ValueError, match="text_file='.*notes.jsonl' has no times: expected"):
        text.days(0, np.zeros(1))


def test_a_profile_is_drawn_from_its_seed(profile):
    lengths = sample_lengths("note_discharge", POOL, 64, 3)
    np.testing.assert_array_equal(profile.lengths(64), lengths)
    assert profile.name == "note_discharge" and len(profile) == POOL
    assert profile.description.startswith("length profile note_discharge: discharge summaries")
    drawn = profile.sequence(0, 64)
    assert drawn.dtype == torch.int64 and drawn[0] == CLS and len(drawn) == lengths[0]
    assert drawn[1:].min() >= len(SPECIAL_TOKENS) and profile.ids.max() < 20
    assert len(profile.vocabulary) == 20 and profile.unknown_share() is None
    again = open_source("profile:note_discharge", max_tokens=64, vocab_size=20, seed=3)
    np.testing.assert_array_equal(again.ids, profile.ids)
    other = open_source("profile:note_discharge", max_tokens=64, vocab_size=20, seed=4)
    assert not np.array_equal(other.ids[:9], profile.ids[:9])


def test_a_split_holds_out_whole_subjects(tmp_path, profile):
    rows = [{"text": f"w{i}", "subject_id": i // 4} for i in range(400)]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = open_source(f"text:{tmp_path / 'many.jsonl'}").held_out(0.3)
    assert 0.15 < out.mean() < 0.45 and (out.reshape(100, 4) == out[::4, None]).all()
    assert abs(profile.held_out(0.2).mean() - 0.2) < 0.04
    patients = open_source(f"meds:{write_patients(tmp_path / 'p')}")
    np.testing.assert_array_equal(patients.held_out(0.2), patients.held_out(0.2))
    assert not patients.held_out(1e-12).any()


def test_the_vocabulary_of_a_split_leaves_the_others_unknown(text, meds):
    chosen = np.array([False, True, True])
    vocabulary = text.vocabulary_of(text.until(chosen))
    assert vocabulary.tokens == (*SPECIAL_TOKENS, "no", "pain", "rest")
    ids = text.table_of(vocabulary)[text.ids]
    assert ids.tolist() == [6, UNK, 6, UNK, 7, UNK, 5, 6, 7]
    assert text.vocabulary_of(text.ends, min_count=2).tokens[5:] == ("pain", "rest")
    assert text.vocabulary_of(text.ends, max_size=6).tokens[5:] == ("pain",)
    one = meds.until(np.array([False, True]))
    assert meds.vocabulary_of(one).tokens[5:] == ("ADMIT", "HR")


def test_a_tokenizer_brings_its_own_vocabulary(tmp_path, text):
    tokenizers = pytest.importorskip("tokenizers")
    names = {"<pad>": 0, "<unk>": 1, "<s>": 2, "<mask>": 3, "pain": 4, "rest": 5}
    model = tokenizers.models.WordLevel(names, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "t.json"))
    path = f"text:{tmp_path / 'notes.jsonl'}"
    source = open_source(path, tokenizer=tmp_path / "t.json")
    assert source.closed and source.sequence(2, 9).tolist() == [2, 5]
    own = source.vocabulary
    assert (own.cls, own.mask, own.sep, own.unknown) == (2, 3, None, 1)
    assert source.vocabulary_of(source.begins) is own
    assert source.table_of(text.vocabulary).tolist() == list(range(6))
    assert 0 < source.unknown_share() < 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("csv:x", r"data='csv:x': expected meds:DIR, meds-torch:DIR, text:FILE or profile:NAME"),
        ("ward", "data='ward': expected meds:DIR"),
        ("meds:", "data='meds:': expected meds:DIR"),
        ("", "data='': expected meds:DIR"),
        ("profile:icu", r"profile='icu' is unknown: expected one of \['ehr_icu', 'ehr_pop"),
        ("meds:absent", "meds_dir='absent' does not exist: expected a MEDS folder"),
        ("meds:folder", r"meds_dir='folder' has no data/\*\*/\*.parquet"),
        ("meds:empty.csv", "meds_dir='empty.csv' is a file: expected a MEDS folder"),
        ("text:absent.csv", "text_file='absent.csv' cannot be read"),
        ("text:empty.csv", "text_file='empty.csv' has no rows: expected a .csv or .tsv file"),
        ("text:empty.jsonl", "text_file='empty.jsonl' has no rows"),
        ("text:blank.jsonl", "text_file='blank.jsonl' has no words in its rows: expected some"),
        ("text:note.txt", "text_file='note.txt': expected a .csv or .tsv file"),
        ("text:folder", "text_file='folder': expected a .csv or .tsv file"),
    ],
)
def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("empty.csv", "empty.jsonl", "note.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "blank.jsonl").write_text('{"text": " "}')
    with pytest.raises(MedsError if "meds_dir" in message else ValueError, match=message):
        open_source(data)


def test_a_label_is_needed_where_it_is_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}')
    assert open_source(f"text:{path}").labels == [None]
    with pytest.raises(ValueError, match="a.jsonl' line 1 has no 'label'"):
        open_source(f"text:{path}", labelled=True)


def test_a_tokenizer_goes_with_a_text_alone():
    with pytest.raises(ValueError, match="tokenizer: expected only with text_file"):
        open_source("profile:fixed", tokenizer="t.json")


def test_a_place_may_hold_colons():
    assert parse_data("meds:/a:b/c") == ("meds", "/a:b/c")
    assert {parse_data(f"profile:{name}").place for name in PROFILES} == set(PROFILES)


def test_older_words_say_the_same():
    assert from_words(None, meds_dir="a", text_file=None) == "meds:a"
    assert from_words(None, text_file="b.csv") == "text:b.csv"
    assert from_words(None, profile="fixed") == from_words("profile:fixed") == "profile:fixed"
    assert from_words(None) is None
    with pytest.raises(ValueError, match="data and meds_dir: got both, expected exactly one"):
        from_words("profile:fixed", meds_dir="a")
    with pytest.raises(ValueError, match="meds_dir, text_file and profile: got all, expected"):
        from_words(None, meds_dir="a", text_file="b", profile="fixed")


def write_codes(root, **columns):
    (root / "metadata").mkdir()
    pq.write_table(pa.table(columns), root / "metadata" / "codes.parquet")
    return root


def test_codes_are_named_by_their_description_or_else_by_their_parents(tmp_path):
    parents = [None, ["A"], ["SNOMED/12", "A", None], [], ["A"]]
    write_codes(
        tmp_path,
        code=["A", "B", "C", "D", "E"],
        description=["heart\n rate", None, " ", None, "pulse"],
        parent_codes=pa.array(parents, pa.list_(pa.string())),
    )
    assert code_descriptions(tmp_path) == {
        "A": "heart rate",
        "B": "under heart rate",
        "C": "under SNOMED/12; heart rate",
        "E": "pulse",
    }


def test_a_pattern_is_named_by_the_one_code_that_it_matches():
    codes, meanings = ["ICU_IN", "ICU_OUT", "HR"], {"ICU_IN": "to intensive care", "HR": "pulse"}
    assert with_meaning("*_IN", codes, meanings) == "*_IN (to intensive care)"
    assert with_meaning("ICU_*", codes, meanings) == "ICU_*"
    assert with_meaning("ICU_OUT", codes, meanings) == "ICU_OUT"
    assert with_meaning("NONE", codes, meanings) == "NONE"


def test_codes_without_descriptions_or_parents_have_none(tmp_path):
    assert code_descriptions(tmp_path) == {}
    assert code_descriptions(write_codes(tmp_path, code=["A"])) == {}


def test_parents_that_are_no_list_are_refused(tmp_path):
    write_codes(tmp_path, code=["A"], parent_codes=["B"])
    with pytest.raises(MedsError, match="'parent_codes' has type string: expected a list"):
        code_descriptions(tmp_path)
