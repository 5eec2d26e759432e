"""Checkpoints of training: whole or not at all, the last few, and what a run goes on from."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("pyarrow")

from patients import write_patients  # noqa: E402
from runs import small_run  # noqa: E402

from clinattn.training import checkpoint  # noqa: E402
from clinattn.training.checkpoint import checkpoints, load_checkpoint  # noqa: E402
from clinattn.training.loop import Trainer  # noqa: E402
from clinattn.training.metrics import MetricsFile  # noqa: E402

pytestmark = pytest.mark.usefixtures("small_presets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_patients(tmp_path_factory.mktemp("meds"), patients=60)


@pytest.fixture
def settings(folder, tmp_path):
    return partial(small_run, meds_dir=folder, output=tmp_path / "out")


def test_a_checkpoint_that_cannot_be_written_whole_leaves_the_last_one(settings, monkeypatch):
    first = settings(save_every=2, steps=4)
    real = torch.save

    def full_disk(state, file):
        if state["step"] == 4:
            file.write(b"half")
            raise OSError("no space left")
        real(state, file)

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        Trainer(first).run()
    found = checkpoints(Path(first.output))
    assert [path.name for path in found] == ["step-00000002.pt"]
    assert load_checkpoint(found[0])["step"] == 2


def test_the_last_few_checkpoints_are_kept(settings, tmp_path):
    Trainer(settings(save_every=2, keep=3)).run()
    kept = [path.name for path in (tmp_path / "out").glob("*.p*")]
    assert sorted(kept) == ["step-00000004.pt", "step-00000006.pt", "step-00000008.pt"]


@pytest.fixture
def finished(settings):
    Trainer(settings(steps=1)).run()
    return lambda **changes: settings(**{"steps": 1, "resume": True} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume": False}, "holds step-00000001.pt: expected resume, or another folder"),
        ({"steps": 9}, "resume: steps=9: expected 1 as in step-00000001.pt"),
        ({"lr": 1.0}, "resume: lr=1.0: expected 0.001"),
        ({"seed": 5}, "resume: seed=5: expected 0"),
        ({"output": "elsewhere"}, "output='elsewhere' holds no checkpoint"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_going_on_with_something_else_is_refused(finished, changes, message):
    with pytest.raises(ValueError, match=message):
        Trainer(finished(**changes))


def test_a_checkpoint_older_than_a_setting_has_its_default(finished, tmp_path):
    (path,) = checkpoints(tmp_path / "out")
    state = load_checkpoint(path)
    del state["settings"]["nsp"], state["standard"]
    torch.save(state, path)
    assert Trainer(finished()).step == 1
    with pytest.raises(ValueError, match=r"resume: nsp=True: expected False as in step-00000001"):
        Trainer(finished(nsp=True))


def test_going_on_with_other_data_is_refused(finished, tmp_path):
    other = write_patients(tmp_path / "other", patients=60, seed=1)
    with pytest.raises(ValueError, match="gives other sequences than step 1 was trained on"):
        Trainer(finished(meds_dir=other))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a checkpoint" * 99])
def test_a_damaged_checkpoint_is_named(finished, tmp_path, content):
    (tmp_path / "out" / "step-00000001.pt").write_bytes(content)
    with pytest.raises(ValueError, match="step-00000001.pt' cannot be read"):
        Trainer(finished())


def test_something_else_is_no_checkpoint(tmp_path):
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="expected one of clinattn train"):
        load_checkpoint(tmp_path / "other.pt")


def test_metrics_forget_what_came_after_a_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [(s, split) for s in range(4) for split in ("train", "held_out")]
    path.write_text("".join(json.dumps({"step": s, "split": p}) + "\n" for s, p in rows))
    MetricsFile(path, 2)
    found = [tuple(json.loads(line).values()) for line in path.read_text().splitlines()]
    assert found == rows[:5]
