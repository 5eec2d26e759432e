"""Attention forward, backward and both, by every way that can run here, on clinical shapes.

    pytest bench/suites/bench_attention.py --benchmark-only
    pytest bench/suites/bench_attention.py -k "notes and forward and fp32" --sizes large
    pytest bench/suites/bench_attention.py -k clinattn-cpu --benchmark-json bench/results/NAME.json

Every way is checked against fp64 at the lengths it is timed on, before it is timed. A way that
cannot run here is skipped with the reason. The peer of all is torch's SDPA as it chooses itself.
"""

from __future__ import annotations

import functools

import pytest
import torch

from suites.peers import WAYS, Eager, Unavailable
from suites.problem import FLOPS, AttentionCase, Sdpa, Way, check, cotangent, drawn, inputs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = {
    "small": {
        "chunks_4x128": AttentionCase((128,) * 4, 4, 64),
        "timeline_1024_window64": AttentionCase((1024,), 4, 64, window=64),
        "notes_packed": AttentionCase(drawn("note_discharge", 4, 512), 4, 64),
    },
    "large": {
        "bert_8x512": AttentionCase((512,) * 8, 12, 64),
        "chunks_32x128": AttentionCase((128,) * 32, 12, 64),
        "cehr_bert_8x512_d16": AttentionCase((512,) * 8, 8, 16),
        "timeline_4096": AttentionCase((4096,), 12, 64),
        "timeline_4096_window64": AttentionCase((4096,), 12, 64, window=64),
        "notes_packed": AttentionCase(drawn("note_discharge", 4, 4096), 12, 64),
        "population_packed": AttentionCase(drawn("ehr_population", 16, 2048), 12, 64),
    },
}
CHECKED_HEADS = 2


def pytest_generate_tests(metafunc):
    metafunc.parametrize("name", CASES[metafunc.config.getoption("--sizes")])


def work_of(way: Way, passes: str, d_out: torch.Tensor):
    """Function that calls the pass once; gradients are returned, not accumulated."""
    if passes == "forward":
        return torch.no_grad()(way.forward)
    gradient = way.laid_out(d_out)
    if passes == "backward":
        grad = functools.partial(torch.autograd.grad, retain_graph=True)
        return functools.partial(grad, way.forward(), way.inputs, gradient)
    return lambda: torch.autograd.grad(way.forward(), way.inputs, gradient)


def check_way(way: str, case: AttentionCase, dtype: torch.dtype, device, passes: str) -> None:
    """Checks a way: ours is held to the error of SDPA, the others to that of plain maths."""
    forward_only = passes == "forward"
    with torch.set_grad_enabled(not forward_only):
        check(
            *(case, dtype, device, [WAYS[way]], CHECKED_HEADS),
            naive=Sdpa if way.startswith("clinattn") else Eager,
            gradients=not forward_only,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("passes", FLOPS)
@pytest.mark.parametrize("way", WAYS)
def test_attention(race, device, sizes, name, passes, dtype, way):
    case, make = CASES[sizes][name], WAYS[way]
    try:
        check_way(way, case, DTYPES[dtype], device, passes)
    except Unavailable as reason:
        pytest.skip(f"{way}: {reason}")
    qkv = inputs(case, DTYPES[dtype], device)
    d_out = cotangent(qkv[0])
    race(
        work_of(make(case, qkv), passes, d_out),
        None if way == "sdpa" else work_of(Sdpa(case, qkv), passes, d_out),
        group=f"{name} {dtype} {passes}",
        tokens=sum(case.lengths),
        flops=case.flops(passes),
        dtype=DTYPES[dtype],
        kind="attention",
        way=way,
        case=name,
        passes=passes,
        sequences=len(case.lengths),
        longest=max(case.lengths),
        padding_share=1 - sum(case.lengths) / (len(case.lengths) * max(case.lengths)),
        heads=case.heads,
        head_dim=case.head_dim,
        window=case.window,
    )
