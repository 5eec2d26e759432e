"""The calls of each stage of run.py, on CPU tensors: which kernels a run launches.

    for call in calls("speed"):
        call()

Kernels are compiled for types, alignment, constants, and whether a size is 1 or divides by 16. So
sizes are those of the device, except where the kernel cannot tell: fewer sequences in a batch,
memory that nobody fills. A stage registers in STAGES with a function that yields its calls.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import gpu.bits
import gpu.candidates
import gpu.checks
import gpu.clinical
import gpu.dense_shapes
import gpu.numerics
import gpu.summaries
import gpu.sweep
from clinattn import fused_attention
from clinattn.backends.call import Arguments
from clinattn.backends.select import implementation
from clinattn.kernels import launch
from gpu.providers import without_gradients
from gpu.table_of_cases import Problem
from gpu.tiles import MASKS, Tile, tile_of
from gpu.training import LENGTHS, MODEL_WIDTH, calls_of_stage, gradients, inputs, training_calls

if TYPE_CHECKING:
    from clinattn.tools.benchmark.variants import Runner, Variant
    from clinattn.tools.benchmark.workload import MaskedExample

Call = Callable[[], Any]

CPU = torch.device("cpu")
RUN = SimpleNamespace(device=CPU, dryrun=False, backends=["triton"])
PRESETS = ("bioclinical-modernbert-base",)  # ModernBERT base has the same sizes
# Lengths of a packed or padded batch. Tokens are part of padded strides, which divide by 16 or not.
ENCODER_LENGTHS = ((700, 324), (710, 290), (510, 354), (485, 300), (20, 9))


def calls(stage: str) -> Iterator[Call]:
    """The calls of a stage, the ones that matter most first."""
    return STAGES[stage]()


def both_passes(call: Callable[..., Tensor], tensors: list[Tensor], do: Tensor) -> Iterator[Call]:
    """Inference, then a forward pass with its backward pass."""
    yield functools.partial(without_gradients(call), *tensors)
    yield functools.partial(gradients, call, *tensors, do)


def first_call() -> Iterator[Call]:
    yield from both_passes(ours(), *split(inputs(CPU, 1, 1, 16, 16)))


def speed() -> Iterator[Call]:
    for shape in gpu.dense_shapes.shapes(dryrun=False):
        window = 128 if shape.mask == "window128" else None
        call = ours(is_causal=shape.mask == "causal", window=window)
        yield from both_passes(call, *split(empty(shape.batch, shape.heads, shape.n, shape.dim)))


def clinical() -> Iterator[Call]:
    """The longest sequence decides about strides; three more stand for the rest of the batch."""
    from clinattn.workloads import sample_lengths

    for profile, count, cap, window in gpu.clinical.BATCHES:
        lengths = torch.as_tensor(sample_lengths(profile, count, cap))
        lengths = torch.cat([lengths.max()[None], lengths[:3]])
        for dim in (64, 128):
            batch = gpu.clinical.ClinicalBatch(lengths, MODEL_WIDTH // dim, dim, window, RUN)
            for provider in batch.of_ours("triton").values():
                yield from both_passes(provider.call, list(provider.tensors), provider.do)


def encoder() -> Iterator[Call]:
    """Training and inference of `clinattn bench`, of one global and one local layer."""
    from clinattn.encoder import MaskedLanguageModel
    from clinattn.tools.benchmark.run import encoder_config
    from clinattn.tools.benchmark.variants import VARIANTS, Runner

    for preset in PRESETS:
        settings = SimpleNamespace(preset=preset, full_attention=False, max_tokens=8192)
        config = encoder_config(settings, num_layers=2, windows=(None, 64), vocab_size=1024)
        runner = Runner(MaskedLanguageModel(config).bfloat16(), CPU)
        for lengths in ENCODER_LENGTHS:
            examples = [example(n) for n in lengths]
            for variant in VARIANTS:
                yield as_on_device(functools.partial(training_step, runner, variant, examples))
                yield as_on_device(functools.partial(runner.infer, variant, examples))


def training_step(runner: Runner, variant: Variant, examples: list[MaskedExample]) -> None:
    """A step without its optimizer, whose kernels are torch's."""
    runner.loss(variant, examples)[0].backward()


def example(n: int) -> MaskedExample:
    from clinattn.tools.benchmark.workload import MaskedExample

    ids = torch.full((n,), 7)
    return MaskedExample(ids, ids, ids)


def as_on_device(call: Call) -> Call:
    """The call with the backend that CUDA tensors get, and no time spent in torch's products."""

    def run() -> Any:
        with (
            mock.patch.dict(os.environ, CLINATTN_BACKEND="triton"),
            mock.patch.object(F, "linear", Unfilled.apply),
            mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v, **_: q + k + v),
        ):
            return call()

    return run


