"""Seconds that each kernel of a piece of work took on the device, by torch.profiler.

Once it has run, torch.profiler stays in the process: every later launch costs the host more. So it
comes after what is timed.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

DEVICE_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}


def kernel_seconds(work: Callable[[], Any], device: torch.device) -> Counter[str]:
    """Returns seconds by kernel; on the CPU, in a dry run, by operator, inner and outer."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
        work()
        if cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return by_name(events, DEVICE_WORK if cuda else {"cpu_op"})


def by_name(events: list[dict[str, Any]], categories: set[str]) -> Counter[str]:
    """Seconds of the events of a Chrome trace, whose durations are in microseconds."""
    seconds: Counter[str] = Counter()
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in categories:
            seconds[event["name"]] += event["dur"] / 1e6
    return seconds
