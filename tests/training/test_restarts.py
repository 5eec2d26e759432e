"""Runs that torchrun or Slurm has started anew, and settings of several processes on one."""

from __future__ import annotations

import shutil
from functools import partial

import pytest

pytest.importorskip("pyarrow")

from patients import write_patients  # noqa: E402
from runs import assert_same_bits, small_run  # noqa: E402

from clinattn.training.checkpoint import checkpoints  # noqa: E402
from clinattn.training.loop import Trainer  # noqa: E402
from clinattn.training.ranks import Ranks  # noqa: E402


@pytest.fixture
def settings(tmp_path, threads, small_presets):
    threads(1)
    folder = write_patients(tmp_path / "meds")
    return lambda name, **given: small_run(meds_dir=folder, output=tmp_path / name, **given)


@pytest.mark.parametrize("counter", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_restarted_run_begins_or_goes_on_as_the_folder_asks(
    counter, resume, settings, tmp_path, monkeypatch
):
    """With or without --resume: the attempt before may have ended before its first checkpoint."""
    Trainer(settings("whole")).run()
    monkeypatch.setenv(counter, "1")
    again = settings("again", resume=resume, save_every=3)
    killed = Trainer(again, progress=fail_at(5))
    assert killed.step == 0
    with pytest.raises(MemoryError):
        killed.run()
    later = Trainer(again)
    assert later.step == 3
    later.run()
    assert_same_bits(tmp_path / "whole", tmp_path / "again")


def fail_at(step):
    def progress(message, done, total):
        if message.startswith("training") and done == step:
            raise MemoryError

    return progress


@pytest.mark.parametrize("count", ["0", ""])
def test_a_first_start_takes_no_checkpoint_that_it_was_not_asked_for(count, settings, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    Trainer(settings("out")).run()
    with pytest.raises(ValueError, match="expected resume, or another folder"):
        Trainer(settings("out"))


def test_shards_need_several_processes(settings):
    with pytest.raises(ValueError, match="shard: got one process, expected several"):
        Trainer(settings("out", shard=True))


def test_batches_of_a_step_are_shared_out_evenly(settings):
    with pytest.raises(ValueError, match="accumulate=3: expected a multiple of the 2 ranks"):
        Trainer(settings("out", accumulate=3), Ranks(1, 2))


def test_a_run_on_a_length_profile_goes_on(settings, tmp_path):
    """Tokens of a profile are drawn from all ids of the preset, not from those that were seen."""
    settings = partial(small_run, data="profile:ehr_population", save_every=3, keep=3)
    Trainer(settings(output=tmp_path / "whole")).run()
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for path in checkpoints(tmp_path / "again")[1:]:
        path.unlink()
    Trainer(settings(output=tmp_path / "again", resume=True)).run()
    assert_same_bits(tmp_path / "whole", tmp_path / "again")
