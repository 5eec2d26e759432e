"""The Triton kernels: where they can run. Triton is imported when that is first asked."""

from __future__ import annotations

import functools
import importlib
import os

import torch

from clinattn.backends.backend import Backend, Implementation

# Triton generates code for compute capability 8.0 and newer.
CAPABILITY = (8, 0)


def triton_interpreter() -> bool:
    """Returns whether TRITON_INTERPRET makes Triton kernels run in Python on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def triton_error() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"the package triton does not load ({error}); pip install triton"
    try:
        importlib.import_module("clinattn.kernels.forward")
        importlib.import_module("clinattn.kernels.backward")
        importlib.import_module("clinattn.kernels.summary")
    except Exception as error:  # a Triton too old or broken raises all kinds of errors
        return f"its kernels cannot be imported ({type(error).__name__}: {error})"
    return None


def reasons_against(device: torch.device | None = None) -> list[str]:
    """Returns why the kernels cannot run, here or on the given device; empty when they can."""
    error = triton_error()
    if error is not None:
        return [error]
    if triton_interpreter() and (device is None or device.type == "cpu"):
        return []
    if device is not None and device.type != "cuda":
        return [f"it serves CUDA tensors, and these are on {device}; TRITON_INTERPRET=1 runs it"]
    if not torch.cuda.is_available():
        return ["torch sees no CUDA device; TRITON_INTERPRET=1 runs it on CPU tensors, slowly"]
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        need, has = (".".join(map(str, x)) for x in (CAPABILITY, capability))
        return [f"compute capability {has} < {need} that Triton needs"]
    return []


def load() -> Implementation:
    forward = importlib.import_module("clinattn.kernels.forward")
    backward = importlib.import_module("clinattn.kernels.backward")
    summary = importlib.import_module("clinattn.kernels.summary")
    return Implementation(
        "triton",
        forward.attention_forward,
        lambda call, incoming, needs: backward.attention_backward(*incoming, call, needs),
        summary.attention_summary,
    )


BACKEND = Backend("triton", reasons_against, load)
