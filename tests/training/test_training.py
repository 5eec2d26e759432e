"""The training loop: it goes on from a checkpoint to the same bits, and ends on signals."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("pyarrow")

from patients import write_measured_patients, write_patients  # noqa: E402
from runs import assert_same_bits, rows_of, small_run  # noqa: E402

from clinattn.training.checkpoint import checkpoints, load_checkpoint, load_model  # noqa: E402
from clinattn.training.loop import Diverged, Trainer  # noqa: E402

pytestmark = pytest.mark.usefixtures("small_presets")

TASKS = ["mlm", "classify", "clm"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_patients(tmp_path_factory.mktemp("meds"), patients=60)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return write_measured_patients(tmp_path_factory.mktemp("measured"))


@pytest.fixture
def settings(folder, tmp_path):
    return partial(small_run, meds_dir=folder, output=tmp_path / "out")


def stop_at(step: int, number: int):
    """A progress callback that raises a signal in the middle of training."""

    def progress(message: str, done: int, total: int) -> None:
        if message.startswith("training") and done == step:
            signal.raise_signal(number)

    return progress


KINDS = {
    "mlm": {},
    "classify": {"task": "classify"},
    "clm": {"task": "clm"},
    "times": {"task": "clm", "preset": "timed-causal"},
    "values": {"preset": "valued"},
    "pairs": {"preset": "typed", "nsp": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["sigint", "sigterm"])
def test_an_interrupted_run_goes_on_to_the_bits_of_one_that_was_not(
    settings, measured, tmp_path, kind, number
):
    given = KINDS[kind] | ({"meds_dir": measured} if kind in ("times", "values") else {})
    whole = settings(**given, output=tmp_path / "whole", accumulate=2, dtype="bfloat16")
    assert Trainer(whole).run() == 0
    part = replace(whole, output=tmp_path / "part")
    before = signal.getsignal(number)
    assert Trainer(part, progress=stop_at(3, number)).run() == number
    assert signal.getsignal(number) is before
    assert [path.name for path in checkpoints(tmp_path / "part")] == ["step-00000003.pt"]
    torch.manual_seed(99)  # nothing of the process may count
    assert Trainer(replace(part, resume=True)).run() == 0
    assert_same_bits(tmp_path / "whole", tmp_path / "part")


def test_a_killed_run_goes_on_from_its_last_checkpoint(settings, tmp_path):
    whole = settings(output=tmp_path / "whole", save_every=3)
    Trainer(whole).run()
    killed = replace(whole, output=tmp_path / "part")

    def kill(message, done, total):
        if message.startswith("training") and done == 5:
            raise MemoryError

    with pytest.raises(MemoryError):
        Trainer(killed, progress=kill).run()
    with (tmp_path / "part" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "sp')  # torn
    assert Trainer(replace(killed, resume=True)).run() == 0
    assert_same_bits(tmp_path / "whole", tmp_path / "part")
    assert [path.name for path in checkpoints(tmp_path / "part")] == [
        "step-00000006.pt",
        "step-00000008.pt",
    ]


@pytest.fixture
def interruptible():
    """SIGINT raises, also where this process was started with the signal ignored (nohup, &)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_ends_at_once(settings, interruptible):
    def twice(message, done, total):
        if message.startswith("training"):
            signal.raise_signal(signal.SIGINT)  # in this thread: two to the process can be one
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Trainer(settings(), progress=twice).run()


def test_a_run_leaves_the_process_its_random_state(settings):
    before = torch.get_rng_state()
    Trainer(settings(steps=1)).run()
    assert torch.equal(torch.get_rng_state(), before)


def test_metrics_have_a_row_for_each_step_and_evaluation(settings, tmp_path):
    Trainer(settings()).run()
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 9))
    assert [row["step"] for row in rows if row["split"] == "held_out"] == [0, 3, 6, 8]
    for row in rows:
        wanted = {"lr", "tokens", "tokens_per_s", "grad_norm"} if row["split"] == "train" else set()
        assert {"step", "split", "loss"} | wanted <= row.keys()
    assert all(64 < row["tokens"] <= 128 for row in rows if row["split"] == "train")


