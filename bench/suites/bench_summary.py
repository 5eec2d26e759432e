"""Summaries of attention weights beside a forward pass of the same call: ratio_to_peer is over it.

    pytest bench/suites/bench_summary.py --benchmark-only
    pytest bench/suites/bench_summary.py --benchmark-only --sizes large     to 65,536 tokens
"""

from __future__ import annotations

import pytest
import torch

from clinattn import attention_summary, fused_attention

# tokens, head dimension, heads
SIZES = {
    "small": [(512, 64, 4)],
    "large": [(512, 64, 4), (2048, 64, 2), (2048, 128, 2), (8192, 64, 1), (65536, 64, 1)],
}
REDUCTIONS = ("received", "entropy", "max", "topk", "relevance")
SUMS = ("received", "relevance")


def pytest_generate_tests(metafunc):
    metafunc.parametrize("size", SIZES[metafunc.config.getoption("--sizes")])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_summary(race, device, size, reduce, dtype):
    tokens, head_dim, heads = size
    torch.manual_seed(0)
    numbers = getattr(torch, dtype)
    q, k, v, do = torch.randn(4, 1, heads, tokens, head_dim, device=device).to(numbers)
    _, lse = fused_attention(q, k, v, return_lse=True)
    weights = torch.rand(1, heads, tokens, device=device) if reduce in SUMS else None
    keywords = {"lse": lse, "weights": weights, "reduce": reduce}
    few = slice(0, 300)  # queries that are looked at
    of_few = {**keywords, "lse": lse[:, :, few]}
    if weights is not None:
        of_few["weights"] = weights[:, :, few]
    found = attention_summary(q[:, :, few], k, v, do[:, :, few], **of_few)
    wanted = attention_summary(
        *(x.double() for x in (q[:, :, few], k, v, do[:, :, few])),
        **{**of_few, "lse": lse[:, :, few].double()},
        backend="reference",
    )
    found, wanted = (x[0] if reduce == "topk" else x for x in (found, wanted))
    # the normaliser has four units of fp32, and weights lose as many relative to their size
    units = 64 * torch.finfo(torch.float32).eps
    assert (found - wanted).abs().max() <= units * wanted.abs().max()
    race(
        lambda: attention_summary(q, k, v, do, **keywords),
        lambda: fused_attention(q, k, v),
        group=f"summary {dtype} N{tokens} D{head_dim}",
        tokens=tokens,
        dtype=numbers,
        rounds=3 if tokens > 10000 else 15,
        kind="summary",
        way=f"clinattn {reduce}",
    )
