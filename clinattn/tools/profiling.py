"""clinattn profile: a few warmed steps of the encoder, for nsys or as a trace of torch.profiler."""

from __future__ import annotations

import errno
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from clinattn.encoder import MaskedLanguageModel
from clinattn.files.disk import written_whole
from clinattn.operator import ranges
from clinattn.tools.benchmark.run import encoder_config, open_workload
from clinattn.tools.benchmark.settings import DTYPES, ProfileSettings
from clinattn.tools.benchmark.variants import VARIANTS, Runner

WARM_UP_STEPS, TABLE_ROWS = 2, 15
NSYS_REPORTS = ("nvtx_gpu_proj_sum", "nvtx_kern_sum", "cuda_gpu_kern_sum", "cuda_gpu_mem_time_sum")

# Times of what the processor began within a range, by the device of the work.
TIME_OF = {"cpu": "cpu_time_total", "cuda": "device_time_total"}

Step = Callable[[], None]


class Range(NamedTuple):
    """Calls and time of one named range in all steps; milliseconds of the profiled device."""

    name: str
    calls: int
    milliseconds: float


def warmed_step(settings: ProfileSettings) -> Step:
    """Returns a step over one batch of the encoder, warmed up: the step holds no first call."""
    (variant,) = (v for v in VARIANTS if v.name == settings.variant)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    device = torch.device(settings.device)
    workload = open_workload(settings)
    config = encoder_config(settings, vocab_size=len(workload.source.vocabulary))
    indices = workload.sample(settings.batch_size or 4, settings.seed)
    batch = [workload.example(i, settings.seed) for i in indices]
    runner = Runner(MaskedLanguageModel(config).to(device, DTYPES[settings.dtype]), device)

    def step() -> None:
        runner.run(settings.mode, variant, batch)

    for _ in range(WARM_UP_STEPS):
        step()
    return step


def run_for_nsys(step: Step, steps: int) -> None:
    """The steps between cudaProfilerStart and Stop, in NVTX ranges. nsys records these alone.

    torch.profiler is not in use: CUPTI serves one of the two.
    """
    with cuda_window(), ranges.recording(nvtx=True):
        for _ in range(steps):
            ranges.run("step", step)


@contextmanager
def cuda_window() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    try:
        yield
        torch.cuda.synchronize()
    finally:
        torch.cuda.profiler.stop()


def nsys_lines(arguments: list[str], output: Path) -> tuple[str, str]:
    """The two lines for a shell: record the window of this very command, then sum it up."""
    command = ["nsys", "profile", "-t", "cuda,nvtx,osrt", "-c", "cudaProfilerApi"]
    command += ["--capture-range-end=stop", "-o", str(output), "-f", "true"]
    command += ["python", "-m", "clinattn", *arguments]
    summary = ["nsys", "stats", "-r", ",".join(NSYS_REPORTS), f"{output}.nsys-rep"]
    return shlex.join(command), shlex.join(summary)


def trace_steps(
    step: Step, steps: int, device: str
) -> tuple[list[Range], str, Callable[[Path], None]]:
    """Trace the steps; returns their ranges, a table of the slowest ops, and what writes them."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as trace, ranges.recording(nvtx=False):
        for _ in range(steps):
            ranges.run("step", step)
        if device == "cuda":
            torch.cuda.synchronize()
    events = trace.key_averages()
    found = [
        Range(
            name=event.key.removeprefix(ranges.PREFIX),
            calls=event.count,
            milliseconds=getattr(event, TIME_OF[device]) / 1e3,
        )
        for event in events
        if event.key.startswith(ranges.PREFIX) and event.device_type == DeviceType.CPU
    ]
    table = events.table(
        sort_by=f"self_{device}_time_total", row_limit=TABLE_ROWS, max_name_column_width=40
    )
    return found, table, partial(write_trace, trace)


def write_trace(trace: profile, path: Path) -> None:
    """Writes a Chrome trace. Raises OSError where that fails, which torch does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as beside:
        trace.export_chrome_trace(str(beside))
        if not beside.exists():
            beside.with_name(beside.name + ".tmp").unlink(missing_ok=True)  # as torch leaves it
            raise OSError(errno.EIO, "the trace could not be written", str(path))
