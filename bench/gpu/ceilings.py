"""Stage of run.py that measures what the card reaches: a copy, a product, and the clocks under it.

Every other number is held against these two, not against a data sheet.
"""

from __future__ import annotations

import functools
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from gpu.rows import Run
from gpu.timing import in_turns

COPIED = 4 << 30  # bytes read, and as many written: 80 times an H100's L2
SIZE = 8192  # of the product's three sides
BUSY = 1.0  # seconds of products in flight while nvidia-smi looks at the card
QUERY = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "watts",
    "temperature.gpu": "celsius",
}
# Reasons for a clock below its maximum; older drivers say clocks_throttle_reasons.
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")


def ceilings(run: Run) -> None:
    """GB/s of a device-to-device copy and TFLOP/s of a bf16 product, each on random data."""
    if run.enough_time(10, "ceilings"):
        copy(run)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        product(run)


def copy(run: Run) -> None:
    size = COPIED if not run.dryrun else 1 << 16
    source = torch.empty(size, dtype=torch.uint8, device=run.device).random_()
    target = torch.zeros_like(source)
    times = in_turns({"copy": functools.partial(target.copy_, source)}, run)["copy"]
    gb_per_s = 2 * size / times["ms"] / 1e6
    run.row(case="copy", bytes_read_and_written=2 * size, **times, gb_per_s=gb_per_s)


def product(run: Run) -> None:
    size = SIZE if not run.dryrun else 64
    a, b = (torch.randn(size, size, device=run.device).bfloat16() for _ in range(2))
    work = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
    times = in_turns({"product": work}, run)["product"]
    flops = 2 * size**3
    row: dict[str, Any] = dict(case=f"bf16 product {size}^3", **times)
    row["tflops"] = flops / times["ms"] / 1e9
    if run.device.type == "cuda":
        seconds, state = under_load(work, times["ms"] / 1e3)
        row |= {"sustained_tflops": flops / seconds / 1e12, **state}
    run.row(**row)


def under_load(work: Callable[[], Any], seconds: float) -> tuple[float, dict[str, Any]]:
    """Seconds of one product of many in a row, and what nvidia-smi reads meanwhile."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    repeats = min(1000, max(1, round(BUSY / seconds)))  # a queue of launches holds about 1,000
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    time.sleep(BUSY / 3)  # until the clock has settled
    state = card_state()
    state["read_while_busy"] = not end.query()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats, state


def card_state() -> dict[str, Any]:
    """Clocks, power and temperature as nvidia-smi reads them; what it does not tell is absent."""
    names = [*QUERY.values(), "clock_limited_by"]  # its bits: nvmlClocksEventReasons
    for reasons in (*REASONS, None):
        values = smi([*QUERY, *([reasons] if reasons else [])])
        if values:
            return dict(zip(names, values, strict=False))
    return {}


def smi(fields: list[str]) -> list[float | str]:
    """Values of the fields; empty where nvidia-smi is absent or does not know one of them."""
    query = ",".join(fields)
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        return []
    return [number(x.strip()) for x in lines[0].split(",")]


def number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
