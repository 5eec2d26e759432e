"""Layers that are computed again in the backward pass: the same bits, and less that is kept."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pyarrow")

from patients import write_measured_patients  # noqa: E402
from runs import small_run  # noqa: E402
from torch.autograd.graph import saved_tensors_hooks  # noqa: E402

from clinattn.training.loop import Trainer  # noqa: E402


@pytest.fixture
def made(tmp_path, threads, small_presets):
    threads(1)
    folder = write_measured_patients(tmp_path / "meds")
    return lambda **given: Trainer(small_run(meds_dir=folder, output=tmp_path / "out", **given))


def kept(trainer):
    """Bytes that a step keeps for its backward pass at the most, each storage once."""
    held, most = {}, 0

    class Held:
        def __init__(self, x):
            self.x, self.key = x, x.untyped_storage().data_ptr()
            count, size = held.get(self.key, (0, x.untyped_storage().nbytes()))
            held[self.key] = count + 1, size
            nonlocal most
            most = max(most, sum(size for _, size in held.values()))

        def __del__(self):
            count, size = held.pop(self.key)
            if count > 1:
                held[self.key] = count - 1, size

    with saved_tensors_hooks(Held, lambda held: held.x):
        trainer.advance(1)
    return most


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", ["tiny", "timed-valued"])
def test_recomputed_layers_have_the_same_bits(preset, dtype, made):
    """With dropout of attention, layers and embeddings, and local layers."""
    one, two = (
        made(preset=preset, dtype=dtype, accumulate=2, recompute=recompute)
        for recompute in (False, True)
    )
    one.advance(4)
    two.advance(4)
    for name, weight in one.model.state_dict().items():
        assert torch.equal(weight, two.model.state_dict()[name]), name


def test_recomputed_layers_keep_less(made):
    """Of three layers, the inside of one at a time and the input of each are kept."""
    whole, less = (kept(made(recompute=recompute)) for recompute in (False, True))
    assert less < whole / 2
