"""Task labels in training: a sequence for each, which knows the past alone, and its figures."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow")

from patients import DAY, write_events, write_labels, write_splits  # noqa: E402
from runs import SMALL, assert_same_bits, rows_of, small_run  # noqa: E402

from clinattn.encoder import PRESETS  # noqa: E402
from clinattn.training.batches import packed  # noqa: E402
from clinattn.training.checkpoint import checkpoints, load_checkpoint, load_model  # noqa: E402
from clinattn.training.labelled import read_labelled  # noqa: E402
from clinattn.training.loop import Trainer  # noqa: E402
from clinattn.training.settings import TrainingSettings  # noqa: E402
from clinattn.workloads import SPECIAL_TOKENS  # noqa: E402

MOMENT = 10 * DAY
OF = {p: ("train", "tuning", "held_out")[p % 3] for p in range(1, 361)}
CODES = [f"STEP//{i}" for i in range(6)]


def outcome(patient: int) -> bool:
    return bool(np.random.default_rng(patient).random() < 0.5)


def events_of(patient: int, planted: int | None) -> list[tuple]:
    """Noise on days 0 to 9 and after, and at `planted` a code and a value that are the outcome."""
    rng = np.random.default_rng([7, patient])
    rows = [(patient, None, f"SEX//{'FM'[patient % 2]}", None)]
    for day in (*range(10), *range(15, 20)):
        rows.append((patient, day * DAY, CODES[rng.integers(6)], float(rng.normal())))
    if planted is not None:
        sign = outcome(patient)
        rows.append((patient, planted, f"OUT//{sign}", 100.0 if sign else -100.0))
        rows.append((patient, planted + 1, "LATER", None))
    return rows


def ward(root, planted=None, keep=lambda row: True):
    rows = [row for p in OF for row in events_of(p, planted) if keep(row)]
    return write_splits(write_events(root, rows), OF)


@pytest.fixture
def task(tmp_path):
    rows = [(p, MOMENT, outcome(p)) for p in OF]
    return write_labels(tmp_path / "task" / "0.parquet", rows).parent


def settings_of(folder, labels, **given):
    common = {"label_code": None, "max_tokens": 32, "batch_tokens": 1024, "min_count": 1}
    return small_run("classify", **common | {"meds_dir": folder, "labels": labels} | given)


def names(corpus, example) -> list[str]:
    return [corpus.tokens[i] for i in example.ids]


def read(settings, **given):
    return read_labelled(settings, **{"times": True, "values": True} | given)


def test_nothing_after_the_prediction_time_is_in_a_corpus(tmp_path, task):
    """Ids, days, values, vocabulary and scales are the same when the future is taken away."""
    leaky = read(settings_of(ward(tmp_path / "leaky", MOMENT + 1), task))
    past = ward(tmp_path / "past", None, lambda row: row[1] is None or row[1] <= MOMENT)
    clean = read(settings_of(past, task))
    assert leaky.fingerprint == clean.fingerprint
    for ours, theirs in zip(
        (leaky.standard.mean, leaky.standard.scale),
        (clean.standard.mean, clean.standard.scale),
        strict=True,
    ):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    assert set(leaky.tokens) == {*SPECIAL_TOKENS, *CODES, "SEX//F", "SEX//M"}
    for example in [*leaky.train, *leaky.held_out]:
        assert len(example) == 1 + 1 + 10 and float(example.days.max()) <= 9


def test_what_happens_at_the_prediction_time_is_read(tmp_path, task):
    """LabelSchema of the package meds: data up to and including this time."""
    corpus = read(settings_of(ward(tmp_path / "ward", MOMENT), task))
    for example in [*corpus.train, *corpus.held_out]:
        said = "OUT//True" if example.label else "OUT//False"
        assert names(corpus, example)[-1] == said and float(example.days[-1]) == 10
        assert "LATER" not in corpus.tokens  # a microsecond later


@pytest.mark.parametrize(
    ("planted", "known"), [(MOMENT + 1, False), (MOMENT, True), (9 * DAY, True)], ids=str
)
def test_a_leak_is_learnt_from_the_past_alone(tmp_path, task, monkeypatch, threads, planted, known):
    threads(1)
    monkeypatch.setitem(PRESETS, "tiny", replace(SMALL, numeric_values=True))
    settings = settings_of(
        ward(tmp_path / "ward", planted), task, steps=60, lr=3e-3, eval_every=60, output=tmp_path
    )
    trainer = Trainer(settings)
    trainer.run()
    auroc = [row["auroc"] for row in rows_of(tmp_path) if row["split"] == "tuning"][-1]
    ones = sum(example.label for example in trainer.corpus.held_out)
    zeros = len(trainer.corpus.held_out) - ones
    spread = math.sqrt((ones + zeros + 1) / (12 * ones * zeros))  # of Mann and Whitney's, by chance
    assert auroc > 0.99 if known else abs(auroc - 0.5) < 4 * spread


def test_held_out_patients_choose_no_vocabulary_or_scale(tmp_path, task):
    one = read(settings_of(ward(tmp_path / "one"), task))
    rows = [
        (p, t, f"ONLY//{OF[p]}" if OF[p] != "train" and code in CODES else code, value)
        for p in OF
        for _, t, code, value in events_of(p, None)
    ]
    other = write_splits(write_events(tmp_path / "other", rows), OF)
    two = read(settings_of(other, task))
    assert one.tokens == two.tokens
    assert torch.equal(one.standard.mean.nan_to_num(), two.standard.mean.nan_to_num())
    assert all("[UNK]" in names(two, example) for example in two.held_out)


def test_each_row_is_a_sequence_of_its_own_time(tmp_path):
    """Latest events that fit, static facts first; subjects of other splits or none are left out."""
    rows = [(1, None, "SEX//F")] + [(1, i * DAY, f"D{i}") for i in range(6)]
    rows += [(2, None, "SEX//M"), (2, 9 * DAY, "D9"), (3, 0, "D0"), (4, 0, "D0"), (5, 0, "D0")]
    folder = write_splits(
        write_events(tmp_path / "ward", rows), {1: "train", 2: "train", 3: "tuning", 4: "held_out"}
    )
    labels = write_labels(
        tmp_path / "l.parquet",
        [
            (1, 3 * DAY, False),
            (1, 5 * DAY - 1, True),
            (1, 9 * DAY, True),
            (2, DAY, False),  # before all events
            (3, DAY, True),
            (4, DAY, True),
            (5, DAY, True),
            (77, DAY, True),  # of nobody
        ],
    )
    corpus = read_labelled(settings_of(folder, labels, max_tokens=5))
    assert [(" ".join(names(corpus, e)[1:]), e.label) for e in corpus.train] == [
        ("SEX//F D1 D2 D3", 0),
        ("SEX//F D2 D3 D4", 1),
        ("SEX//F D3 D4 D5", 1),
        ("SEX//M", 0),
    ]
    assert [names(corpus, e)[1:] for e in corpus.held_out] == [["D0"]]
    assert (
        "5 of 8 rows of boolean_value are read, 1 are of subjects that the data have not, 2 are of "
        "other splits, 1 have no event up to prediction_time, and are static facts alone"
    ) in corpus.source
    assert corpus.classes == ("false", "true") and corpus.target.column == "boolean_value"


def test_classes_by_name_are_those_of_training(tmp_path):
    folder = ward(tmp_path / "ward")
    kinds = ["home", "ward", "died"]
    rows = [(p, MOMENT, kinds[p // 3 % 3]) for p in OF]
    path = write_labels(tmp_path / "l.parquet", rows, "categorical_value")
    corpus = read_labelled(settings_of(folder, path))
    assert corpus.classes == ("died", "home", "ward")
    assert {e.label for e in corpus.train} == {e.label for e in corpus.held_out} == {0, 1, 2}
    odd = next(p for p in OF if OF[p] == "tuning")
    write_labels(path, [(p, t, "odd" if p == odd else v) for p, t, v in rows], "categorical_value")
    with pytest.raises(ValueError, match=r"has classes \['odd'\] in the rows to evaluate alone"):
        read_labelled(settings_of(folder, path))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(p, MOMENT, True) for p in OF], "training rows boolean_value True: expected two values"),
        ([(999, MOMENT, True)], "none of its 1 rows has a subject of meds_dir=.*, expected some"),
        ([(p, MOMENT, p < 9) for p in OF if OF[p] == "train"], "of the split 'tuning' of meds_dir"),
        ([(p, MOMENT, p < 9) for p in OF if OF[p] != "train"], "of the split 'train' of meds_dir"),
    ],
    ids=["one class", "nobody", "no tuning", "no train"],
)
def test_labels_that_training_cannot_use_are_refused(tmp_path, rows, message):
    path = write_labels(tmp_path / "l.parquet", rows)
    with pytest.raises(ValueError, match=message):
        read_labelled(settings_of(ward(tmp_path / "ward"), path))


@pytest.mark.parametrize("column", ["float_value", "integer_value"])
def test_numbers_are_predicted_and_go_on_from_a_checkpoint(
    tmp_path, small_presets, threads, column
):
    """The number follows from a code on the day before; figures are in the units of the labels."""
    threads(1)
    rows = [
        (p, 9 * DAY + 1, f"STAY//{p % 4}", None) if row[1] == 9 * DAY else row
        for p in OF
        for row in events_of(p, None)
    ]
    folder = write_splits(write_events(tmp_path / "ward", rows), OF)
    number = float if column == "float_value" else int
    given = [(p, MOMENT, number(1000 + 20 * (p % 4))) for p in OF]
    path = write_labels(tmp_path / "l.parquet", given, column)
    settings = settings_of(folder, path, steps=80, lr=3e-3, eval_every=40, save_every=40)
    whole = replace(settings, output=tmp_path / "whole")
    trainer = Trainer(whole)
    trainer.run()
    last = [row for row in rows_of(whole.output) if row["split"] == "tuning"][-1]
    labels = np.array([example.label for example in trainer.corpus.held_out])
    mean = np.mean([example.label for example in trainer.corpus.train])
    assert last["base_mse"] == pytest.approx(((labels - mean) ** 2).mean())
    assert last["base_mae"] == pytest.approx(abs(labels - mean).mean())
    assert last["r2"] == pytest.approx(1 - last["mse"] / labels.var())
    assert last["r2"] > 0.9 and last["mae"] < 0.3 * last["base_mae"]

    model, saved = load_model(checkpoints(tmp_path / "whole")[-1])
    target = saved["target"]
    assert target["column"] == column and saved["classes"] == ()
    ids, arguments = packed(trainer.corpus.held_out, torch.device("cpu"))
    with torch.inference_mode():
        said = model(ids, **arguments).logits[:, 0].double() * target["scale"] + target["mean"]
    assert float((said - torch.tensor(labels)).square().mean()) == pytest.approx(last["mse"])

    def stop(message: str, done: int, total: int) -> None:
        if message.startswith("training") and done == 41:
            raise KeyboardInterrupt

    part = replace(settings, output=tmp_path / "part")
    with pytest.raises(KeyboardInterrupt):
        Trainer(part, progress=stop).run()
    resumed = Trainer(replace(part, resume=True))
    assert resumed.step == 40
    resumed.run()
    a, b = (load_checkpoint(checkpoints(tmp_path / x)[-1]) for x in ("whole", "part"))
    assert all(torch.equal(weight, b["model"][name]) for name, weight in a["model"].items())


def test_a_classifier_of_labels_starts_from_pretraining_and_resumes(tmp_path, task, small_presets):
    folder = ward(tmp_path / "ward", 9 * DAY)
    before = small_run(meds_dir=folder, output=tmp_path / "before", steps=2)
    Trainer(before).run()
    first = settings_of(folder, task, steps=2, init=tmp_path / "before", output=tmp_path / "a")
    Trainer(first).run()
    saved = load_checkpoint(checkpoints(tmp_path / "a")[-1])
    assert saved["target"] == {"column": "boolean_value", "mean": None, "scale": None}
    assert saved["classes"] == ("false", "true") and "labels" not in saved["settings"]
    assert Trainer(replace(first, resume=True)).step == 2
    moved = write_labels(tmp_path / "other.parquet", [(p, MOMENT, not outcome(p)) for p in OF])
    with pytest.raises(ValueError, match="gives other sequences than step 2"):
        Trainer(replace(first, resume=True, labels=moved))
    again = replace(first, output=tmp_path / "b")
    Trainer(again).run()
    assert_same_bits(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label_code": "A*"}, "label_code and labels: got both, expected one of them"),
        ({"labels": None}, "label_code and labels: got neither, expected one of them"),
        ({"cuts": 2}, "cuts=2: expected only with label_code, not with labels"),
        ({"task": "mlm"}, "labels: expected only with task='classify', not 'mlm'"),
        ({"data": "profile:fixed"}, "has no labels, expected meds:DIR with label_code or labels"),
    ],
    ids=["both", "neither", "cuts", "mlm", "profile"],
)
def test_settings_say_labels_once(given, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**{"task": "classify", "data": "meds:x", "labels": "l"} | given)
