"""Stage of run.py on summaries of attention weights: right, of the same bits, and how long."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from clinattn import attention_summary, fused_attention
from gpu.jobs import in_processes
from gpu.providers import without_gradients
from gpu.rows import Run, outcome
from gpu.table_of_cases import CASES, FEATURES, FIRST, REDUCTIONS, SummaryProblem
from gpu.timing import in_turns
from gpu.training import MODEL_WIDTH, inputs

TARGET = 0.6  # of the time of a forward pass
TABLE = {case.id: case for case in (*CASES, *FEATURES)}
DTYPES, SIZES = ("bfloat16", "float32"), ((64, 2048), (64, 8192), (128, 8192))
DRYRUN_CASES, DRYRUN_SIZES = ("causal", "packed-tail"), ((16, 24),)
TIMED = ("received", "relevance", "entropy", "topk")
TOP = 8

Job = tuple[str, str, str]  # backend, case, dtype


def summaries(run: Run) -> None:
    """Numbers and bits of cases of the tests' table, then the time beside a forward pass."""
    counts = dict.fromkeys(itertools.product(run.backends, DTYPES), 0)
    for row, left in in_processes("gpu.summaries:check_job", jobs_of(run), run, run.left() / 2):
        if row is not None:
            backend, case, dtype = row.pop("job")
            counts[backend, dtype] += row["ok"] is True
            if row["ok"] is False:
                run.row(backend=backend, case=f"{case} {dtype}", **row)
        if left:
            run.row(skipped=f"{left} for want of time")
    for (backend, dtype), passed in counts.items():
        run.row(backend=backend, cases="table of cases", dtype=dtype, passed=passed)
    for backend, dtype, size in itertools.product(
        run.backends, DTYPES, DRYRUN_SIZES if run.dryrun else SIZES
    ):
        if not run.enough_time(2, f"{backend} {dtype} {size}"):
            return
        timed(run, backend, dtype, *size)


def jobs_of(run: Any) -> list[Job]:
    """Every case, but for Triton the first ones alone: it compiles each reduction of each."""
    return [
        (backend, case, dtype)
        for backend in run.backends
        for dtype in DTYPES
        for case in (DRYRUN_CASES if run.dryrun else FIRST if backend == "triton" else TABLE)
    ]


def check_job(job: Job, device: str) -> dict[str, Any]:
    backend, case, dtype = job
    problem = SummaryProblem(TABLE[case], getattr(torch, dtype), device)

    def check() -> None:
        for reduce in REDUCTIONS:
            first, again = (problem.summary(reduce, backend) for _ in range(2))
            problem.check(reduce, first)
            same = zip(*(x if isinstance(x, tuple) else (x,) for x in (first, again)), strict=True)
            assert all(torch.equal(x, y) for x, y in same), f"{reduce}: other bits when repeated"

    return outcome(check)


def timed(run: Run, backend: str, dtype: str, dim: int, n: int) -> None:
    """A row for each reduction: ms, and of the forward pass of the same call."""
    ways = calls(backend, dtype, dim, n, run.device)
    failed: dict[str, str] = {}
    times = in_turns(ways, run, failed=failed)
    fields = {"backend": backend, "dtype": dtype, "dim": dim, "n": n}
    for name, error in failed.items():
        run.row(case=name, ok=False, error=error, **fields)
    if "forward" not in times:
        return
    run.row(case="forward", **fields, **times["forward"])
    for reduce in TIMED:
        if reduce in times:
            share = times[reduce]["ms"] / times["forward"]["ms"]
            goal = {"target": TARGET, "measured": share, "met": share <= TARGET}
            run.row(case=reduce, **fields, **times[reduce], **goal)


def calls(
    backend: str, dtype: str, dim: int, n: int, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """The forward pass, and each summary of it with the normaliser that it gave."""
    heads = MODEL_WIDTH // dim if dim > 16 else 1
    q, k, v, do = inputs(device, 1, heads, n, dim, dtype=getattr(torch, dtype))
    forward = functools.partial(fused_attention, backend=backend)
    lse = forward(q, k, v, return_lse=True)[1]
    weights = torch.rand(lse.shape, device=device)

    def summary(reduce: str) -> Tensor:
        return attention_summary(
            q, k, v, do, lse=lse, reduce=reduce, k=TOP, backend=backend,
            weights=weights if reduce in ("received", "relevance") else None,
        )  # fmt: skip

    return {
        "forward": functools.partial(without_gradients(forward), q, k, v),
        **{reduce: functools.partial(summary, reduce) for reduce in TIMED},
    }


def calls_to_record(device: torch.device) -> Iterator[Callable[[], Any]]:
    """Yields the stage's calls of Triton, those that are timed first."""
    for dtype, size in itertools.product(DTYPES, SIZES):
        yield from calls("triton", dtype, *size, device).values()
    for dtype, case in itertools.product(DTYPES, FIRST):
        problem = SummaryProblem(TABLE[case], getattr(torch, dtype), str(device))
        for reduce in REDUCTIONS:
            yield functools.partial(problem.summary, reduce, "triton")
