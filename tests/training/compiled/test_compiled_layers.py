"""`--compile`: a graph for each kind of layer, and none for each batch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("pyarrow")

from patients import write_measured_patients  # noqa: E402
from runs import small_run  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

from clinattn.encoder import PRESETS  # noqa: E402
from clinattn.training.loop import Trainer  # noqa: E402

pytestmark = pytest.mark.unpoisoned  # compilers allocate through torch.empty themselves


@pytest.mark.parametrize(
    "given",
    [
        {"preset": "timed-causal", "task": "clm"},
        {"dtype": "bfloat16"},
        {"recompute": True},
    ],
    ids=["times", "bfloat16", "recompute"],
)
def test_batches_of_all_lengths_share_two_graphs(
    given, tmp_path, threads, small_presets, monkeypatch
):
    """Full layers have one, local layers the other; the loss goes as it does without a compiler.

    In fp64, and without dropout, which draws other numbers in a graph.
    """
    threads(1)
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    name, exact = given.get("preset", "tiny"), "dtype" not in given
    still = dict.fromkeys(("embedding_dropout", "hidden_dropout", "attention_dropout"), 0.0)
    monkeypatch.setitem(PRESETS, name, replace(PRESETS[name], **still))
    given = {"dtype": "float64"} | given
    folder = write_measured_patients(tmp_path / "meds")
    losses = []
    for compile in (True, False):
        settings = small_run(meds_dir=folder, output=tmp_path / "out", compile=compile, **given)
        trainer = Trainer(settings)
        trainer._record = lambda row: losses.append(row["loss"])
        trainer.advance(1)
        if compile:
            graphs = counters["stats"]["unique_graphs"]
        with torch._dynamo.config.patch(error_on_recompile=True):
            trainer.advance(7)
    assert graphs == counters["stats"]["unique_graphs"] == 2
    assert losses[:8] == pytest.approx(losses[8:], rel=1e-9 if exact else 2**-8)
    torch._dynamo.reset()
