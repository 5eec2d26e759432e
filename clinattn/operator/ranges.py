"""Named ranges of a profile, by layer and pass; none until `recording` turns them on.

Callers on a hot path read `ranges.on` themselves, so that ranges cost nothing more while off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

PREFIX = "clinattn "

on = False
_open: Callable[[str], AbstractContextManager[Any]] = record_function


@contextmanager
def recording(nvtx: bool) -> Iterator[None]:
    """Turns ranges on within: those of NVTX, which nsys reads, or else of torch.profiler.

    Raises RuntimeError for nvtx where torch sees no CUDA device.
    """
    global on, _open
    if nvtx and not torch.cuda.is_available():
        raise RuntimeError("NVTX ranges: expected a CUDA device, and torch sees none")
    before = on, _open
    on, _open = True, torch.cuda.nvtx.range if nvtx else record_function
    try:
        yield
    finally:
        on, _open = before


def run(name: str, work: Callable[..., Any], *args: Any) -> Any:
    """Runs work(*args) in a range."""
    with _open(PREFIX + name):
        return work(*args)


def run_layer(index: int, layer: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """Runs layer(x, *args) in a range, and later its backward pass in another.

    Under a compiler the layer has no ranges; inside its graph, attention still has its own.
    """
    if torch.compiler.is_compiling():
        return layer(x, *args)
    backward = BackwardRange(f"layer {index} backward")
    if x.requires_grad:
        # Of a tensor's hooks the first registered comes first: x would open the layer below
        # before it closes this one.
        x = x.view_as(x)
        x.register_hook(backward.close)
    out = run(f"layer {index} forward", layer, x, *args)
    if out.requires_grad:
        out.register_hook(backward.open)
    return out


class BackwardRange:
    """A range from the gradient of a layer's output to that of its input, or to the end."""

    def __init__(self, name: str):
        self.name = name
        self.range: AbstractContextManager[Any] | None = None

    def open(self, _: Tensor) -> None:
        self.range = _open(PREFIX + self.name)
        self.range.__enter__()
        torch.autograd.Variable._execution_engine.queue_callback(self.close)

    def close(self, _: Tensor | None = None) -> None:
        if self.range is not None:
            self.range.__exit__(None, None, None)
            self.range = None
