"""A clock of the work on a device: a GPU's own, whose work goes on behind the host's back."""

from __future__ import annotations

import time
from typing import Any

import torch

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
