"""AdamW without decay of norms and biases, and a cosine schedule after a warm-up."""

from __future__ import annotations

import math

import torch
from torch import nn

BETAS = (0.9, 0.98)
FLOOR = 0.1  # of the peak, which the cosine ends at


def adamw(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Vectors (norms and biases) are not decayed. The rate is set by learning_rate at each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=BETAS)


def learning_rate(step: int, steps: int, warmup: float, peak: float) -> float:
    """Returns the rate of a step: up to `peak` in a line, then half a cosine down to FLOOR of it.

    step: 0 to steps - 1. warmup: the share of steps on the way up."""
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(steps - 1 - rising, 1)
    return peak * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2)
