"""Stages of gpu.py about what does not grow with the work: overhead of a call, memory beside it."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from gpu_checks import Call, gradients, inputs

from clinattn import fused_attention
from clinattn.arguments import Arguments
from clinattn.backends import implementation

if TYPE_CHECKING:
    from gpu import Run

LIMIT = 60.0  # microseconds of a call


def launch_overhead(run: Run) -> None:
    """Host microseconds of a call on a problem so small that the device keeps up."""
    q, k, v, do = inputs(run.device, 1, 1, 16, 64)
    launcher = implementation("triton", q).forward
    arguments = Arguments(q, k, v, scale=0.125, max_seqlen_q=16, max_seqlen_k=16)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    ours = functools.partial(fused_attention, backend="triton")

    def without_gradients(call: Call) -> None:
        with torch.no_grad():
            call(q, k, v)

    def forward(call: Call) -> None:
        call(*leaves)

    def both(call: Call) -> None:
        gradients(call, q, k, v, do)

    for name, function, limit in (
        ("kernel launcher", lambda: launcher(*arguments), LIMIT),
        ("forward", lambda: without_gradients(ours), LIMIT),
        ("forward, saving for backward", lambda: forward(ours), None),
        ("forward and backward", lambda: both(ours), None),
        ("sdpa forward", lambda: without_gradients(F.scaled_dot_product_attention), None),
        ("sdpa forward and backward", lambda: both(F.scaled_dot_product_attention), None),
    ):
        repeats, times = 300 if not run.dryrun else 1, []
        function()
        for _ in range(5 if not run.dryrun else 1):
            synchronize(run.device)
            began = time.perf_counter()
            for _ in range(repeats):
                function()
            times.append(1e6 * (time.perf_counter() - began) / repeats)
            synchronize(run.device)
        judged = {} if limit is None else {"limit": limit, "ok": run.dryrun or min(times) < limit}
        run.row(case=name, microseconds=min(times), **judged)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(run: Run) -> None:
    """Bytes above the inputs, forward and backward: O(N), with nothing N by N."""
    heads, dim = (16, 64) if not run.dryrun else (1, 16)
    for n in (4096, 16_384) if not run.dryrun else (16,):
        q, k, v, do = inputs(run.device, 1, heads, n, dim)
        outputs = 4 * q.numel() * q.element_size() + 3 * n * heads * 4  # o dq dk dv; lse and sums
        if run.device.type != "cuda":
            gradients(fused_attention, q, k, v, do, backend="triton")
            run.row(case=f"n={n}", outputs_bytes=outputs)
            continue
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(fused_attention, q, k, v, do, backend="triton")
        synchronize(run.device)
        peak = torch.cuda.max_memory_allocated() - before
        run.row(case=f"n={n}", peak_bytes=peak, outputs_bytes=outputs, ok=peak < 1.5 * outputs)
