"""Speed of this machine's instruction sets: multiply-adds in registers, and attention itself.

The register loop is the most that a set can do, and a row of a benchmark is read against it. The
kernels of two sets come unequally close to theirs, so advice on a set follows from attention.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch

from clinattn.backends.compiled import compiled_module
from clinattn.operator.attention import fused_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MARGIN = 1.1  # a set that is faster by less is not worth a variable
TOKENS, HEAD_DIM = 512, 64
FLOPS_PER_PAIR = 14 * HEAD_DIM  # 4 D forward, 10 D backward
ROUNDS = 6

Rates = dict[str, dict[str, float]]  # instruction set -> fp32, bf16 -> FLOP/s


class Measured(NamedTuple):
    """FLOP/s of one thread, by instruction set and then by the names in DTYPES.

    peaks: of the register loop. attention: forward and backward.
    """

    peaks: Rates
    attention: Rates


def peaks_in_force() -> dict[str, float]:
    """GFLOP/s of the register loops on all of torch's threads, as facts of a row.

    Empty without the compiled module.
    """
    module = compiled_module()
    if module is None:
        return {}
    return {f"peak_{name}_gflop_per_s": round(x / 1e9, 1) for name, x in _peaks(module).items()}


def measure() -> Measured | None:
    """Measures each set but the slowest; about half a second. None without the compiled module.

    The slowest, which every machine has, is measured where it is in force or the only one. Set in
    force and number of threads are the same afterwards.
    """
    module = compiled_module()
    if module is None:
        return None
    slowest, *sets = module.instruction_sets()
    if not sets or module.instruction_set() == slowest:
        sets.append(slowest)
    peaks: Rates = {}
    with _as_before(module):
        torch.set_num_threads(1)
        for name in sets:
            module.set_instruction_set(name)
            peaks[name] = _peaks(module)
        return Measured(peaks, _attention(module, sets))


def advice(attention: Rates, in_force: str) -> list[str]:
    """Lines on sets that are MARGIN times as fast as the one in force, for a dtype or for both."""
    own = attention[in_force]
    faster: dict[str, list[str]] = {}
    for dtype, rate in own.items():
        best = max(attention, key=lambda name: attention[name][dtype])
        if attention[best][dtype] >= MARGIN * rate:
            faster.setdefault(best, []).append(
                f"{attention[best][dtype] / 1e9:,.0f} GFLOP/s in {dtype} where {in_force} has "
                f"{rate / 1e9:,.0f}"
            )
    lines = []
    for name, reasons in faster.items():
        others = [dtype for dtype in own if attention[name][dtype] * MARGIN <= own[dtype]]
        but = f"; {in_force} is the faster one in {', '.join(others)}" if others else ""
        lines.append(
            f"CLINATTN_CPU_ISA={name} is faster here: attention reaches {' and '.join(reasons)}"
            f"{but}. Last digits differ between instruction sets"
        )
    return lines


def _peaks(module: ModuleType) -> dict[str, float]:
    return {
        name: module.peak_flops(str(dtype).removeprefix("torch.")) for name, dtype in DTYPES.items()
    }


@contextmanager
def _as_before(module: ModuleType) -> Iterator[None]:
    in_force, threads = module.instruction_set(), torch.get_num_threads()
    try:
        yield
    finally:
        module.set_instruction_set(in_force)
        torch.set_num_threads(threads)


def _attention(module: ModuleType, sets: list[str]) -> Rates:
    """The best of ROUNDS rounds in turns, so that other work meets all sets."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn((3, 1, 1, TOKENS, HEAD_DIM), generator=generator)
    works = {name: [x.to(dtype).requires_grad_() for x in drawn] for name, dtype in DTYPES.items()}
    seconds: dict[tuple[str, str], float] = {}
    for _ in range(ROUNDS):
        for isa in sets:
            module.set_instruction_set(isa)
            for name, qkv in works.items():
                took = _seconds(qkv)
                seconds[isa, name] = min(took, seconds.get((isa, name), took))
    flops = TOKENS**2 * FLOPS_PER_PAIR
    return {isa: {name: flops / seconds[isa, name] for name in DTYPES} for isa in sets}


def _seconds(qkv: list[Any]) -> float:
    started = time.perf_counter()
    with torch.enable_grad():
        o = fused_attention(*qkv, backend="cpu")
    torch.autograd.grad(o, qkv, o.detach())
    return time.perf_counter() - started
