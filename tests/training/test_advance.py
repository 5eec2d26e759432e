"""Steps by hand: the weights of a run, from any weights, with the tokens that they took."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pyarrow")

from patients import write_patients  # noqa: E402
from runs import rows_of, small_run  # noqa: E402

from clinattn.training.checkpoint import checkpoints, load_checkpoint  # noqa: E402
from clinattn.training.loop import Trainer  # noqa: E402


@pytest.fixture
def made(tmp_path, threads, small_presets):
    threads(1)
    folder = write_patients(tmp_path / "meds")
    return lambda name: Trainer(small_run(data=f"meds:{folder}", output=tmp_path / name))


def test_steps_in_parts_are_those_of_a_run(made, tmp_path):
    trainer, state = made("by-hand"), torch.get_rng_state()
    tokens = [trainer.advance(n) for n in (3, 0, 5)]
    assert torch.equal(state, torch.get_rng_state()) and not (tmp_path / "by-hand").exists()
    made("run").run()
    trained = [row for row in rows_of(tmp_path / "run") if row["split"] == "train"]
    assert tokens[1] == 0 and sum(tokens) == trainer.tokens == sum(r["tokens"] for r in trained)
    saved = load_checkpoint(checkpoints(tmp_path / "run")[-1])
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, saved["model"][name]), name


def test_weights_are_taken_by_name_and_all_of_them(made):
    one, two = made("one"), made("two")
    one.advance(2)
    two.load_weights(one.model.state_dict())
    for name, weight in two.model.state_dict().items():
        assert torch.equal(weight, one.model.state_dict()[name]), name
    some = dict(list(one.model.state_dict().items())[1:])
    with pytest.raises(ValueError, match="load_weights: 1 weights are not those of the model"):
        two.load_weights(some)


@pytest.mark.parametrize("steps", [-1, 9])
def test_no_more_steps_than_the_settings_have(made, steps):
    with pytest.raises(ValueError, match=f"steps={steps}: expected 0 to 8"):
        made("one").advance(steps)
