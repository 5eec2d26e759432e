"""Short sequences, which fill a part of a tile: bits and errors, by every instruction set."""

import pytest
import torch
from cases import Case
from instruction_sets import BUILT
from support import Problem, dtype_id

from clinattn import fused_attention, fused_attention_varlen

LENGTHS = (*range(1, 21), 47, 49)
DIMS = (1, 8, 16, 33, 64, 128)

pytestmark = [BUILT, pytest.mark.usefixtures("instruction_set")]
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=dtype_id
)
dims = pytest.mark.parametrize("dim", DIMS)
orders = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


def differentiated(attention, q, k, v, do):
    """o, dq, dk and dv."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = attention(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


@dtypes
@dims
@orders
def test_alone_padded_and_packed(dtype, dim, is_causal):
    """Whatever lies behind a sequence, and whatever the scratch memory held before."""
    longest, heads = max(LENGTHS), 2
    rows = [[torch.randn(heads, n, dim).to(dtype) for _ in range(4)] for n in LENGTHS]
    padded = [torch.full((len(LENGTHS), heads, longest, dim), torch.nan).to(dtype) for _ in rows[0]]
    for i, (n, row) in enumerate(zip(LENGTHS, rows, strict=True)):
        for x, y in zip(padded, row, strict=True):
            x[i, :, :n] = y
    lengths = torch.tensor(LENGTHS)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    packed = [torch.cat([row[i] for row in rows], 1).transpose(0, 1) for i in range(4)]
    together = differentiated(
        lambda q, k, v: fused_attention(
            q, k, v, is_causal=is_causal, kv_lengths=lengths, q_lengths=lengths
        ),
        *padded,
    )
    joined = differentiated(
        lambda q, k, v: fused_attention_varlen(q, k, v, ends, is_causal=is_causal), *packed
    )
    for i, (n, row) in enumerate(zip(LENGTHS, rows, strict=True)):
        alone = differentiated(
            lambda q, k, v: fused_attention(q, k, v, is_causal=is_causal), *(x[None] for x in row)
        )
        for name, x, y, z in zip(("o", "dq", "dk", "dv"), alone, together, joined, strict=True):
            assert torch.equal(x[0], y[i, :, :n]), f"{name} of {n} tokens, padded"
            assert torch.equal(x[0], z[ends[i] : ends[i + 1]].transpose(0, 1)), f"{name} of {n}"


@dtypes
@dims
@orders
@pytest.mark.parametrize("shape", [(1, 1), (3, 9), (2, 3), (5, 1), (13, 17), (16, 16), (12, 40)])
def test_error(dtype, dim, is_causal, shape):
    n_queries, n_keys = shape
    problem = Problem(Case("short", nq=n_queries, nk=n_keys, dim=dim, causal=is_causal), dtype)
    problem.check(problem.run("cpu"))
