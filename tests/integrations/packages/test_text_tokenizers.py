"""Tokenizers of folders are those of transformers; a WordPiece of texts is the same every time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("transformers", "tokenizers"):
    pytest.importorskip(package)

from chinese import discharge_notes  # noqa: E402
from tokenizers import ByteLevelBPETokenizer  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from clinattn.workloads.tokenizer import of_json, read_tokenizer  # noqa: E402
from clinattn.workloads.wordpiece import wordpiece  # noqa: E402

TEXTS = ["The naïve Patient HAS", "胸痛3天 fever", "cafés, cafes\t[SEP] x", "", "zzz Ｈ１"]
PIECES = "a b c e f h i n p s t v x z ï é 3 胸 痛 天 , cafe cafes naive naïve".split()
CAPITALS = "T P H A S The Patient HAS".split()
SPECIAL = "[PAD] [UNK] [CLS] [SEP] [MASK]".split()


def bert_folder(folder: Path, words: list[str], **said) -> Path:
    continued = [f"##{x}" for x in words if len(x) == 1]
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *words, *continued]))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    if said:
        config = {"tokenizer_class": "BertTokenizer"} | said
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "said",
    [
        {"do_lower_case": True},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True},
        {"do_lower_case": True, "tokenize_chinese_chars": False},
    ],
    ids=str,
)
def test_a_vocab_txt_gives_the_ids_of_transformers(tmp_path, said):
    folder = bert_folder(tmp_path, PIECES + CAPITALS, **said)
    ours, theirs = read_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text, ids in zip(TEXTS, ours.ids(TEXTS), strict=True):
        assert [2, *ids, 3] == theirs(text)["input_ids"]
    assert (ours.vocabulary.cls, ours.vocabulary.end, ours.vocabulary.mask) == (2, 3, 4)
    assert ours.vocabulary.special == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("words", "lower"), [(PIECES, True), (PIECES + CAPITALS, False)], ids=["lower", "cased"]
)
def test_a_vocab_txt_alone_says_by_its_capitals_whether_they_are_kept(tmp_path, words, lower):
    tokenizer = read_tokenizer(bert_folder(tmp_path, words))
    plain, capitals = tokenizer.ids(["fever the", "FEVER THE"])
    assert (plain == capitals) == lower


def test_roberta_gives_the_ids_of_transformers(tmp_path):
    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(TEXTS * 3, 300, min_frequency=1, special_tokens=special)
    bpe.save_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    ours, theirs = read_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        if "[SEP]" not in text:
            assert ours.tokenizer.encode(text).ids == theirs(text)["input_ids"]
    assert ours.ids(["fever <mask>"])[0][-1] == ours.vocabulary.mask == 4
    assert (ours.vocabulary.cls, ours.vocabulary.end) == (0, 2)
    assert ours.vocabulary.special == {0, 1, 2, 3, 4}


def test_another_template_is_refused(tmp_path):
    tokenizer = wordpiece(["a b"], 20, 1)
    whole = json.loads(tokenizer.json())
    whole["post_processor"]["single"] += whole["post_processor"]["single"][-1:]
    with pytest.raises(ValueError, match=r"t.json puts \['\[CLS\]', '\[SEP\]', '\[SEP\]'\] around"):
        of_json(json.dumps(whole), "t.json")


def chinese_notes() -> list[str]:
    return [note.text for note in discharge_notes(60)]


def test_a_wordpiece_of_texts_knows_them_and_comes_back_from_its_json():
    texts = chinese_notes()
    tokenizer = wordpiece(texts, 400, 1)
    vocabulary = tokenizer.vocabulary
    assert len(vocabulary) <= 400 and vocabulary.tokens[:5] == tuple(SPECIAL)
    assert vocabulary.special == {0, 1, 2, 3, 4} and vocabulary.end == 3
    assert all(vocabulary.unknown not in ids for ids in tokenizer.ids(texts))
    assert max(len(x.removeprefix("##")) for x in vocabulary.tokens[5:]) > 3  # merged
    again = of_json(tokenizer.json(), "x")
    assert again.vocabulary == vocabulary and again.ids(texts) == tokenizer.ids(texts)
    half, full = tokenizer.ids(["BP 142 mmHg", "ＢＰ　１４２　ｍｍＨｇ"])
    assert half == full
    with pytest.raises(ValueError, match=r"vocabulary=20: expected at least \d+, for the charact"):
        wordpiece(texts, 20, 1)


def test_a_wordpiece_is_the_same_in_every_process():
    code = (
        "import hashlib, chinese\n"
        "from clinattn.workloads.wordpiece import wordpiece\n"
        "made = wordpiece([note.text for note in chinese.discharge_notes(60)], 400, 2)\n"
        "print(hashlib.sha256(made.json().encode()).hexdigest())"
    )
    found = set()
    for threads in ("1", "2", "3"):
        words = {"PYTHONPATH": os.pathsep.join(sys.path), "RAYON_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | words,
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(done.stdout)
    assert len(found) == 1 and len(found.pop()) == 65


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="vocabulary=99 needs: pip install tokenizers"):
        wordpiece(["a"], 99, 1)