def test_fine_tuning_starts_from_the_pretrained_encoder(settings, tmp_path):
    Trainer(settings(output=tmp_path / "mlm", steps=2, min_count=1)).run()
    source = checkpoints(tmp_path / "mlm")[-1]
    trained, state = load_model(source)
    trainer = Trainer(settings("classify", init=source, steps=2))
    assert trainer.corpus.tokens == state["tokens"] and not trained.training
    for name, weight in trained.encoder.state_dict().items():
        assert torch.equal(weight, trainer.model.encoder.state_dict()[name]), name
    trainer.run()
    tuned, state = load_model(checkpoints(tmp_path / "out")[-1])
    assert state["classes"] == ("absent", "present") and tuned.classifier.out_features == 2
    source.unlink()  # a resumed run does not need it
    assert Trainer(settings("classify", init=source, steps=2, resume=True)).step == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "clinicalbert"}, "preset='clinicalbert': expected 'tiny' as in the checkpoint"),
        ({"held_out": 0.3}, "held_out=0.3: expected at most 0.2 .* has seen the others"),
    ],
    ids=["preset", "held_out"],
)
def test_fine_tuning_is_refused_where_it_would_mislead(settings, tmp_path, changes, message):
    Trainer(settings(output=tmp_path / "mlm", steps=1)).run()
    with pytest.raises(ValueError, match=message):
        Trainer(settings("classify", init=checkpoints(tmp_path / "mlm")[-1], **changes))


@pytest.mark.parametrize("task", ["mlm", "classify"])
def test_a_causal_encoder_goes_on_as_a_classifier_by_its_last_token_and_as_no_other(
    settings, tmp_path, task
):
    Trainer(settings("clm", output=tmp_path / "clm", steps=1)).run()
    init = checkpoints(tmp_path / "clm")[-1]
    if task == "mlm":
        with pytest.raises(ValueError, match="task='mlm': the encoder has causal=True"):
            Trainer(settings(init=init))
    else:
        assert Trainer(settings("classify", init=init)).config.pooling == "last"


def test_evaluation_changes_no_weight_and_drops_nothing_out(settings, tmp_path):
    for every in (1, 100):
        Trainer(settings(output=tmp_path / str(every), eval_every=every)).run()
    often, seldom = (load_checkpoint(checkpoints(tmp_path / n)[-1]) for n in ("1", "100"))
    for name, weight in often["model"].items():
        assert torch.equal(weight, seldom["model"][name]), name
    last = rows_of(tmp_path / "1")[-1]
    assert last == rows_of(tmp_path / "100")[-1]
    model, _ = load_model(checkpoints(tmp_path / "1")[-1])
    objective = Trainer(settings()).objective
    whole = objective.batch(list(range(len(objective.corpus.held_out))), -1, torch.device("cpu"))
    assert float(whole.run(model).loss.detach()) == pytest.approx(last["loss"], rel=1e-5)


def test_masks_are_drawn_anew_each_epoch_and_once_for_the_held_out(settings):
    objective = Trainer(settings()).objective
    device = torch.device("cpu")
    drawn = [objective.batch([3, 1], epoch, device) for epoch in (0, 1, 0, -1, -1)]
    assert torch.equal(drawn[0].ids, drawn[2].ids) and torch.equal(drawn[3].ids, drawn[4].ids)
    assert not torch.equal(drawn[0].ids, drawn[1].ids)


def test_bfloat16_computes_in_it_and_keeps_weights_and_moments_in_fp32(settings):
    trainer = Trainer(settings(dtype="bfloat16", steps=1))
    seen = set()
    trainer.model.encoder.layers[1].attention.qkv.register_forward_hook(
        lambda module, given, out: seen.add(out.dtype)
    )
    trainer.run()
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    moments = [state["exp_avg"].dtype for state in trainer.optimiser.state.values()]
    assert set(moments) == {torch.float32}


