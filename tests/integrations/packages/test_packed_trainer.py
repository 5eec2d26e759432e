"""transformers' Trainer over packed rows, in one process and in two."""

from contextlib import nullcontext
from itertools import count

import numpy as np
import pytest
import torch

for package in ("transformers", "accelerate"):
    pytest.importorskip(package)

import packed_rows  # noqa: E402
import trained  # noqa: E402
import transformers  # noqa: E402
from support import assert_close  # noqa: E402

from clinattn.integrations.trainer import PackedTrainer, PackingCollator  # noqa: E402
from clinattn.tools.model_report.parity import InDouble  # noqa: E402

MODELS = ("bert", "modernbert")


@pytest.mark.parametrize("name", MODELS)
def test_it_learns_as_by_hand_over_padded_rows(name, tmp_path):
    """Two rows to a step, of different numbers of labels: the mean is over all of them.

    BERT's loss is the mean of a row and ModernBERT's reads num_items_in_batch.
    """
    found = trained.transformers_run(tmp_path, name)
    assert found["read"] == trained.read_by(0, 1)
    trained.assert_weights_close(found["weights"], name, 1)
    wrong = trained.by_hand(name, 1, torch.float64, tokens=False)
    truth = trained.by_hand(name, 1, torch.float64)
    with pytest.raises(AssertionError):  # the test would notice
        for weight in truth:
            assert_close(weight, wrong[weight].float(), truth[weight], truth[weight])


