"""The compiled CPU kernels: where they can run, and on which instruction set."""

from __future__ import annotations

import torch

from clinattn.backends import compiled
from clinattn.backends.backend import Backend, Implementation


def reasons_against(device: torch.device | None = None) -> list[str]:
    """Returns why the kernels cannot run, here or on the given device; empty when they can."""
    reasons = []
    if compiled.extension_error is not None:
        reasons.append(
            f"{compiled.extension_error}; with a C++ compiler and ninja at hand, "
            "`pip install --no-build-isolation .` builds it"
        )
    if device is not None and device.type != "cpu":
        reasons.append(f"it serves CPU tensors, and these are on {device}")
    return reasons


# The numbers by which the kernels know the settings of torch.get_float32_matmul_precision
PRECISIONS = {"highest": 0, "high": 1, "medium": 2}


def matmul_precision() -> int:
    """Returns the number in PRECISIONS of the precision that torch is set to."""
    try:
        return PRECISIONS[torch.get_float32_matmul_precision()]
    except RuntimeError:  # torch's old and new settings contradict each other
        return PRECISIONS["highest"]


def load() -> Implementation:
    forward = torch.ops.clinattn.cpu_forward.default
    backward = torch.ops.clinattn.cpu_backward.default
    summary = torch.ops.clinattn.cpu_summary.default
    return Implementation(
        "cpu",
        lambda call: forward(*call, matmul_precision()),
        lambda call, incoming, needs: backward(*incoming, *call, needs, matmul_precision()),
        lambda call, inputs, *asked: summary(*inputs, *call, *asked, matmul_precision()),
    )


def instruction_set() -> str | None:
    """Returns the instruction set that the compiled kernels use here; None without them."""
    module = compiled.compiled_module()
    return None if module is None else module.instruction_set()


BACKEND = Backend("cpu", reasons_against, load)
