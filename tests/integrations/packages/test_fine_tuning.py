"""clinattn train --init FOLDER: published models with their own tokenizers, on texts and labels."""

from __future__ import annotations

import csv
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

for package in ("transformers", "tokenizers", "safetensors"):
    pytest.importorskip(package)

import transformers  # noqa: E402
from runs import assert_same_bits, rows_of  # noqa: E402
from small_folders import tokenizer  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from clinattn.encoder import Encoder  # noqa: E402
from clinattn.training.checkpoint import checkpoints, load_checkpoint, model_of  # noqa: E402
from clinattn.training.loop import Trainer  # noqa: E402
from clinattn.training.settings import FINE_TUNING_LR, TrainingSettings  # noqa: E402
from clinattn.training.start import tokenizer_of  # noqa: E402

SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "max_position_embeddings": 40,
}
FAMILIES = {
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "longformer": {"pad_token_id": 1, "attention_window": [8, 8]},
    "megatron-bert": {},
    "modernbert": {"local_attention": 8, "pad_token_id": 0},
}
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the patient has fever cough ##s no , . and then".split()


def wordpiece() -> Tokenizer:
    made = tokenizer(WORDS)
    made.enable_truncation(8)  # as published: no matter, since windows are cut here
    return made


def published(folder: Path, name: str = "bert", vocabulary: bool = False, kind="AutoModel", **more):
    """A folder as transformers writes it, of more token ids than the tokenizer has."""
    config = transformers.AutoConfig.for_model(
        name, **SIZES | FAMILIES[name] | {"vocab_size": 24} | more
    )
    torch.manual_seed(0)
    model = getattr(transformers, kind).from_config(config).eval()
    model.save_pretrained(folder)
    if vocabulary:
        (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    else:
        wordpiece().save(str(folder / "tokenizer.json"))
    return model


def notes(path: Path, rows: int = 40, words: int = 60) -> Path:
    """Notes of which those of class "ill" have a fever, somewhere."""
    generator = torch.Generator().manual_seed(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        for row in range(rows):
            drawn = torch.randint(5, len(WORDS), (words if row % 4 else 7,), generator=generator)
            said = [WORDS[i] for i in drawn.tolist() if WORDS[i] not in ("fever", "##s")]
            if row % 2:
                said.insert(len(said) // 2, "fever")
            writer.writerow((" ".join(["the", *said]), "ill" if row % 2 else "well"))
    return path


@pytest.fixture
def settings(tmp_path):
    return partial(
        TrainingSettings,
        task="classify",
        init=tmp_path / "model",
        text_file=notes(tmp_path / "notes.csv"),
        output=tmp_path / "out",
        max_tokens=16,
        batch_tokens=64,
        steps=4,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_read_with_its_weights_and_its_tokenizer(settings, tmp_path, name):
    theirs = published(tmp_path / "model", name)
    trainer = Trainer(settings())
    assert trainer.summary().count(f"; {name}, ") == 1 and trainer.lr == FINE_TUNING_LR
    ours = trainer.model.encoder.eval()
    for key, x in Encoder.from_pretrained(tmp_path / "model").state_dict().items():
        assert torch.equal(ours.state_dict()[key], x), key
    short = next(e for e in trainer.corpus.train if e.part == 0 and len(e) < 16)
    assert short.ids[0] == 2 and short.ids[-1] == 3  # [CLS] and [SEP]
    with torch.no_grad():
        words = {}
        if name == "longformer":
            words["global_attention_mask"] = torch.eye(1, len(short), dtype=torch.int64)
        expected = theirs(short.ids[None], **words).last_hidden_state
        torch.testing.assert_close(ours(short.ids[None]), expected, rtol=0, atol=1e-5)
    assert trainer.run() == 0
    assert {"loss", "accuracy", "auroc"} <= rows_of(tmp_path / "out")[-1].keys()


def test_masked_words_go_on_with_the_published_head(settings, tmp_path):
    published(tmp_path / "model", kind="AutoModelForMaskedLM")
    said: list[str] = []
    trainer = Trainer(settings(task="mlm"), say=said.append)
    assert not said  # no tensor is new
    state = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "model").state_dict()
    head = state["cls.predictions.transform.dense.weight"]
    assert torch.equal(trainer.model.state_dict()["head.0.weight"], head)
    assert all(e.ids[-1] == 3 for e in trainer.corpus.train)
    assert len(Trainer(settings(task="mlm", nsp=True)).objective.lengths(0))


def test_a_classifier_is_new_and_the_pooler_is_the_published_one(settings, tmp_path):
    published(tmp_path / "model", kind="AutoModelForSequenceClassification", num_labels=5)
    trainer = Trainer(settings())
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(
        trainer.model.state_dict()["head.0.weight"], theirs.bert.pooler.dense.weight
    )
    assert trainer.model.classifier.out_features == 2
    again = Trainer(settings())
    assert torch.equal(again.model.classifier.weight, trainer.model.classifier.weight)


def test_the_checkpoint_has_the_tokenizer_and_needs_no_folder(settings, tmp_path):
    """A run is interrupted, its model's folder goes, and it ends with the same bits."""
    published(tmp_path / "model", vocabulary=True)
    Trainer(settings(output=tmp_path / "whole")).run()
    torn = settings(save_every=2)
    trainer = Trainer(torn)
    trainer._train_step = stopping(trainer._train_step, trainer)  # type: ignore[method-assign]
    assert trainer.run() == 2
    shutil.rmtree(tmp_path / "model")
    resumed = Trainer(settings(resume=True, init=None, save_every=2))
    assert resumed.step == 2 and resumed.lr == FINE_TUNING_LR and resumed.architecture == "bert"
    resumed.run()
    assert_same_bits(tmp_path / "whole", tmp_path / "out")
    saved = load_checkpoint(checkpoints(tmp_path / "out")[-1])
    tokenizer = tokenizer_of(saved)
    assert tokenizer is not None and tokenizer.vocabulary.tokens == tuple(WORDS)
    assert tokenizer.vocabulary.end == 3 and saved["settings"]["preset"] is None
    assert model_of(saved, "x").encoder.config.vocab_size == 24
    tuned = Trainer(settings(init=tmp_path / "out", output=tmp_path / "next"))
    assert tuned.lr == FINE_TUNING_LR and tuned.corpus.tokens == tuple(WORDS)


def stopping(train_step, trainer):
    """The step, and the signal of Ctrl-C after the second."""

    def step(stop):
        train_step(stop)
        return 2 if trainer.step == 2 else 0

    return step


def test_a_note_is_scored_once_whatever_its_windows(settings, tmp_path):
    published(tmp_path / "model")
    for pool in ("mean", "max", "readmission", "first"):
        trainer = Trainer(settings(pool=pool, output=tmp_path / pool, steps=1))
        held_out = trainer.corpus.held_out
        found = sum(example.part == 0 for example in held_out)
        assert found < len(held_out) or pool == "first"
        trainer.run()
        accuracy = rows_of(tmp_path / pool)[-1]["accuracy"] * found
        assert accuracy == pytest.approx(round(accuracy))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "clinicalbert"}, "preset='clinicalbert': expected none, as init='.*' has its"),
        ({"task": "clm"}, "task='clm': the encoder has causal=False"),
        ({"max_tokens": 41}, "max_tokens=41: expected at most the 40 positions of init"),
        ({"text_file": None, "data": "profile:fixed", "task": "mlm"}, "reads texts, expected text"),
        ({"vocabulary": 50}, "vocabulary and init: got both, expected one of them"),
    ],
    ids=["preset", "clm", "positions", "codes", "vocabulary"],
)
def test_what_contradicts_a_folder_is_refused(settings, tmp_path, changes, message):
    published(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        Trainer(settings(**changes))
    assert not (tmp_path / "out").exists()


def test_folders_that_do_not_fit_are_refused(settings, tmp_path):
    published(tmp_path / "model", vocab_size=10)
    with pytest.raises(ValueError, match="has 16 tokens: expected at most the 10 of its config"):
        Trainer(settings())
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer: expected tokenizer.json, vocab.txt"):
        Trainer(settings())
    (tmp_path / "model" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="config.json: model_type='t5': expected one of"):
        Trainer(settings())


def test_positions_of_roberta_begin_behind_its_padding(settings, tmp_path):
    published(tmp_path / "model", "roberta")
    with pytest.raises(ValueError, match="max_tokens=39: expected at most the 38 positions"):
        Trainer(settings(max_tokens=39, batch_tokens=64))
