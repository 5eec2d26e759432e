"""A race: ours under pytest-benchmark, every peer timed just before each of its rounds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clinattn.backends import implementation
from clinattn.benchmark.measure import quartiles, synchronize
from clinattn.environment import environment

sys.path.insert(0, str(Path(__file__).parent))  # for `from problem import ...`

ROUNDS, WARM_UP_ROUNDS = 11, 1

Work = Callable[[], object]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def race(benchmark, device) -> Callable[..., None]:
    """race(ours, peers, tokens=, flops=, dtype=, **facts): time and note all in extra_info.

    Interleaved, so that a change of clock or load meets ours and its peers alike. A ratio above 1
    means that ours is faster.
    """

    def timed(work: Work) -> float:
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - started

    def run(
        ours: Work,
        peers: dict[str, Work],
        *,
        tokens: int,
        flops: int | None,
        dtype: torch.dtype,
        rounds: int = ROUNDS,
        **facts: Any,
    ) -> None:
        seconds: dict[str, list[float]] = {name: [] for name in ("clinattn", *peers)}

        def peers_first() -> None:
            for name, work in peers.items():
                seconds[name].append(timed(work))

        benchmark.pedantic(
            lambda: seconds["clinattn"].append(timed(ours)),
            setup=peers_first,
            rounds=rounds,
            warmup_rounds=WARM_UP_ROUNDS,
        )
        kept = {name: times[-rounds:] for name, times in seconds.items()}
        medians = {name: quartiles(times)["median"] for name, times in kept.items()}
        benchmark.extra_info.update(environment(device) | facts)
        benchmark.extra_info |= {
            "dtype": str(dtype).removeprefix("torch."),
            "backend": implementation("", torch.empty(0, dtype=dtype, device=device)).name,
            "tokens": tokens,
            "tokens_per_s": {
                name: quartiles([tokens / t for t in times]) for name, times in kept.items()
            },
            "gflop_per_s": None if flops is None else round(flops / medians["clinattn"] / 1e9, 1),
            "ratio_to": {name: round(medians[name] / medians["clinattn"], 3) for name in peers},
        }

    return run
