"""Stages of run.py about what does not grow with the work: overhead of a call, memory beside it."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from clinattn import fused_attention
from clinattn.backends.call import Arguments
from clinattn.backends.select import implementation
from gpu.rows import Run
from gpu.training import Call, gradients, inputs

TARGET = 60.0  # microseconds of a call; some hosts take longer, which is no fault


def launch_overhead(run: Run) -> None:
    """Host microseconds of a call on a problem so small that the device keeps up."""
    q, k, v, do = inputs(run.device, 1, 1, 16, 64)
    arguments = Arguments(q, k, v, scale=0.125, max_seqlen_q=16, max_seqlen_k=16)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def measure(name: str, function: Callable[[], Any], **fields: Any) -> None:
        microseconds = host_microseconds(function, run)
        if "target" in fields:
            fields |= {"measured": microseconds, "met": microseconds <= fields["target"]}
        run.row(case=name, microseconds=microseconds, **fields)

    def measure_calls(call: Call, targets: dict[str, float], **fields: Any) -> None:
        def forward() -> None:
            with torch.no_grad():
                call(q, k, v)

        measure("forward", forward, **fields, **targets)
        measure("forward, saving for backward", lambda: call(*leaves), **fields)
        measure("forward and backward", lambda: gradients(call, q, k, v, do), **fields)

    targets = {"target": TARGET}
    for backend in run.backends:
        launcher = implementation(backend, q).forward
        measure("kernel launcher", lambda: launcher(arguments), backend=backend, **targets)  # noqa: B023
        ours = functools.partial(fused_attention, backend=backend)
        measure_calls(ours, targets, backend=backend)
    measure_calls(F.scaled_dot_product_attention, {}, provider="sdpa")


def host_microseconds(function: Callable[[], Any], run: Run) -> float:
    """Returns the host's time of a call, the least of rounds in which the device keeps up."""
    repeats, times = 300 if not run.dryrun else 1, []
    function()
    for _ in range(5 if not run.dryrun else 1):
        synchronize(run.device)
        began = time.perf_counter()
        for _ in range(repeats):
            function()
        times.append(1e6 * (time.perf_counter() - began) / repeats)
        synchronize(run.device)
    return min(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(run: Run) -> None:
    """Bytes above the inputs, forward and backward: O(N), with nothing N by N."""
    heads, dim = (16, 64) if not run.dryrun else (1, 16)
    lengths = (4096, 16_384) if not run.dryrun else (16,)
    for backend, n in itertools.product(run.backends, lengths):
        q, k, v, do = inputs(run.device, 1, heads, n, dim)
        outputs = 4 * q.numel() * q.element_size() + 3 * n * heads * 4  # o dq dk dv; lse and sums
        fields: dict[str, Any] = dict(backend=backend, case=f"n={n}", outputs_bytes=outputs)
        if run.device.type != "cuda":
            gradients(fused_attention, q, k, v, do, backend=backend)
            run.row(**fields)
            continue
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(fused_attention, q, k, v, do, backend=backend)
        synchronize(run.device)
        peak = torch.cuda.max_memory_allocated() - before
        run.row(**fields, peak_bytes=peak, ok=peak < 1.5 * outputs)
