"""Chinese notes: read in their encodings, learnt from by characters or by a WordPiece of them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

from chinese import WIDE, discharge_notes  # noqa: E402
from runs import rows_of  # noqa: E402

from clinattn.training.checkpoint import checkpoints, load_checkpoint  # noqa: E402
from clinattn.training.corpus import read_corpus  # noqa: E402
from clinattn.training.loop import Trainer  # noqa: E402
from clinattn.training.settings import TrainingSettings  # noqa: E402
from clinattn.workloads.seeds import is_held_out  # noqa: E402

NOTES = discharge_notes(200)
pytestmark = pytest.mark.usefixtures("small_presets")


def write(path: Path, encoding: str, notes=NOTES) -> Path:
    if path.suffix == ".jsonl":
        text = "\n".join(json.dumps(note._asdict(), ensure_ascii=False) for note in notes)
    else:
        file = io.StringIO()
        csv.writer(file).writerows([("text", "label"), *notes])
        text = file.getvalue()
    path.write_bytes(text.encode(encoding))
    return path


def run(path: Path, output: Path, **changes) -> TrainingSettings:
    given = {"max_tokens": 96, "batch_tokens": 768, "steps": 120, "lr": 3e-3, "eval_every": 120}
    return TrainingSettings(task="classify", text_file=path, output=output, **given | changes)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_an_encoding_changes_nothing_but_the_line_that_names_it(tmp_path, ending):
    corpora = {}
    for encoding in ("utf-8", "gbk", "utf-16"):
        path = write(tmp_path / f"{encoding}.{ending}", encoding)
        corpora[encoding] = read_corpus(TrainingSettings(task="classify", text_file=path))
    assert len({corpus.fingerprint for corpus in corpora.values()}) == 1
    assert "in GB18030" in corpora["gbk"].source and " in " not in corpora["utf-8"].source[:12]
    assert not corpora["utf-8"].warnings()


def test_widths_of_digits_and_letters_are_one(tmp_path):
    rows = [{"text": note.text, "subject_id": i} for i, note in enumerate(NOTES)]
    corpora = []
    for name, wide in (("a.jsonl", False), ("b.jsonl", True)):
        given = [r | {"text": r["text"].translate(WIDE)} if wide else r for r in rows]
        (tmp_path / name).write_text("\n".join(map(json.dumps, given)))
        corpora.append(read_corpus(TrainingSettings(text_file=tmp_path / name)))
    assert corpora[0].fingerprint == corpora[1].fingerprint
    assert {"mmhg", "岁"} < set(corpora[0].tokens)


@pytest.mark.parametrize("vocabulary", [None, 400], ids=["characters", "wordpiece"])
def test_departments_are_learnt(tmp_path, threads, vocabulary):
    if vocabulary:
        pytest.importorskip("tokenizers")
    threads(1)
    path = write(tmp_path / "a.csv", "gbk")
    said: list[str] = []
    trainer = Trainer(run(path, tmp_path / "out", vocabulary=vocabulary), say=said.append)
    assert not said  # no warning
    trainer.run()
    last = rows_of(tmp_path / "out")[-1]
    assert last["accuracy"] > 0.9 > 2 * last["base_rate"]
    saved = load_checkpoint(checkpoints(tmp_path / "out")[-1])
    assert (saved["tokenizer"] is not None) == (vocabulary is not None)
    assert Trainer(run(path, tmp_path / "out", vocabulary=vocabulary, resume=True)).step == 120


def test_a_wordpiece_is_of_the_training_split_alone(tmp_path):
    pytest.importorskip("tokenizers")
    held_out = [note for note in NOTES if is_held_out(note.text, 0.2)]
    told = {note.text for note in held_out}
    path = tmp_path / "a.jsonl"
    rows = [
        {"text": ("龘" * 9 if note.text in told else "") + note.text, "subject_id": note.text}
        for note in NOTES
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    corpus = read_corpus(TrainingSettings(text_file=path, vocabulary=400))
    assert not any("龘" in token for token in corpus.tokens)
    assert sum((e.ids == corpus.unknown).sum() for e in corpus.held_out) == 9 * len(held_out)


def test_many_unknown_words_are_a_warning_with_the_remedy(tmp_path):
    rows = [f"note {i} of patient p{i} with c{i % 3}" for i in range(60)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    said: list[str] = []
    Trainer(TrainingSettings(text_file=path, output=tmp_path / "o"), say=said.append)
    train, held_out = said
    assert train.startswith("warning: ") and "% of the training tokens are [UNK]: --vocab" in train
    assert "of the held-out tokens are [UNK]" in held_out
    said.clear()
    settings = TrainingSettings(text_file=path, output=tmp_path / "o", vocabulary=200, min_count=1)
    pytest.importorskip("tokenizers")
    Trainer(settings, say=said.append)
    assert not said
