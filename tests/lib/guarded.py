"""Tensors that end where a page ends, or begin where one begins, between pages nobody may touch.

A sanitizer checks what the compiler has instrumented. Masked and tile loads, and memory that others
have allocated, are not: here a step outside ends the process.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

LIBC = ctypes.CDLL(None, use_errno=True)
PROT_NONE = 0
PAGE = mmap.PAGESIZE


def pages(size: int) -> memoryview:
    """Memory of whole pages, at least `size` bytes, with a forbidden page at each side."""
    whole = -(-size // PAGE) * PAGE
    area = mmap.mmap(-1, whole + 2 * PAGE)
    anchor = ctypes.c_char.from_buffer(area)
    start = ctypes.addressof(anchor)
    del anchor
    for at in (start, start + PAGE + whole):
        if LIBC.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(PAGE), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    return memoryview(area)[PAGE : PAGE + whole]


def guarded(x: Tensor, at_end: bool = True) -> Tensor:
    """A copy with the strides of x whose last element ends a page, or whose first begins one."""
    if x.numel() == 0:
        return x.detach().clone()
    extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    size = extent * x.element_size()
    memory = pages(size)
    start = len(memory) - size if at_end else 0
    flat = torch.frombuffer(memory[start : start + size], dtype=x.dtype)
    flat.copy_(x.detach().as_strided((extent,), (1,)))
    return flat.as_strided(x.shape, x.stride())


def spaced(x: Tensor, gap: int) -> Tensor:
    """x with `gap` elements between its rows; as it is where they are not rows of memory."""
    if gap == 0 or x.dim() == 0 or 0 in x.stride() or x.stride(-1) != 1:
        return x
    return torch.cat([x, x.new_zeros(*x.shape[:-1], gap)], -1)[..., : x.shape[-1]]
