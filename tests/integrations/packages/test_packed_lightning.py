"""Lightning over packed rows, in one process and in two."""

from itertools import chain

import pytest
import torch

for package in ("transformers", "lightning"):
    pytest.importorskip(package)

import packed_rows  # noqa: E402
import trained  # noqa: E402

from clinattn.integrations.trainer import (  # noqa: E402
    PackedDataLoader,
    PackingCollator,
    TokenBudgetSampler,
    per_sequence,
)


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_a_module_learns_as_by_hand_and_goes_on(name, tmp_path):
    whole = trained.lightning_run(tmp_path, name)
    assert whole["read"] == trained.read_by(0, 1)
    trained.assert_weights_close(whole["weights"], name, 1, accumulate=1)
    checkpoint = tmp_path / f"step={whole['steps'] + 2}.ckpt"  # in the second epoch
    resumed = trained.lightning_run(tmp_path, name, str(checkpoint))
    assert resumed["read"] == whole["read"][-len(resumed["read"]) :] != whole["read"]
    for weight, x in whole["weights"].items():
        assert torch.equal(resumed["weights"][weight], x)


def test_two_processes(tmp_path):
    """A process has its share, whatever use_distributed_sampler says."""
    steps = len(trained.batches(2, 0))
    two = {"devices": 2}
    ranks = trained.in_two_processes(
        tmp_path,
        ("lightning_run", (tmp_path / "one", "bert"), two),
        ("lightning_run", (tmp_path / "two", "bert"), two | {"flag": False}),
        (
            "lightning_run",
            (tmp_path / "one", "bert", str(tmp_path / "one" / f"step={steps + 2}.ckpt")),
            two,
        ),
    )
    for rank, (whole, without, resumed) in enumerate(ranks):
        assert whole["read"] == without["read"] == trained.read_by(rank, 2)
        assert resumed["read"] == whole["read"][-len(resumed["read"]) :] != whole["read"]
        for weight, x in whole["weights"].items():
            assert torch.equal(resumed["weights"][weight], x)
        trained.assert_weights_close(whole["weights"], "bert", 2, accumulate=1)


def test_predict_gives_sequences_in_the_order_of_the_dataset(tmp_path):
    import lightning

    model = packed_rows.model("bert", trained.HEAD).eval()
    collate = PackingCollator(model)

    class Module(lightning.LightningModule):
        def predict_step(self, batch, index):
            return [x["logits"] for x in per_sequence(model(**batch), batch)]

    sampler = TokenBudgetSampler(trained.lengths(), trained.MAX_TOKENS, shuffle=False)
    loader = PackedDataLoader(trained.rows(), batch_sampler=sampler, collate_fn=collate)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    predicted = list(chain(*trainer.predict(Module(), loader)))
    assert len(predicted) == trained.COUNT
    for row, x in zip(trained.rows(), predicted, strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([row["input_ids"]])).logits[0]
        torch.testing.assert_close(x, alone)


def test_predict_in_several_processes_is_refused():
    class Wrapped:  # as Lightning's predict wraps a sampler
        def __init__(self, sampler):
            self._batch_sampler = sampler

    sampler = TokenBudgetSampler(trained.lengths(), trained.MAX_TOKENS, num_replicas=2)
    with pytest.raises(NotImplementedError, match="predict of Lightning .* is for one process"):
        PackedDataLoader(trained.rows(), batch_sampler=Wrapped(sampler))
