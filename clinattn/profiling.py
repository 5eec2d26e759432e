"""clinattn profile: a trace of a few warmed steps of the encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from clinattn.benchmark import VARIANTS, Settings
from clinattn.benchmark.run import DTYPES, encoder_config
from clinattn.benchmark.variants import Runner
from clinattn.benchmark.workload import profile_workload
from clinattn.encoder import MaskedLanguageModel

WARM_UP_STEPS, TABLE_ROWS = 2, 15


def profile_steps(
    settings: Settings, mode: str, variant_name: str, steps: int, folder: Path
) -> tuple[Path, str]:
    """Trace `steps` batches; returns the Chrome trace's path and a table of the slowest ops.

    On CUDA each step is an NVTX range and the traced window is a cudaProfiler range, for nsys.
    """
    variant = next((v for v in VARIANTS if v.name == variant_name), None)
    if variant is None:
        raise ValueError(
            f"variant={variant_name!r}: expected one of {tuple(v.name for v in VARIANTS)}"
        )
    torch.manual_seed(settings.seed)
    device = torch.device(settings.device)
    config = encoder_config(settings)
    workload = profile_workload(
        settings.profile, settings.max_tokens, config.vocab_size, settings.seed
    )
    indices = workload.sample(settings.batch_size or 4, settings.seed)
    batch = [workload.example(i, settings.seed) for i in indices]
    runner = Runner(MaskedLanguageModel(config).to(device, DTYPES[settings.dtype]), device)

    def step() -> None:
        runner.run(mode, variant, batch)

    for _ in range(WARM_UP_STEPS):
        step()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with cuda_window(device), profile(activities=activities) as trace:
        for _ in range(steps):
            marked(step, device)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{variant.name}-{mode}.trace.json"
    trace.export_chrome_trace(str(path))
    table = trace.key_averages().table(
        sort_by=f"self_{device.type}_time_total", row_limit=TABLE_ROWS, max_name_column_width=40
    )
    return path, table


@contextmanager
def cuda_window(device: torch.device) -> Iterator[None]:
    """cudaProfilerStart and Stop around the steps, so that nsys records them alone."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaProfilerStart()
    yield
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaProfilerStop()


def marked(step: Callable[[], None], device: torch.device) -> None:
    if device.type != "cuda":
        return step()
    with torch.cuda.nvtx.range("clinattn step"):
        step()
