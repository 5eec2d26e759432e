"""The packed layout: forward and every gradient of every backend, against fp64."""

import pytest
import torch
from cases import PACKED
from support import BACKENDS, DTYPES, Problem, dtype_id

from clinattn import fused_attention, fused_attention_varlen

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def packed(lengths, heads=2, dim=16):
    """q, k, v of sequences of these lengths, and their cu_seqlens."""
    qkv = [torch.randn(sum(lengths), heads, dim, requires_grad=True) for _ in range(3)]
    return *qkv, torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_matches_truth(case, dtype, backend):
    problem = Problem(case, dtype)
    problem.check(problem.run(backend))


@pytest.mark.parametrize("keywords", [{}, {"is_causal": True}, {"window": 5}], ids=str)
def test_is_dense_attention_of_each_sequence(keywords, backend):
    lengths = (33, 1, 0, 64)
    q, k, v, cu_seqlens = packed(lengths)
    o, lse = fused_attention_varlen(
        q, k, v, cu_seqlens, return_lse=True, backend=backend, **keywords
    )
    start = 0
    for n in lengths:
        rows = slice(start, start + n)
        alone = [x[rows].transpose(0, 1)[None] for x in (q, k, v)]
        expected, expected_lse = fused_attention(
            *alone, return_lse=True, backend=backend, **keywords
        )
        torch.testing.assert_close(o[rows].transpose(0, 1)[None], expected)
        torch.testing.assert_close(lse[None, :, rows], expected_lse)
        start += n


def test_defaults(backend):
    """cu_seqlens_k is cu_seqlens_q, the longest is found, and a looser bound changes nothing."""
    q, k, v, cu_seqlens = packed((33, 7))
    expected = fused_attention_varlen(q, k, v, cu_seqlens, backend=backend)
    for more in ((cu_seqlens,), (cu_seqlens, 33, 33), (cu_seqlens, 40, 1000), (None, 33)):
        o = fused_attention_varlen(q, k, v, cu_seqlens, *more, backend=backend)
        assert torch.equal(o, expected)


@pytest.mark.parametrize("total", [0, 5])
def test_no_sequences(total, backend):
    q, k, v, _ = packed((total,))
    cu_seqlens = torch.zeros(1, dtype=torch.int32)
    o, lse = fused_attention_varlen(q, k, v, cu_seqlens, return_lse=True, backend=backend)
    assert o.shape == q.shape and lse.shape == (2, total)
    assert (o == 0).all() and (lse == -float("inf")).all()
    grads = torch.autograd.grad(o.sum() + lse.sum(), (q, k, v))
    assert all((grad == 0).all() for grad in grads)


def test_autocast(backend):
    q, k, v, cu_seqlens = packed((33, 7))
    with torch.autocast("cpu", torch.bfloat16):
        o = fused_attention_varlen(q, k, v, cu_seqlens, backend=backend)
    assert o.dtype == torch.bfloat16


def test_many_sequences(backend):
    lengths = tuple(i % 3 for i in range(3000))
    q, k, v, cu_seqlens = packed(lengths, heads=2, dim=8)
    o = fused_attention_varlen(q, k, v, cu_seqlens, backend=backend)
    ends = cu_seqlens.tolist()
    for start, end in zip(ends[-40:-1], ends[-39:], strict=True):
        alone = [x[start:end].transpose(0, 1) for x in (q, k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(*alone)
        torch.testing.assert_close(o[start:end].transpose(0, 1), expected)