@pytest.mark.parametrize("kind", ["mlm", "classify", "clm", "pairs"])
def test_batches_count_by_their_labels_however_they_are_accumulated(settings, tmp_path, kind):
    """The gradient is that of one mean over all labels of each loss; fp64, without dropout."""
    given = KINDS[kind] | {"accumulate": 8, "steps": 1, "clip": 0, "dtype": "float64"}
    trainer = Trainer(settings(**given, max_tokens=30))
    model = trainer.model.eval()
    model.train = lambda mode=True: model
    drawn = [trainer.batches.next() for _ in range(8)]
    trainer.batches.seek(0, 0)
    losses, labels = [], []
    for epoch, indices in drawn:
        batch = trainer.objective.batch(indices, epoch, trainer.device)
        means = torch.stack(batch.run(model).losses)
        losses.append(means * torch.tensor(batch.labels))
        labels.append(batch.labels)
    counts = torch.tensor(labels)
    assert all(len(count.unique()) > 1 for count in counts.T)
    total = (sum(losses) / counts.sum(0)).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    truth = torch.autograd.grad(total, parameters)
    trainer.run()
    for parameter, expected in zip(parameters, truth, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-11, atol=1e-14)
    row = rows_of(tmp_path / "out")[1]
    assert row["loss"] == pytest.approx(float(total.detach()), rel=1e-12)
    norm = torch.stack([g.square().sum() for g in truth]).sum().sqrt()
    assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-11)


def test_clipping_scales_the_gradient_down_and_never_up(settings, tmp_path):
    norms = []
    for clip in (0.0, 1e-3, 1e6):
        trainer = Trainer(settings(output=tmp_path / str(clip), steps=1, clip=clip))
        trainer.run()
        grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
    assert norms[0] == norms[2] and norms[1] == pytest.approx(1e-3, rel=1e-4) and norms[0] > 1e-2


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(settings, tmp_path):
    trainer = Trainer(settings(save_every=1))
    with torch.no_grad():
        trainer.model.encoder.embeddings.tokens.weight[5:] = float("inf")
    with pytest.raises(Diverged, match="step 1: loss nan"):
        trainer.run()
    assert not checkpoints(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "nsp"}, r"task='nsp': expected one of \('mlm', 'clm', 'classify'\)"),
        ({"preset": "huge"}, "preset='huge': expected one of"),
        ({"dtype": "float16"}, "dtype='float16': expected one of"),
        ({"device": "tpu"}, "device='tpu': expected one of"),
        ({"steps": 0}, "steps=0: expected at least 1"),
        ({"accumulate": 0}, "accumulate=0: expected at least 1"),
        ({"held_out": 1.0}, "held_out=1.0: expected 0 < x < 1"),
        ({"mask_share": 0.0}, "mask_share=0.0: expected 0 < x < 1"),
        ({"max_tokens": 1}, "max_tokens=1: expected at least 2"),
        ({"nsp": True, "max_tokens": 4}, "max_tokens=4: expected at least 5 with nsp"),
        ({"nsp": True, "task": "clm"}, "nsp=True: expected False for task='clm'"),
        ({"batch_tokens": 63}, "batch_tokens=63: expected at least max_tokens"),
        ({"lr": 0.0}, "lr=0.0: expected more than 0"),
        ({"lr": float("nan")}, "lr=nan: expected more than 0"),
        ({"warmup": 2.0}, "warmup=2.0: expected 0 <= x <= 1"),
        ({"clip": -1.0}, "clip=-1.0: expected at least 0"),
        ({"data": None}, "data: got none, expected meds:DIR"),
        ({"text_file": "a.csv"}, "got both, expected exactly one"),
        ({"tokenizer": "t.json"}, "tokenizer: expected only with text_file"),
        ({"label_code": "ICU*"}, r"label_code='ICU\*' for task='mlm': expected with task"),
        ({"task": "classify"}, "label_code and labels: got neither, expected one of them"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if type(value) is dict else "",
)
def test_bad_settings_are_named(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(settings(), **changes)
