"""The data owner's splits in training: who is read, in which checkpoint, and after which."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("pyarrow")

from patients import write_measured_patients, write_splits  # noqa: E402

from clinattn.training.checkpoint import load_checkpoint  # noqa: E402
from clinattn.training.corpus import read_corpus  # noqa: E402
from clinattn.training.loop import Trainer  # noqa: E402
from clinattn.training.settings import TrainingSettings  # noqa: E402

PATIENTS = range(1, 41)
OF = {p: "held_out" if p % 4 == 0 else "tuning" if p % 4 == 1 else "train" for p in PATIENTS}


@pytest.fixture
def settings(tmp_path):
    def make(**given):
        folder = tmp_path / "ward"
        if not folder.exists():
            write_splits(write_measured_patients(folder), OF)
        common = {"steps": 1, "max_tokens": 32, "batch_tokens": 256, "threads": 1}
        return TrainingSettings(**{"data": f"meds:{folder}"} | common | given)

    return make


def trained(settings):
    trainer = Trainer(settings)
    trainer.run()
    return trainer, next(trainer.folder.glob("step-*.pt"))


def test_held_out_and_unlisted_patients_change_nothing(settings, tmp_path):
    """Neither sequences, vocabulary nor scales know of patients whom training must not read."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    one = read_corpus(settings(), times=True, values=True)
    path = tmp_path / "ward" / "data" / "0.parquet"
    table = pq.read_table(path)
    kept = [p for p in PATIENTS if OF[p] != "held_out"]
    pq.write_table(table.filter(pc.is_in(table["subject_id"], pc.cast(kept, "int64"))), path)
    two = read_corpus(settings(), times=True, values=True)
    assert one.fingerprint == two.fingerprint and one.evaluated == "tuning"
    assert torch.equal(one.standard.mean.nan_to_num(), two.standard.mean.nan_to_num())
    assert "not read: 10 of 'held_out'" in one.source


def test_patients_of_tuning_move_no_vocabulary_or_scale(settings, tmp_path):
    one = read_corpus(settings(), values=True)
    swapped = {"tuning": "held_out", "held_out": "tuning"}
    write_splits(tmp_path / "ward", {p: swapped.get(split, split) for p, split in OF.items()})
    two = read_corpus(settings(), values=True)
    assert one.tokens == two.tokens and one.fingerprint != two.fingerprint
    assert torch.equal(one.standard.mean.nan_to_num(), two.standard.mean.nan_to_num())
    write_splits(tmp_path / "ward", OF | {2: "tuning"})  # whom both were trained on
    three = read_corpus(settings(), values=True)
    assert not torch.equal(one.standard.mean.nan_to_num(), three.standard.mean.nan_to_num())


def test_the_run_names_the_split_it_is_evaluated_on(settings, tmp_path):
    said = []
    trainer = Trainer(settings(output=tmp_path / "out"), say=said.append)
    trainer.run()
    assert said[-1].startswith("step 1: tuning loss")
    assert "20 of 'train' to train on, 10 of 'tuning' to evaluate" in trainer.summary()
    assert '"split": "tuning"' in (tmp_path / "out" / "metrics.jsonl").read_text()
    saved = load_checkpoint(next((tmp_path / "out").glob("step-*.pt")))
    assert saved["split"] == trainer.corpus.split and saved["split"]["by"] == "list"
    resumed = Trainer(settings(output=tmp_path / "out", resume=True))
    assert resumed.step == 1


def test_the_same_list_is_one_to_go_on_with(settings, tmp_path):
    _, path = trained(settings(output=tmp_path / "one"))
    Trainer(settings(output=tmp_path / "two", init=path))


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (None, OF, "by a hash of each subject, and the data are by a list of splits"),
        (OF, None, "by a list of splits, and the data are by a hash of each subject"),
        (OF, OF | {2: "held_out"}, "by a list of splits, and the data are by another list"),
    ],
    ids=["hash then list", "list then hash", "another list"],
)
def test_who_was_trained_on_is_not_held_out_after(settings, tmp_path, before, now, message):
    listed = tmp_path / "ward" / "metadata" / "subject_splits.parquet"

    def write(of):
        if of is None:
            listed.unlink(missing_ok=True)
        else:
            write_splits(tmp_path / "ward", of)

    settings()
    write(before)
    _, path = trained(settings(output=tmp_path / "one"))
    write(now)
    with pytest.raises(ValueError, match=message):
        Trainer(settings(output=tmp_path / "two", init=path))
    Trainer(settings(output=tmp_path / "two", init=path, other_patients=True))


def test_other_patients_needs_init(settings):
    with pytest.raises(ValueError, match="other_patients=True: expected init too"):
        settings(other_patients=True)


def test_a_checkpoint_without_a_split_is_by_the_hash(settings, tmp_path):
    from clinattn.training.start import check_split

    corpus = read_corpus(settings())
    older = {"settings": {"held_out": 0.2}}
    given = settings(init="older.pt", output=tmp_path / "out")
    check_split(given, replace(corpus, split={"by": "hash"}), older)
    with pytest.raises(ValueError, match="by a hash of each subject"):
        check_split(given, corpus, older)
