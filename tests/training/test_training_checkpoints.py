"""Checkpoints of training: whole or not at all, the last few, and what a run goes on from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("pyarrow")

from patients import write_patients  # noqa: E402
from runs import SMALL_PRESETS, assert_same_bits, small_run  # noqa: E402

from clinattn.encoder import PRESETS, SequenceClassifier  # noqa: E402
from clinattn.training import checkpoint  # noqa: E402
from clinattn.training.checkpoint import (  # noqa: E402
    Damaged,
    checkpoints,
    checksum,
    content_of,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from clinattn.training.loop import Diverged, Trainer  # noqa: E402
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
    save_checkpoint(path.parent, state, keep=1)
    assert Trainer(finished()).step == 1
    with pytest.raises(ValueError, match=r"resume: nsp=True: expected False as in step-00000001"):
        Trainer(finished(nsp=True))


@pytest.mark.parametrize("older", [1, 2])
def test_runs_that_took_another_order_are_read_and_not_gone_on_with(finished, tmp_path, older):
    (path,) = checkpoints(tmp_path / "out")
    state = load_checkpoint(path) | {"format": older}
    torch.save(state | {"sha256": checksum(state)}, path)
    assert load_model(path)[1]["step"] == 1
    with pytest.raises(ValueError, match="step-00000001.pt is of a version that took sequences"):
        Trainer(finished())


def test_a_loop_of_ones_own_leaves_a_checkpoint(settings, tmp_path):
    """content_of holds a model of any shape; facts of privacy come back, and end resuming."""
    run = settings("classify")
    trainer = Trainer(run)
    config = replace(trainer.config, num_layers=1, windows=())
    model = SequenceClassifier(config, len(trainer.corpus.classes))
    optimiser = torch.optim.Adam(model.parameters())
    privacy = {"epsilon": 3.5, "delta": 1e-5, "unit": "patient"}
    content = content_of(run, trainer.corpus, model, optimiser, 7) | {"privacy": privacy}
    (tmp_path / "out").mkdir()
    path = save_checkpoint(tmp_path / "out", content, keep=1)
    loaded, saved = load_model(path)
    assert_same_weights(loaded, model)
    assert saved["privacy"] == privacy and saved["step"] == 7
    assert saved["settings"]["label_code"] == "ALARM*" and "lr" not in saved["settings"]
    with pytest.raises(ValueError, match=f"{path.name} was trained with differential privacy"):
        Trainer(settings("classify", resume=True))
    for wrong in ({"epsilon": 3.5}, {"epsilon": "low", "delta": 1e-5}):
        save_checkpoint(tmp_path / "out", content | {"privacy": wrong}, keep=1)
        with pytest.raises(Damaged, match="delta|epsilon"):
            load_checkpoint(path)


def assert_same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_going_on_with_other_data_is_refused(finished, tmp_path):
    other = write_patients(tmp_path / "other", patients=60, seed=1)
    with pytest.raises(ValueError, match="gives other sequences than step 1 was trained on"):
        Trainer(finished(meds_dir=other))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a checkpoint" * 99])
def test_a_damaged_checkpoint_is_named(finished, tmp_path, content):
    (tmp_path / "out" / "step-00000001.pt").write_bytes(content)
    with pytest.raises(ValueError, match="step-00000001.pt' cannot be read"):
        Trainer(finished())


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    """A run with checkpoints of steps 1 and 2; whoever damages it copies it first."""
    output = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        for name, config in SMALL_PRESETS.items():
            patch.setitem(PRESETS, name, config)
        Trainer(small_run(meds_dir=folder, output=output, steps=2, save_every=1)).run()
    return output


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def changed(change) -> Callable[[Path], None]:
    """Saved anew with another content, and its checksum."""

    def damage(path: Path) -> None:
        state = load_checkpoint(path)
        change(state)
        torch.save(state | {"sha256": checksum(state)}, path)

    return damage


def with_nan(state: dict) -> None:
    next(iter(state["model"].values()))[0] = torch.nan


DAMAGES = {
    "truncated": (truncated, "cannot be read"),
    "flipped bit": (flipped, "is damaged: its checksum is not that of its contents"),
    "nan": (changed(with_nan), "weight 'encoder.embeddings.tokens.weight' has NaN or infinity"),
    "missing": (changed(lambda x: x.pop("tokens")), "tokens is missing"),
    "missing setting": (changed(lambda x: x["settings"].pop("task")), "settings.task is missing"),
    "unknown": (changed(lambda x: x.update(later=1)), "later is unknown: expected"),
    "unknown setting": (changed(lambda x: x["settings"].update(z=1)), "settings.z is unknown"),
    "unknown config": (changed(lambda x: x["config"].update(depth=1)), "argument 'depth'"),
    "kind": (changed(lambda x: x.update(step="2")), "step is '2': expected a whole number"),
    "format": (changed(lambda x: x.update(model=[])), "model is a list: expected named values"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_newest_that_is_intact_goes_on(two, folder, tmp_path, kind):
    output = Path(shutil.copytree(two, tmp_path / "out"))
    damage, message = DAMAGES[kind]
    damage(output / "step-00000002.pt")
    with pytest.raises(Damaged, match=message):
        load_checkpoint(output / "step-00000002.pt")
    lines: list[str] = []
    changes = {"output": output, "steps": 2, "save_every": 1, "keep": 1, "resume": True}
    trainer = Trainer(small_run(meds_dir=folder, **changes), say=lines.append)
    assert trainer.step == 1
    (line,) = lines
    assert "step-00000002.pt'" in line and "going on from step-00000001.pt" in line
    trainer.run()
    assert [path.name for path in checkpoints(output)] == ["step-00000002.pt"]
    assert_same_bits(two, output)


def test_a_flipped_bit_is_found_wherever_it_is(two, tmp_path):
    path = Path(shutil.copy(two / "step-00000002.pt", tmp_path))
    whole, expected = path.read_bytes(), checksum(load_checkpoint(path))
    found = 0
    for place in torch.rand(50).tolist():
        flipped(path, place)
        try:  # between the records of the file a bit means nothing
            assert checksum(load_checkpoint(path)) == expected
        except Damaged:
            found += 1
        path.write_bytes(whole)
    assert found > 25


def test_the_file_that_was_asked_for_is_refused(two, folder, tmp_path):
    path = Path(shutil.copy(two / "step-00000002.pt", tmp_path))
    flipped(path)
    with pytest.raises(ValueError, match="step-00000002.pt' is damaged"):
        Trainer(small_run(meds_dir=folder, output=tmp_path / "out", init=path))


def test_weights_of_another_model_are_named(two, folder, tmp_path):
    path = Path(shutil.copy(two / "step-00000002.pt", tmp_path))
    state = load_checkpoint(path)
    del state["model"]["encoder.embeddings.tokens.weight"]
    save_checkpoint(tmp_path, state, keep=9)
    with pytest.raises(ValueError, match="1 weights are not those .*tokens.weight missing"):
        Trainer(small_run(meds_dir=folder, output=tmp_path / "out", init=path))
    with pytest.raises(ValueError, match="1 weights are not those .*tokens.weight missing"):
        load_model(path)


def test_weights_that_are_not_finite_are_not_saved(settings, tmp_path):
    trainer = Trainer(settings(save_every=1))
    honest = trainer.optimiser.step

    def overflow():
        honest()
        if trainer.step == 1:
            next(trainer.model.parameters()).data[0] = torch.inf

    trainer.optimiser.step = overflow
    with pytest.raises(Diverged, match="step 2: a weight is not finite"):
        trainer.run()
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["step-00000001.pt"]


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


def test_metrics_outlive_a_kill_while_they_are_rewritten(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "train"}\n{"step": 9, "split": "train"}\n')
    before = path.read_text()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsFile(path, 2)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("line", ["[1]", '{"step": 1}', "{", "\x00", "[" * 100_000])
def test_metrics_of_something_else_are_named_but_for_a_torn_end(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    row = '{"step": 1, "split": "train"}\n'
    path.write_text(row + line)
    MetricsFile(path, 2)
    assert path.read_text() == row
    path.write_text(row + line + "\n" + row)
    with pytest.raises(ValueError, match="metrics.jsonl line 2: "):
        MetricsFile(path, 2)


def test_one_run_at_a_time_is_in_a_folder(settings, tmp_path):
    other = "import sys; from pathlib import Path; from clinattn.files.claims import claimed\n"
    other += "with claimed(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", other, str(tmp_path / "out")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout.readline() == "in\n"
        trainer = Trainer(settings(steps=1))
        with pytest.raises(ValueError, match="out': another run is in it: expected one at a time"):
            trainer.run()
        process.kill()
    (tmp_path / "out" / ".step-00000001.1.partial.pt").write_bytes(b"half")
    assert trainer.run() == 0
    assert not list((tmp_path / "out").glob("*.partial*"))