@pytest.mark.parametrize("name", MODELS)
def test_it_resumes_within_an_epoch_to_the_same_bits(name, tmp_path):
    """With dropout, whose random numbers are saved, in the middle of the second epoch."""
    saved = {"save_strategy": "steps", "save_steps": 1}
    whole = trained.transformers_run(tmp_path / "whole", name, dropout=True, **saved)
    steps = len(trained.batches(1, 0))
    place = -(-steps // trained.ACCUMULATE) + 2
    checkpoint = tmp_path / "whole" / f"checkpoint-{place}"
    resumed = trained.transformers_run(tmp_path / "resumed", name, str(checkpoint), dropout=True)
    assert resumed["weights"].keys() == whole["weights"].keys()
    for weight, x in whole["weights"].items():
        assert torch.equal(resumed["weights"][weight], x)
    assert len(resumed["read"]) < len(whole["read"])
    assert whole["read"][-len(resumed["read"]) :] == resumed["read"]


def expected_results(name, head, weights, dtype):
    """Logits of each sequence alone, and the mean loss over all labels."""
    model = packed_rows.model(name, head, False, dtype).eval()
    model.load_state_dict(weights)
    data = packed_rows.features(head, trained.COUNT)
    context = InDouble() if dtype == torch.float64 else nullcontext()
    with torch.no_grad(), context:
        logits = [model(**packed_rows.padded([row])).logits[0].double() for row in data]
    labels = [torch.tensor(row["labels"]) for row in data]
    pairs = [
        (x.reshape(-1, x.shape[-1]), y.reshape(-1)) for x, y in zip(logits, labels, strict=True)
    ]
    x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return logits, torch.nn.functional.cross_entropy(x, y)[None], labels


def assert_evaluated(found, name, head):
    weights = {x: y.double() for x, y in found["weights"].items()}
    truth, loss, labels = expected_results(name, head, weights, torch.float64)
    naive, naive_loss, _ = expected_results(name, head, found["weights"], torch.float32)
    predicted = found["predicted"]
    assert len(predicted.predictions) == len(predicted.label_ids) == trained.COUNT
    rows = []
    for row, label, given, x in zip(
        predicted.predictions, predicted.label_ids, labels, truth, strict=True
    ):
        n = len(x)
        assert (row[n:] == -100).all()
        if given.dim():
            assert (label[n:] == -100).all() and label[:n].tolist() == given.tolist()
        else:
            assert label == given
        rows.append(torch.from_numpy(row[:n]))
    assert_close("logits", torch.cat(rows), torch.cat(truth), torch.cat(naive))
    # a loss differs by twice the largest difference of a logit at most
    within = 2 * (torch.cat(naive) - torch.cat(truth)).abs().max() * 2 + 1e-6
    for metrics, prefix in ((predicted.metrics, "test"), (found["evaluated"], "eval")):
        assert abs(metrics[f"{prefix}_loss"] - loss) < within
        assert metrics[f"{prefix}_rows"] == trained.COUNT


@pytest.mark.parametrize("head", ["TokenClassification", "SequenceClassification"])
@pytest.mark.parametrize("name", MODELS)
def test_results_are_of_sequences_in_the_order_of_the_dataset(name, head, tmp_path):
    found = trained.transformers_run(tmp_path, name, head=head, evaluate=True, num_train_epochs=1)
    assert_evaluated(found, name, head)


def test_two_processes(tmp_path):
    """A process has its share, weights are those of steps over both, and a checkpoint goes on."""
    place = -(-len(trained.batches(2, 0)) // trained.ACCUMULATE) + 1  # in the second epoch
    saved = {"save_strategy": "steps", "save_steps": place}
    sequences = {"head": "SequenceClassification", "evaluate": True, "num_train_epochs": 1}
    ranks = trained.in_two_processes(
        tmp_path,
        ("transformers_run", (tmp_path / "bert", "bert"), {"evaluate": True, **saved}),
        (
            "transformers_run",
            (tmp_path / "resumed", "bert"),
            {"resume": str(tmp_path / "bert" / f"checkpoint-{place}")},
        ),
        ("transformers_run", (tmp_path / "sequences", "modernbert"), sequences),
    )
    for rank, (whole, resumed, of_sequences) in enumerate(ranks):
        assert whole["read"] == trained.read_by(rank, 2)
        assert resumed["read"] == whole["read"][-len(resumed["read"]) :] != whole["read"]
        for weight, x in whole["weights"].items():
            assert torch.equal(resumed["weights"][weight], x)
        trained.assert_weights_close(whole["weights"], "bert", 2)
        assert_evaluated(whole, "bert", trained.HEAD)
        assert_evaluated(of_sequences, "modernbert", "SequenceClassification")


def trainer(folder, head="TokenClassification", data=None, collator=None, words=None, **more):
    model = packed_rows.model("bert", head)
    data = packed_rows.features(head) if data is None else data
    arguments = trained.arguments(folder, **more)
    made = {"max_tokens": 64} | (words or {})
    return PackedTrainer(model, arguments, collator, train_dataset=data, **made)


def test_bf16_and_workers_and_label_smoothing(tmp_path):
    """bf16 as autocast rounds: the losses are those of fp32 to two digits."""
    losses = []
    for more in ({}, {"bf16": True}, {"dataloader_num_workers": 2}):
        losses.append(trainer(tmp_path, num_train_epochs=1, **more).train().training_loss)
    assert losses[0] == losses[2]
    assert losses[1] == pytest.approx(losses[0], rel=2**-6)
    smoothed = trainer(tmp_path, num_train_epochs=1, label_smoothing_factor=0.1)
    assert np.isfinite(smoothed.train().training_loss)


def test_a_row_without_labels_counts_nothing(tmp_path):
    data = packed_rows.features(trained.HEAD)
    for row in data[:6]:
        row["labels"] = [-100] * len(row["labels"])
    assert np.isfinite(
        trainer(tmp_path, data=data, logging_nan_inf_filter=False).train().training_loss
    )


def test_masks_are_drawn_and_columns_left_out(tmp_path):
    calls = count()

    def collate(rows):
        assert all(x.keys() == {"input_ids", "labels"} for x in rows)
        next(calls)
        return packed_rows.padded(rows)

    data = [{**x, "note": "text"} for x in packed_rows.features(trained.HEAD)]
    made = trainer(tmp_path, data=data, collator=collate, num_train_epochs=1)
    made.train()
    assert isinstance(made.data_collator, PackingCollator) and next(calls) > 2


@pytest.mark.parametrize(
    "more, words, error, message",
    [
        ({"train_sampling_strategy": "group_by_length"}, {}, ValueError, "no padding to save"),
        ({"auto_find_batch_size": True}, {}, ValueError, "lower max_tokens"),
        ({"accelerator_config": {"split_batches": True}}, {}, ValueError, "cut rows into pieces"),
        ({"accelerator_config": {"dispatch_batches": True}}, {}, ValueError, "cut rows"),
        ({"include_for_metrics": ["inputs"]}, {}, NotImplementedError, "'inputs'"),
        ({}, {"model_init": lambda: None}, ValueError, "model_init: expected a model"),
    ],
)
def test_what_packed_rows_do_not_go_with_is_refused(more, words, error, message, tmp_path):
    with pytest.raises(error, match=message):
        trainer(tmp_path, words=words, **more)


def test_data_are_checked_before_training(tmp_path):
    with pytest.raises(ValueError, match="has 40 tokens, over max_tokens=30"):
        trainer(tmp_path, words={"max_tokens": 30}).train()
    trainer(tmp_path, words={"max_tokens": 30, "max_length": 30}, num_train_epochs=1).train()

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(packed_rows.features(trained.HEAD))

    with pytest.raises(ValueError, match="expected a map-style dataset"):
        trainer(tmp_path, data=Stream(), max_steps=2).train()


def test_another_trainer_is_served_too(tmp_path):
    from clinattn.integrations.trainer import PackedBatches

    class Theirs(transformers.Trainer):
        losses = ()

        def log(self, logs, *args, **words):
            self.losses = (*self.losses, logs)
            super().log(logs, *args, **words)

    class Mine(PackedBatches, Theirs):
        pass

    made = Mine(
        packed_rows.model("bert", trained.HEAD), trained.arguments(tmp_path, num_train_epochs=1),
        train_dataset=trained.rows(), max_tokens=64,
    )  # fmt: skip
    made.train()
    assert made.losses
