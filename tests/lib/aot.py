"""Compiles the kernels of one problem for one card and says what is wrong with them."""

import re
from functools import cache
from pathlib import Path

import torch
import triton
from kept import cache_folder, digest, kept
from places import ROOT

from clinattn.backends import call as arguments
from clinattn.tools.compiled import kernel_report, sass
from clinattn.tools.compiled.kernel_report import (
    CARDS,
    KINDS,
    both_passes,
    kernel_reports,
    summaries,
)

MODULES = (__file__, arguments.__file__, kernel_report.__file__, sass.__file__)
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# 8.6, 8.9 and 12.0 take the rows of 80, and have this much.
SMALL_SHARED_LIMIT = 101_376
SAVED = 8  # bytes of stack for what is kept out of the way of the loops, which have none
SUMMARY = "summary-"  # before a variant: the kernels of attention_summary
VARIANTS = KINDS | {
    "full": {},
    "keys": {"mask": (2, 1, 1, 256)},
    "pairs-causal": {"mask": (2, 1, 256, 256), "right": 0},
    "packed-gqa": {"packed": True, "group": 4, "right": 0},
    "lengths": {"lengths": True},
    "intervals": {"intervals": True},
    "terms": {"terms": True, "needs": 2 + 4 + 8},
    "dropout": {"dropout": True},
    "values-64": {"value_dim": 64},
    "values-128": {"value_dim": 128},
    "values-window": {"value_dim": 128, "left": 64, "right": 64},
    "values-keys": {"value_dim": 128, "mask": (2, 1, 1, 256)},
    "values-pairs": {"value_dim": 128, "mask": (2, 1, 256, 256)},
    "values-bias": {"value_dim": 128, "mask": (2, 1, 256, 256), "bias": True, "needs": 1},
    "values-terms": {"value_dim": 128, "terms": True, "needs": 2 + 4 + 8},
}


def problems(job):
    """Everything wrong with the kernels of a job, in words; kept in the cache."""
    return kept(cache_folder("triton_aot"), "-".join(map(str, job)), key(), lambda: judged(job))


@cache
def key():
    """Returns a digest of everything that a kept result depends on."""
    files = [*sorted((ROOT / "kernels").glob("*.py")), *map(Path, MODULES)]
    return digest(*files, words=[triton.__version__, torch.__version__])


def call_of(dim, dtype, variant):
    """Returns the function that launches the kernels of a variant."""
    if variant not in VARIANTS:
        kind = VARIANTS[variant.removeprefix(SUMMARY)]
        return lambda: summaries(dim, dtype, **{x: kind[x] for x in kind if x != "needs"})
    return lambda: both_passes(dim, dtype, **VARIANTS[variant])


def judged(job):
    card, dim, dtype, variant = job
    found = []
    for kernel in kernel_reports(call_of(dim, getattr(torch, dtype), variant), card):
        name = f"{kernel.name} {kernel.block_m}x{kernel.block_n} w{kernel.num_warps}"
        limit = SMALL_SHARED_LIMIT if card == 80 else CARDS[card].block_shared
        if kernel.shared > limit:
            found.append(f"{name}: {kernel.shared} bytes of shared memory, {limit} there are")
        if kernel.local > SAVED or any(loop.local for loop in kernel.loops):
            found.append(f"{name}: {kernel.local} bytes of stack, {kernel.registers} registers")
        if kernel.serialized:
            found.append(f"{name}: each product waits for the one before")
        # The gradients of biases have small tiles, which take the older instructions anywhere.
        best = {TENSOR_CORE[card]} | ({"HMMA"} if kernel.name.endswith("gradient") else set())
        # One loop of topk has no product: it inserts weights among the largest.
        covers = any if kernel.name == "topk" else all
        if dtype != "float32" and not covers(best & loop.families for loop in kernel.loops):
            families = [sorted(loop.families) for loop in kernel.loops]
            found.append(f"{name}: {families} in the loops, {best} expected")
        if register_transposes(kernel.ttgir):
            found.append(f"{name}: a product is transposed in registers")
    return found


def register_transposes(ttgir):
    """Transposes, in registers, of what comes from a product: see _accumulate_dkdv."""
    scopes, found = [set()], []  # names are used again in regions beside each other
    for line in ttgir.splitlines():
        line = line.strip()
        if line.startswith("}") and len(scopes) > 1:
            scopes.pop()
        match = re.match(r"(%\w+)(?::\d+)? = (?!scf\.)(.*)", line)
        if match is not None:
            result, operation = match.groups()
            operands = set(re.findall(r"%\w+", operation))
            if operands & scopes[-1]:
                scopes[-1].add(result)
                if operation.startswith("tt.trans"):
                    found.append(line)
            elif re.search(r"\b(tt\.dot|warp_group_dot|tc_gen5_mma|tmem_load)\b", operation):
                scopes[-1].add(result)
        if re.search(r"\{( loc\(.*\))?$", line):
            scopes.append(set(scopes[-1]))
    return found
