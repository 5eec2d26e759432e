"""The compiled CPU kernels: where they can run, and on which instruction set."""

from __future__ import annotations

import torch

from clinattn.backends import compiled
from clinattn.backends.backend import Backend, Implementation, of_ops


def reasons_against(device: torch.device | None = None) -> list[str]:
    """Why the kernels cannot run, here or on the given device; empty when they can."""
    reasons = []
    if compiled.extension_error is not None:
        reasons.append(
            f"{compiled.extension_error}; with a C++ compiler and ninja at hand, "
            "`pip install --no-build-isolation .` builds it"
        )
    if device is not None and device.type != "cpu":
        reasons.append(f"it serves CPU tensors, and these are on {device}")
    return reasons


def load() -> Implementation:
    ops = torch.ops.clinattn
    return of_ops("cpu", ops.cpu_forward.default, ops.cpu_backward.default)


def instruction_set() -> str | None:
    """The instruction set the compiled CPU kernel uses here; None without the kernel."""
    module = compiled.compiled_module()
    return None if module is None else module.instruction_set()


BACKEND = Backend("cpu", reasons_against, load)