class Unfilled(torch.autograd.Function):
    """A linear layer whose results have their shapes, and any values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return x.new_zeros(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else torch.zeros_like(x) for x in ctx.saved_tensors)


def training() -> Iterator[Call]:
    """Calls of the stages capture and sync."""
    for call in calls_of_stage("triton", CPU, dryrun=False):
        yield call.forward
        yield call.both


def race() -> Iterator[Call]:
    for dtype in (torch.bfloat16, torch.float32):
        for dim in (64, 128):
            for call in training_calls("triton", CPU, LENGTHS, dim, dtype):
                yield call.both


def overhead() -> Iterator[Call]:
    q, k, v, do = inputs(CPU, 1, 1, 16, 64)
    arguments = Arguments(q, k, v, scale=0.125, max_seqlen_q=16, max_seqlen_k=16)
    yield lambda: implementation("triton", q).forward(arguments)
    yield from both_passes(ours(), [q, k, v], do)


def memory() -> Iterator[Call]:
    for n in (4096, 16_384):
        yield from both_passes(ours(), *split(empty(1, 16, n, 64)))


def shapes() -> Iterator[Call]:
    """The checks at the sizes of a device, which any `device` but the string "cpu" gets."""

    def compare(backend: str, *qkvd: Tensor, **keywords: Any) -> None:
        gradients(fused_attention, *qkvd, backend=backend, **keywords)

    def run(check: Callable[[str, Any], None]) -> None:
        with (
            mock.patch.object(gpu.checks, "compare", compare),
            mock.patch.object(Problem, "check"),
        ):
            check("triton", CPU)

    for check in gpu.checks.SHAPES.values():
        yield functools.partial(run, check)


def numerics(core: bool) -> Iterator[Call]:
    """The jobs of the stage numerics if core, else those of numerics_rest."""

    def run(name: str, dtype: str, card: int) -> None:
        tf32 = dtype == gpu.numerics.TF32
        problem = Problem(
            gpu.numerics.BY_ID[name], torch.float32 if tf32 else getattr(torch, dtype), "cpu"
        )
        capability = (lambda _: divmod(card, 10)) if card else launch.device_capability
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            with mock.patch.object(launch, "device_capability", capability):
                problem.run("triton")
        finally:
            torch.set_float32_matmul_precision("highest")

    for backend, *job in gpu.numerics.jobs_of(["triton"], dryrun=False):
        if gpu.numerics.is_core((backend, *job)) == core:
            yield functools.partial(run, *job)


def tiles() -> Iterator[Call]:
    """The candidates of the stage tiles at bf16, D 64 and 128, whether or not they spill."""
    for table, bits, dim in gpu.sweep.keys(RUN):
        if bits == 16 and dim in (64, 128):
            for tile in gpu.sweep.tiles_for(table, bits, dim, RUN):
                for right in MASKS.values():
                    yield functools.partial(one_tile, table, bits, dim, tile, right)


def one_tile(table: str, bits: int, dim: int, tile: Tile, right: int) -> None:
    shape = (1, gpu.dense_shapes.WIDTH // dim, 256)
    problem = gpu.sweep.SmallProblem(*shape, dim, gpu.sweep.TYPES[bits], right, CPU)
    with tile_of(table, tile):
        (problem.forward if table == "forward" else problem.backward)()


def candidates() -> Iterator[Call]:
    yield from gpu.candidates.calls_to_record(CPU)


def bits() -> Iterator[Call]:
    yield from gpu.bits.calls_to_record(CPU)


def summaries() -> Iterator[Call]:
    yield from gpu.summaries.calls_to_record(CPU)


def ours(**keywords: Any) -> Callable[..., Tensor]:
    return functools.partial(fused_attention, backend="triton", **keywords)


def empty(*shape: int) -> list[Tensor]:
    """q, k, v and do, bf16, in memory that no one touches."""
    return [torch.empty(shape, dtype=torch.bfloat16) for _ in range(4)]


def split(qkvd: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    return qkvd[:3], qkvd[3]


# Stages in order of worth: a kernel counts for the first stage that launches it.
STAGES: dict[str, Callable[[], Iterator[Call]]] = {
    "first call": first_call,
    "speed": speed,
    "clinical": clinical,
    "encoder": encoder,
    "overhead": overhead,
    "memory": memory,
    "training": training,
    "shapes": shapes,
    "bits": bits,
    "race": race,
    "summaries": summaries,
    "candidates": candidates,
    "numerics": functools.partial(numerics, True),
    "tiles": tiles,
    "numerics_rest": functools.partial(numerics, False),
}
# Stages of a pack unless more are asked for: all that the two calls of plan.py launch.
USUAL = [name for name in STAGES if name not in ("tiles", "candidates")]
