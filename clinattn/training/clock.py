"""Seconds that a rank works and waits, on a GPU by its own clock: the host runs ahead of it.

Ranks leave a collective together. What each then does until the next one takes it some seconds, and
those that need fewer wait for the slowest: nothing else has to be measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ranks import Ranks

Mark = Any  # seconds, or an event of CUDA


class Clock:
    """Marks moments in the work of `device`, and tells the seconds between two of them."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def mark(self) -> Mark:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Returns the seconds from one mark to a later one; stops the host until a GPU is there."""
        if not self.cuda:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def seconds_of(self, spans: Sequence[tuple[Mark, Mark | None]]) -> list[float]:
        """Returns the seconds of each span; NaN where its end is not known."""
        return [math.nan if end is None else self.seconds(begin, end) for begin, end in spans]


def own_column(seconds: Sequence[float], ranks: Ranks) -> Tensor:
    """Returns (spans, world), fp64: this rank's seconds in its column, and 0 for the sum of all."""
    table = torch.zeros(len(seconds), ranks.world, dtype=torch.float64)
    table[:, ranks.rank] = torch.tensor(seconds, dtype=torch.float64)
    return table


def waited(table: Tensor) -> float:
    """Seconds that a rank waits for the slowest, the mean of ranks, in all spans together.

    table: (spans, world), the seconds of each rank.
    """
    return float((table.amax(1) - table.mean(1)).sum())
