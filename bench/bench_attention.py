"""Attention, forward and with gradients, against torch's SDPA on clinical shapes.

    pytest bench/bench_attention.py --benchmark-json bench/results/NAME.json
    pytest bench/bench_attention.py -k "note and forward and fp32"

Ours is checked against fp64 at the lengths it is timed on, before it is timed.
"""

from __future__ import annotations

import pytest
import torch
from problem import Case, Sdpa, Way, check, drawn, inputs, ours

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = {
    "bert_8x512": Case((512,) * 8, 12, 64),
    "chunks_32x128": Case((128,) * 32, 12, 64),
    "cehr_bert_8x512_d16": Case((512,) * 8, 8, 16),
    "timeline_4096": Case((4096,), 12, 64),
    "timeline_4096_window64": Case((4096,), 12, 64, window=64),
    "notes_packed": Case(drawn("note_discharge", 4, 4096), 12, 64),
    "population_packed": Case(drawn("ehr_population", 16, 2048), 12, 64),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("passes", ["forward", "forward_backward"])
@pytest.mark.parametrize("name", CASES)
def test_attention(race, device, name, passes, dtype):
    case = CASES[name]
    qkv = inputs(case, DTYPES[dtype], device)
    check(case, DTYPES[dtype], device)
    ways = ours(case, qkv), Sdpa(case, qkv)
    backward = passes == "forward_backward"

    def work(way: Way):
        d_out = torch.randn_like(way.forward())

        def step() -> None:
            if backward:
                way.forward().backward(d_out)
                for x in way.inputs:
                    x.grad = None
            else:
                with torch.no_grad():
                    way.forward()

        return step

    race(
        work(ways[0]),
        {"sdpa": work(ways[1])},
        tokens=sum(case.lengths),
        flops=case.flops(passes),
        dtype=DTYPES[dtype],
        case=name,
        passes=passes,
        sequences=len(case.lengths),
        longest=max(case.lengths),
        heads=case.heads,
        head_dim=case.head_dim,
        window=case.window,
    )
