"""Compiles the kernels of one problem for one card and says what is wrong with them.

A module of its own, because the processes of test_triton_aot.py import it by name.
"""

import re

import torch

from clinattn.kernel_report import SHARED_LIMIT, kernel_reports
from clinattn.kernels import backward, forward

MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# 8.6, 8.9 and 12.0 take the rows of 80, and have this much.
SMALL_SHARED_LIMIT = 101_376
VARIANTS = {
    "full": {},
    "causal": {"right": 0},
    "window": {"left": 64, "right": 64},
    "keys": {"mask": (2, 1, 1, 256)},
    "pairs": {"mask": (2, 1, 256, 256), "right": 0},
    "packed-gqa": {"packed": True, "group": 4, "right": 0},
    "lengths": {"lengths": True},
}


def run(dim, dtype, left=-1, right=-1, mask=None, packed=False, group=1, lengths=False):
    """Forward and backward of a problem of this kind; nothing reads its numbers."""
    n, heads = 256, 4
    shapes = [(n, h, dim) if packed else (2, h, n, dim) for h in (heads, heads // group)]
    q, k = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    mask = None if mask is None else torch.ones(mask, dtype=torch.bool)
    cu_seqlens = torch.zeros(5, dtype=torch.int32) if packed else None
    ends = torch.zeros(2, dtype=torch.int32) if lengths else None
    rest = (mask, cu_seqlens, cu_seqlens, ends, ends, ends, 0.1, left, right, False, n, n)
    o, lse = forward.attention_forward(q, k, k, *rest)
    backward.attention_backward(q, None, o, lse, q, k, k, *rest)


def problems(job):
    """Everything wrong with the kernels of a job, in words."""
    card, dim, dtype, variant = job
    found = []
    call = lambda: run(dim, getattr(torch, dtype), **VARIANTS[variant])
    for kernel in kernel_reports(call, card):
        name = f"{kernel.name} {kernel.block_m}x{kernel.block_n} w{kernel.num_warps}"
        limit = SMALL_SHARED_LIMIT if card == 80 else SHARED_LIMIT[card]
        if kernel.shared > limit:
            found.append(f"{name}: {kernel.shared} bytes of shared memory, {limit} there are")
        if kernel.local:
            found.append(f"{name}: {kernel.local} bytes of stack, {kernel.registers} registers")
        if kernel.serialized:
            found.append(f"{name}: each product waits for the one before")
        if dtype != "float32" and not kernel.matrix & {MATRIX[card], "mma.sync"}:
            found.append(f"{name}: no tensor-core instruction")
        if register_transposes(kernel.ttgir):
            found.append(f"{name}: a product is transposed in registers")
    return found


def register_transposes(ttgir):
    """Transposes, in registers, of what comes from a product: see _accumulate_dkdv."""
    products, found = set(), []
    for line in ttgir.splitlines():
        match = re.match(r"\s*(%\w+)(?::\d+)? = (?!scf\.)(.*)", line)
        if match is None:
            continue
        result, operation = match.groups()
        operands = set(re.findall(r"%\w+", operation))
        if re.search(r"\b(tt\.dot|warp_group_dot|tc_gen5_mma|tmem_load)\b", operation):
            products.add(result)
        elif operands & products:
            products.add(result)
            if operation.startswith("tt.trans"):
                found.append(line.strip())
    return found
