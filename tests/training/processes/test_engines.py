"""DDP and shards: the numbers of one process, and checkpoints for any number of processes."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from needs import GLOO

pytest.importorskip("typer")
pytest.importorskip("pyarrow")
safetensors = pytest.importorskip("safetensors.torch")

from patients import write_patients  # noqa: E402
from ranked import Processes  # noqa: E402
from runs import rows_of, small_run  # noqa: E402

from clinattn.training.checkpoint import checkpoints, load_checkpoint, load_model  # noqa: E402
from clinattn.training.loop import Trainer  # noqa: E402
from clinattn.training.origin import resolve  # noqa: E402
from clinattn.training.settings import DEFAULT_LR  # noqa: E402

pytestmark = GLOO
STEPS = 6


@pytest.fixture(scope="module")
def processes():
    made = Processes(4)
    yield made
    made.end()


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Settings of six steps with what is given."""
    folder = write_patients(tmp_path_factory.mktemp("meds"))
    small = {"max_tokens": 48, "batch_tokens": 96, "accumulate": 4, "steps": STEPS, "save_every": 2}
    return partial(small_run, meds_dir=folder, keep=3, **small)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, processes, settings):
    """The folder of a run by number of ranks and dtype, made once."""
    made = {}

    def of(world, shard=False, dtype="float64"):
        key = world, shard, dtype
        if key not in made:
            made[key] = tmp_path_factory.mktemp("trained")
            processes.train(world, settings(shard=shard, dtype=dtype, output=made[key]))
        return made[key]

    return of


def assert_alike(one, two, tolerance):
    """Weights and metrics of two runs' ends, up to the order of sums."""
    a, b = (load_checkpoint(checkpoints(output)[-1]) for output in (one, two))
    assert a["step"] == b["step"] == STEPS and a["model"].keys() == b["model"].keys()
    for name, weight in a["model"].items():
        torch.testing.assert_close(weight, b["model"][name], rtol=0, atol=tolerance, msg=name)
    for row, other in zip(rows_of(one), rows_of(two), strict=True):
        assert row.pop("split") == other.pop("split")
        assert row == pytest.approx(other, rel=tolerance)


def test_shards_train_as_whole_models_do(trained):
    """fp64, for which Adam's division by tiny moments leaves eight digits."""
    assert_alike(trained(2), trained(2, shard=True), 1e-8)


def test_a_sharded_run_leaves_what_others_read(trained):
    output = trained(2, shard=True)
    origin = resolve(output)
    assert origin.path.name == f"step-{STEPS:08d}.pt" and not origin.damaged
    model, saved = load_model(origin.path)
    whole = safetensors.load_file(origin.path.with_suffix(".shards") / "model.safetensors")
    assert whole.keys() == model.state_dict().keys() and "optimiser" not in saved
    for name, weight in saved["model"].items():
        assert torch.equal(whole[name], weight), name
    kept = sorted(path.name for path in output.glob("step-*"))
    assert kept == [f"step-{n:08d}.{end}" for n in (2, 4, 6) for end in ("pt", "shards")]


@pytest.mark.parametrize(
    "before, after",
    [
        ((2, True), (1, False)),
        ((1, False), (2, True)),
        ((2, True), (4, True)),
        ((4, True), (2, False)),
    ],
    ids=["shards-one", "one-shards", "more-shards", "shards-whole"],
)
def test_runs_go_on_in_another_number_of_processes(
    before, after, trained, processes, settings, tmp_path
):
    output = tmp_path / "out"
    shutil.copytree(trained(*before), output)
    for path in output.glob(f"step-{STEPS:08d}.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    world, shard = after
    processes.train(world, settings(shard=shard, dtype="float64", output=output, resume=True))
    assert_alike(trained(1), output, 1e-8)


def test_damaged_shards_are_passed_over(trained, processes, settings, tmp_path):
    """The run goes on from the checkpoint before, to the bits of the run that was not damaged."""
    whole, output = trained(2, shard=True), tmp_path / "out"
    shutil.copytree(whole, output)
    (output / f"step-{STEPS:08d}.shards" / "__0_0.distcp").unlink()
    shard = output / "step-00000004.shards" / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    again = settings(shard=True, dtype="float64", output=output, resume=True)
    said = " ".join(processes.train(2, again))
    assert "lacks step-00000006.shards/__0_0.distcp" in said
    assert "step-00000004.shards/__1_0.distcp is damaged" in said
    assert "going on from step-00000002.pt, which is intact" in said
    assert rows_of(output) == rows_of(whole)
    a, b = (load_checkpoint(checkpoints(path)[-1])["model"] for path in (whole, output))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_bf16_in_shards(trained):
    """Norms of layers are bf16, too; else the sums are those of autocast on whole models."""
    one, two = (rows_of(trained(2, shard, "bfloat16")) for shard in (False, True))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2**-8)


EPSILON = 1e-8  # of AdamW


def rounding(trainer, lr, u):
    """Bounds by name on what another order of the sums over batches changes in the first step.

    A sum of A terms has an error of (A - 1) u times the sum of their sizes, in either order; the
    norm that clips is a sum over all weights. AdamW's first step is lr g / (|g| + epsilon), whose
    slope is epsilon / (|g| + epsilon)^2, and which is 1 at the most.
    """
    parameters = dict(trainer.model.named_parameters())
    sizes = {name: torch.zeros_like(p) for name, p in parameters.items()}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}

    @contextmanager
    def microbatch(last):
        before = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        yield
        for name, p in parameters.items():
            sizes[name] += (p.grad - before.get(name, 0)).abs()
            sums[name].copy_(p.grad)

    trainer.engine.microbatch = microbatch
    trainer.advance(1)
    largest = max(sums, key=lambda name: sums[name].abs().sum())
    scale = float(parameters[largest].grad.abs().sum() / sums[largest].abs().sum())
    count = sum(p.numel() for p in parameters.values())
    batches = trainer.settings.accumulate
    bounds = {}
    for name, p in parameters.items():
        g = p.grad.abs()
        change = 2 * (batches - 1) * u * scale * sizes[name] + 2 * count * u * g
        slope = EPSILON / ((g - change).clamp(min=0) + EPSILON) ** 2
        bounds[name] = lr * (slope * change).clamp(max=2) + 16 * u * (lr + p.abs())
    return bounds


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_another_number_of_processes_changes_no_more_than_the_order_of_sums(
    dtype, processes, settings, tmp_path, threads
):
    threads(1)
    outputs = {ranks: tmp_path / str(ranks) for ranks in (1, 2, 4)}
    for ranks, output in outputs.items():
        once = replace(settings(dtype=dtype, output=output), steps=1, warmup=0.0)
        processes.train(ranks, once)
    saved = {ranks: load_checkpoint(checkpoints(o)[-1])["model"] for ranks, o in outputs.items()}
    u = torch.finfo(getattr(torch, dtype)).eps / 2
    bounds = rounding(Trainer(replace(once, output=tmp_path / "by-hand")), DEFAULT_LR, u)
    for ranks in (2, 4):
        for name, bound in bounds.items():
            assert ((saved[ranks][name] - saved[1][name]).abs() <= bound).all(), (ranks, name)


def test_an_error_of_rank_0_ends_the_others_at_once(trained, processes, settings):
    """Two lines would say it twice; none would leave the others waiting."""
    found = processes.failing(2, settings(dtype="float64", output=trained(2)))
    assert "ValueError: output=" in found[0] and "expected resume, or another" in found[0]
    assert "FirstFailed: output=" in found[1] and "ValueError" not in found[1]
