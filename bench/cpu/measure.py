"""Measures a case for run.py and compare.py: checks its results, then times its passes in turns.

Another tree's clinattn may stand behind a side of compare.py: what that may lack is imported late.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cpu.cases import Entry
from cpu.rows import Row
from suites.problem import Sdpa, Way, check, cotangent, inputs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU = torch.device("cpu")
MIN_ROUNDS = 3
BUDGET_S = 1.5  # of the rounds of one measurement, where MIN_ROUNDS take less
SLOW_S = 1.0  # a round that takes longer needs no warm-up: it is kept
CHECKED_HEADS = 1

Work = Callable[[], object]


def in_turns(works: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """Seconds of each work in each round."""

    def one_round() -> dict[str, float]:
        seconds = {}
        for name, work in works.items():
            began = time.perf_counter()
            work()
            seconds[name] = time.perf_counter() - began
        return seconds

    first = one_round()
    took = sum(first.values())
    kept = [first] if took > SLOW_S else []
    wanted = max(min(rounds, MIN_ROUNDS), min(rounds, round(BUDGET_S / took)))
    kept += [one_round() for _ in range(wanted - len(kept))]
    return {name: [seconds[name] for seconds in kept] for name in works}


def work_of(way: Way, passes: str, d_out: Tensor) -> Work:
    if passes == "forward":
        return torch.no_grad()(way.forward)
    gradient = way.laid_out(d_out)
    return functools.partial(
        torch.autograd.grad, way.forward(), way.inputs, gradient, retain_graph=True
    )


def measure(
    entry: Entry, dtype: str, passes: list[str], rounds: int, facts: dict[str, Any]
) -> Iterator[Row]:
    """A row for each pass and each way of ours; AssertionError where ours errs."""
    from clinattn.backends.compiled import compiled_module
    from clinattn.tools.other_work import Watch, here

    check(entry.case, DTYPES[dtype], CPU, list(entry.ways.values()), CHECKED_HEADS)
    qkv = inputs(entry.case, DTYPES[dtype], CPU)
    module = compiled_module()
    assert module is not None
    sdpa, d_out = Sdpa(entry.case, qkv), cotangent(qkv[0])
    ours = {name: way(entry.case, qkv) for name, way in entry.ways.items()}
    for one in passes:
        works = {name: work_of(way, one, d_out) for name, way in ours.items()}
        works["torch"] = work_of(sdpa, one, d_out)
        peak = module.peak_flops(str(DTYPES[dtype]).removeprefix("torch."))
        watch = Watch()
        seconds = in_turns(works, rounds)
        beside = here([watch.spent()], CPU)
        for name in ours:
            yield Row(
                case=f"{entry.name} {name}".strip(),
                dtype=dtype,
                passes=one,
                flops=entry.case.flops(one),
                ours_s=seconds[name],
                torch_s=seconds["torch"],
                peak=peak,
                peak_loop=peak_loop(facts["instruction_set"], dtype),
                target=entry.target(dtype, one),
                environment=facts | beside,
            )


def peak_loop(instruction_set: str, dtype: str) -> str:
    if instruction_set == "avx512_bf16":
        return "avx512 bf16" if dtype == "bf16" else "avx512 fma"
    if instruction_set != "amx":
        return f"{instruction_set} fma"
    products = {"fp32": 6, "fp16": 3, "bf16": 1}[dtype]  # of bf16 tiles, for one of the dtype
    return "amx bf16" if products == 1 else f"amx bf16 / {products}"


def facts_of_this_process() -> dict[str, Any]:
    try:
        from clinattn.tools.environment import environment
    except ModuleNotFoundError:  # a side of compare.py may be a revision that had no tools/
        from clinattn.environment import environment
    try:
        from clinattn.tools.peaks import peaks_in_force
    except ModuleNotFoundError:
        peaks = {}
    else:
        peaks = peaks_in_force()
    capability = {"torch_cpu_capability": torch.backends.cpu.get_cpu_capability()}
    return environment(CPU) | peaks | capability
