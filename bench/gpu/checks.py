"""Stages of run.py that check odd shapes and equal bits, each case in a process beside others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clinattn import fused_attention
from gpu.jobs import in_processes
from gpu.rows import Run, outcome
from gpu.table_of_cases import Case, Problem
from gpu.timing import AGREE, relative
from gpu.training import DRYRUN_LENGTHS, LENGTHS, gradients, inputs, training_calls

REPEATS = 250


def shapes_that_broke_others(run: Run) -> None:
    """Each of these gave NaN or silent nonsense in another library."""
    checked("gpu.checks:shape_job", [(x, name) for name in SHAPES for x in run.backends], run)


def race(run: Run) -> None:
    """250 repeats give the same bits, forward and backward."""
    types = [(dtype, dim) for dtype in ("bfloat16", "float32") for dim in (64, 128)]
    if run.dryrun:
        types = [("bfloat16", 16)]
    kinds = [call.name for call in training_calls("", "cpu", (1,), 16)]
    jobs = [(x, *of_type, kind) for of_type in types for kind in kinds for x in run.backends]
    checked("gpu.checks:race_job", jobs, run)


def checked(function: str, jobs: list[Any], run: Run) -> None:
    """The rows of these jobs, whose first word is a backend."""
    for row, left in in_processes(function, jobs, run, run.left()):
        if row is not None:
            backend, *words = row.pop("job")
            run.row(backend=backend, case=" ".join(map(str, words)), **row)
        if left:
            run.row(skipped=f"{left} for want of time")


def shape_job(job: tuple[str, str], device: str) -> dict[str, Any]:
    backend, name = job
    return outcome(lambda: SHAPES[name](backend, device))


def race_job(job: tuple[str, str, int, str], device: str) -> dict[str, Any]:
    backend, dtype, dim, kind = job
    lengths, repeats = (LENGTHS, REPEATS) if device != "cpu" else (DRYRUN_LENGTHS, 1)
    calls = training_calls(backend, device, lengths, dim, getattr(torch, dtype))
    call = next(x for x in calls if x.name == kind)
    try:
        torch.manual_seed(0)  # dropout draws its seed anew
        expected = call.both()
        differing = 0
        for _ in range(repeats):
            torch.manual_seed(0)
            differing += not all(map(torch.equal, call.both(), expected))
        return {"repeats": repeats, "differing": differing, "ok": differing == 0}
    except Exception as error:
        return {"ok": False, "error": str(error)[:300]}


# Shapes


def compare(backend: str, q: Tensor, k: Tensor, v: Tensor, do: Tensor, **keywords: Any) -> None:
    """Ours against the reference in fp64: NaN or another number is meant to be found here."""
    actual = gradients(fused_attention, q, k, v, do, backend=backend, **keywords)
    wide = {x: y.double() if isinstance(y, Tensor) and y.is_floating_point() else y
            for x, y in keywords.items()}  # fmt: skip
    exact = [x.double() for x in (q, k, v, do)]
    truth = gradients(fused_attention, *exact, backend="reference", **wide)
    for name, x, y in zip(("o", "dq", "dk", "dv"), actual, truth, strict=True):
        far = relative(x.double(), y)
        assert far < AGREE, f"{name}: relative error {far:.3g}"


def very_negative_lse(backend: str, device: str) -> None:
    """lse below -90 with a ragged last tile: 2^(0 - lse) overflows where padding is read as 0."""
    for n in (192, 193) if device != "cpu" else (33,):
        q, k, v, do = inputs(device, 1, 2, n, 64)
        mask = torch.full((1, 1, n, n), -200.0, device=device, dtype=q.dtype)
        compare(backend, q, k, v, do, attn_mask=mask)
        compare(backend, q, k, v, do, attn_mask=mask[:, :, :1])


def misaligned(backend: str, device: str) -> None:
    """Storage offsets of one element, rows that are no multiple of 16 bytes, expanded do."""
    n = 130 if device != "cpu" else 20
    whole = [x.flatten() for x in inputs(device, 1, 2, n + 1, 65)]
    strides = (2 * n * 65, n * 65, 65, 1)
    q, k, v, do = (x.as_strided((1, 2, n, 64), strides, 1) for x in whole)
    compare(backend, q, k, v, do)
    compare(backend, *(x.contiguous() for x in (q, k, v)), do)
    compare(backend, q, k, v, torch.ones((), device=q.device, dtype=q.dtype).expand(q.shape))


def many_heads(backend: str, device: str) -> None:
    """More (batch, head) pairs than the second and third axes of a grid can count.

    Three keys: autograd through softmax has half the error in dk of gradients from (o, lse), so
    one evaluation of plain fp32 maths is too narrow a yardstick; Problem has several.
    """
    case = Case("many-heads", batch=70_000 if device != "cpu" else 7, heads=1, nq=3)
    problem = Problem(case, torch.float32, device)
    problem.check(problem.run(backend))


def offsets_beyond_32_bits(backend: str, device: str) -> None:
    """Keys 2^31 elements apart."""
    stride = 2**31 + 8 if device != "cpu" else 264
    q, k, v, do = inputs(device, 1, 1, 2, 64)
    memory = torch.empty(stride + 64, device=device, dtype=q.dtype)
    compare(backend, q, memory.as_strided(k.shape, (1, 1, stride, 1)).copy_(k), v, do)


SHAPES: dict[str, Callable[[str, str], None]] = {
    check.__name__: check
    for check in (very_negative_lse, misaligned, many_heads, offsets_beyond_32_bits)
}
