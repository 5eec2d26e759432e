"""Fixtures of the suites: a race against a peer, sizes, and what a row says of the machine.

    pytest bench/suites --benchmark-only                          small sizes, about three minutes
    pytest bench/suites --benchmark-only --sizes large            those of docs/speed.md
    pytest bench/suites --benchmark-only --benchmark-json FILE    for `clinattn report`
    pytest bench/suites --benchmark-only --benchmark-autosave     then --benchmark-compare
    pytest bench/suites --benchmark-disable                       the checks alone, each work once
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.benchmark.utils.timer import timer  # waits for the GPU where there is one

from clinattn.backends.compiled import compiled_module
from clinattn.tools.benchmark.measure import quartiles
from clinattn.tools.environment import environment
from clinattn.tools.other_work import Watch, here
from clinattn.tools.peaks import peaks_in_force

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `from suites.problem ...`

ROUNDS, WARM_UP_ROUNDS = 7, 1

Work = Callable[[], object]


def pytest_addoption(parser):
    parser.addoption("--sizes", choices=("small", "large"), default="small", help="of bench/")


def pytest_collect_file(file_path, parent):
    """Takes bench_*.py of the folder; pytest itself takes the files that its command line names."""
    named = parent.session.isinitpath(file_path)
    if file_path.name.startswith("bench_") and file_path.suffix == ".py" and not named:
        return pytest.Module.from_parent(parent, path=file_path)


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=timer))


def pytest_benchmark_update_machine_info(config, machine_info):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine_info["clinattn"] = environment(device) | peaks(device)


@cache
def peaks(device: torch.device) -> dict[str, float]:
    """Facts of the processor's peaks, measured once; none for a GPU's rows."""
    return peaks_in_force() if device.type == "cpu" else {}


@pytest.fixture(scope="session")
def sizes(request) -> str:
    return request.config.getoption("--sizes")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def race(benchmark, device) -> Callable[..., None]:
    """race(work, peer, group=, tokens=, flops=, dtype=, **facts): time, and note all in extra_info.

    The peer, torch's SDPA in one form or another, runs just before each round of the work, so that
    a change of clock or load meets both. ratio_to_peer above 1 means that the work is faster.
    Without a peer the work is the peer itself.
    """

    def run(
        work: Work,
        peer: Work | None,
        *,
        group: str,
        tokens: int,
        dtype: torch.dtype,
        flops: int | None = None,
        rounds: int = ROUNDS,
        **facts: Any,
    ) -> None:
        peer_s: list[float] = []

        def peer_first() -> None:
            if peer is not None:
                began = timer()
                peer()
                peer_s.append(timer() - began)

        benchmark.group = group
        machine = environment(device) | peaks(device)
        named = {"dtype": name_of(dtype), "tokens": tokens}
        benchmark.extra_info.update(machine | facts | named)
        watch = Watch()
        benchmark.pedantic(
            work,
            setup=peer_first,
            rounds=rounds,
            warmup_rounds=WARM_UP_ROUNDS,
        )
        benchmark.extra_info.update(here([watch.spent()], device))
        if not benchmark.enabled:
            return
        seconds = benchmark.stats.stats.data
        median = quartiles(seconds)["median"]
        benchmark.extra_info["tokens_per_s"] = quartiles([tokens / s for s in seconds])
        if peer is not None:
            ratio = quartiles(peer_s[-rounds:])["median"] / median
            benchmark.extra_info["ratio_to_peer"] = round(ratio, 3)
        if flops is not None:
            benchmark.extra_info["gflop_per_s"] = round(flops / median / 1e9, 1)
            peak = peak_flops(device, dtype)
            benchmark.extra_info["of_peak"] = None if peak is None else flops / median / peak

    return run


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of a loop in registers, on the CPU; None elsewhere or without the compiled module."""
    module = compiled_module()
    return module.peak_flops(name_of(dtype)) if module and device.type == "cpu" else None
