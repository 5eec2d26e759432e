"""Times functions in one process, in turns, and measures how far their results differ."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu.rows import Run

ROUNDS = 7
AGREE = 0.02  # ||x - ours|| / ||ours|| of bf16 results is a few thousandths

Function = Callable[[], Any]


def seconds(function: Function, repeats: int, device: torch.device) -> float:
    """Returns the time of one of `repeats` calls in a row, by CUDA events on a GPU."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - began) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def in_turns(
    functions: dict[str, Function],
    run: Run,
    rounds: int = ROUNDS,
    failed: dict[str, str] | None = None,
) -> dict[str, dict[str, float]]:
    """Median and quartiles, in ms, of each function over rounds that interleave them.

    failed: takes the error of a function that raises, out of memory for instance, while the others
    go on; by default the error is raised.
    """
    repeats: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in functions}

    def measure(name: str, function: Function) -> None:
        if name not in repeats:
            function()
            once = seconds(function, 2, run.device) if not run.dryrun else 1.0
            repeats[name] = max(1, min(100, round(0.015 / max(once, 1e-6))))
        else:
            times[name].append(1e3 * seconds(function, repeats[name], run.device))

    for _ in range(1 + (rounds if not run.dryrun else 2)):
        for name, function in functions.items():
            if failed is None:
                measure(name, function)
            elif name not in failed:
                try:
                    measure(name, function)
                except Exception as error:
                    failed[name] = str(error).strip()[:200]
                    release_memory(run.device)
    results = {}
    for name, values in times.items():
        if name not in (failed or ()):
            low, median, high = statistics.quantiles(values, n=4, method="inclusive")
            results[name] = {"ms": median, "ms_low": low, "ms_high": high}
    return results


def release_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def relative(x: Tensor, y: Tensor) -> float:
    return ((x - y).norm() / y.norm().clamp(min=1e-30)).item()
