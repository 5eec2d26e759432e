"""nn.Linear by the compiled layers, where it stands.

A row's bits do not depend on the other rows, the batch or the number of threads. Under compilers,
torch.func and on other devices, and in numbers that the compiled layers do not take, a replaced
layer computes as nn.Linear does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from clinattn.encoder import linear
from clinattn.integrations.outcome import Outcome
from clinattn.integrations.swap import swap, swap_back

DETAIL = "compiled linear layer"
PROJECTION = (
    "nn.MultiheadAttention reads its weight and never calls it; the products of q, k, v and the "
    "output are torch's there"
)


class Linear(nn.Linear):
    """nn.Linear with the same parameters; input as there: (..., in_features)."""

    forward_parameters = ("input",)

    def forward(self, input: Tensor) -> Tensor:
        return linear.forward(self, input)


linear.LAYERS.add(Linear)
REPLACEMENTS: dict[type, type] = {nn.Linear: Linear}


def adapt(module: nn.Module) -> Outcome | None:
    """Replace the module if it is an nn.Linear that the compiled layers serve on this machine.

    Returns None for other modules.
    """
    if not isinstance(module, nn.Linear):
        return None
    if type(module) is NonDynamicallyQuantizableLinear:
        return Outcome(False, PROJECTION)
    reason = None if type(module) is Linear else _why_not(module)
    return Outcome(False, reason) if reason else swap(module, REPLACEMENTS, DETAIL)


def _why_not(layer: nn.Linear) -> str | None:
    if type(layer) is not nn.Linear:
        return None  # swap says so
    weight = layer.weight
    if type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__name__}"
    if weight.device.type != "cpu":
        return f"its weight is on {weight.device.type}; the compiled layers run on the CPU"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"its weight is {weight.dtype}; fp32 and bf16 have compiled layers"
    if not linear.serves():
        return "this machine has no compiled linear layers"
    return None


def restore(module: nn.Module) -> bool:
    """Undoes adapt; returns whether there was something to undo."""
    return swap_back(module, REPLACEMENTS)
