"""xformers' memory_efficient_attention and its biases against plain maths."""

import pytest
import torch
from compared import Explicit, block_diagonal, gradients_of
from xformers_calls import BOTTOM_RIGHT, INF, attend, check, draw, heads_first, qkv, sees

from clinattn.integrations import xformers as xf

DENSE = {
    "none": (None, {}),
    "causal": (xf.LowerTriangularMask(), {"right": 0}),
    "causal at the end": (
        xf.LowerTriangularFromBottomRightMask(),
        {"right": 0, **BOTTOM_RIGHT},
    ),
    "causal, local": (
        xf.LowerTriangularFromBottomRightMask().make_local_attention(4),
        {"left": 3, "right": 0, **BOTTOM_RIGHT},
    ),
    "local": (
        xf.LocalAttentionFromBottomRightMask(window_left=2, window_right=5),
        {"left": 2, "right": 5, **BOTTOM_RIGHT},
    ),
}
SIZES = [(7, 7), (5, 13), (13, 5), (33, 65)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nq, nk", SIZES)
@pytest.mark.parametrize("bias, band", DENSE.values(), ids=list(DENSE))
def test_dense(bias, band, nq, nk, dtype):
    q, k, v = qkv(2, nq, nk, 3, dtype=dtype)
    visible = sees(nq, nk, **band)
    problem = Explicit(*heads_first(q, k, v), visible, scale=0.3)
    out, lse = attend(q, k, v, bias, scale=0.3)
    assert out.is_contiguous()
    check(problem, out, lse, q=q, k=k, v=v)
    if bias is not None:
        dense = bias.materialize((2, 3, nq, nk), dtype)
        assert dense.shape == (2, 3, nq, nk) and dense.dtype == dtype
        assert torch.equal(dense == 0, visible.expand(2, 3, nq, nk))
        assert dense[~visible.expand(2, 3, nq, nk)].eq(-INF).all()


BLOCKS = {
    "full": (lambda bias: bias, {}),
    "causal": (lambda bias: bias.make_causal(), {"right": 0}),
    "causal at the end": (
        lambda bias: bias.make_causal_from_bottomright(),
        {"right": 0, **BOTTOM_RIGHT},
    ),
    "causal, local": (lambda bias: bias.make_local_attention(3), {"left": 2, "right": 0}),
    "causal, local, at the end": (
        lambda bias: bias.make_local_attention_from_bottomright(3),
        {"left": 2, "right": 0, **BOTTOM_RIGHT},
    ),
}
LENGTHS = {
    "same": ([5, 1, 12], None),
    "more keys": ([5, 2, 3], [9, 2, 13]),
    "more queries": ([9, 4], [2, 3]),
    "empty": ([0, 5, 0, 4, 0], [3, 0, 0, 6, 0]),
}


@pytest.mark.parametrize("lengths_q, lengths_k", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("make, band", BLOCKS.values(), ids=list(BLOCKS))
def test_blocks(make, band, lengths_q, lengths_k):
    bias = make(xf.BlockDiagonalMask.from_seqlens(lengths_q, lengths_k))
    lengths_k = lengths_k or lengths_q
    nq, nk = sum(lengths_q), sum(lengths_k)
    q, k, v = qkv(1, nq, nk, 3)
    blocks = [sees(n, m, **band) for n, m in zip(lengths_q, lengths_k, strict=True)]
    visible = block_diagonal(blocks)
    problem = Explicit(*heads_first(q, k, v), visible)
    check(problem, *attend(q, k, v, bias), q=q, k=k, v=v)
    assert torch.equal(bias.materialize((nq, nk)) == 0, visible)


# ---- tensors


def test_tensor_bias():
    """A gradient of the shape given, also where sizes of 1 stand for all."""
    for shape in [(2, 3, 5, 9), (1, 3, 5, 9), (2, 1, 1, 9), (1, 1, 5, 9)]:
        q, k, v = qkv(2, 5, 9, 3)
        bias = draw(*shape, seed=7).requires_grad_()
        problem = Explicit(*heads_first(q, k, v), torch.tensor(True), bias=bias)
        check(problem, *attend(q, k, v, bias), q=q, k=k, v=v, bias=bias)


def test_tensor_bias_with_a_mask():
    """-inf hides; causal and a tensor go together."""
    q, k, v = qkv(2, 6, 6, 3)
    bias = draw(2, 3, 6, 6, seed=7).requires_grad_()
    masks = [
        xf.LowerTriangularMaskWithTensorBias(bias),
        xf.LowerTriangularMask().add_bias(bias),
    ]
    for mask in masks:
        problem = Explicit(*heads_first(q, k, v), sees(6, 6, right=0), bias=bias)
        check(problem, *attend(q, k, v, mask), q=q, k=k, v=v, bias=bias)
    dense = masks[0].materialize((2, 3, 6, 6))
    torch.testing.assert_close(
        xf.memory_efficient_attention(q, k, v, dense),
        xf.memory_efficient_attention(q, k, v, masks[0]),
    )


# ---- layouts


def test_without_heads():
    q, k, v = qkv(4, 5, 9)
    bias = draw(4, 5, 9, seed=7)
    problem = Explicit(*(x[:, None] for x in (q, k, v)), torch.tensor(True), bias=bias[:, None])
    out, lse = attend(q, k, v, bias)
    assert out.shape == (4, 5, 24)
    check(problem, out, lse, flat=lambda x: x[:, :, None], q=q, k=k, v=v)


@pytest.mark.parametrize("expanded", [False, True], ids=["one-head", "expanded"])
@pytest.mark.parametrize("blocks", [False, True], ids=["dense", "blocks"])
def test_groups_share_keys(blocks, expanded):
    """(B, M, G, H, K) with keys of one head per group: query head (g, h) uses that of g."""
    batch, nq, nk = (1, 7, 12) if blocks else (2, 5, 9)
    q = draw(batch, nq, 2, 3, 24).requires_grad_()
    k, v = (draw(batch, nk, 2, 1, 24, seed=at).requires_grad_() for at in (1, 2))
    given = [x.expand(-1, -1, -1, 3, -1) if expanded else x for x in (k, v)]
    bias, visible = None, torch.tensor(True)
    if blocks:
        bias = xf.BlockDiagonalCausalMask.from_seqlens([3, 4], [7, 5])
        visible = block_diagonal([sees(3, 7, right=0), sees(4, 5, right=0)])
    problem = Explicit(*heads_first(q.flatten(2, 3), k[:, :, :, 0], v[:, :, :, 0]), visible)
    out, lse = attend(q, *given, bias)
    assert out.shape == q.shape and lse.shape == (batch, 2, 3, nq)
    check(problem, out, lse, flat=lambda x: x.flatten(2, 3), q=q, k=k, v=v)


def test_groups_with_heads_of_their_own():
    q, k, v = qkv(2, 5, 9, 2, 3)
    bias = draw(2, 2, 3, 5, 9, seed=7).requires_grad_()
    flat = lambda x: x.flatten(2, 3)
    whole = bias.flatten(1, 2)
    problem = Explicit(*heads_first(*map(flat, (q, k, v))), torch.tensor(True), bias=whole)
    check(problem, *attend(q, k, v, whole.view_as(bias)), flat=flat, q=q, k=k, v=v, bias=whole)


@pytest.mark.parametrize("dim, dim_v", [(16, 40), (40, 16), (24, 1)])
def test_values_of_another_size(dim, dim_v):
    q, k, v = qkv(2, 5, 9, 3, dim=dim, dim_v=dim_v)
    problem = Explicit(*heads_first(q, k, v), sees(5, 9, right=0))
    out, lse = attend(q, k, v, xf.LowerTriangularMask())
    assert out.shape == (2, 5, 3, dim_v) and out.is_contiguous()
    check(problem, out, lse, q=q, k=k, v=v)


# ---- lists of tensors


def test_lists_of_tensors():
    tensors = [draw(2, 3, 4, 8), draw(1, 6, 4, 8, seed=1), draw(3, 1, 4, 8, seed=2)]
    bias, x = xf.BlockDiagonalMask.from_tensor_list(tensors)
    assert x.shape == (1, 15, 4, 8) and bias.q_seqinfo.seqstart_py == [0, 3, 6, 12, 13, 14, 15]
    assert bias.q_seqinfo.seqstart.dtype == torch.int32
    for part, expected in zip(bias.split(x), tensors, strict=True):
        assert torch.equal(part, expected)
    out = bias.split(xf.memory_efficient_attention(x, x, x, bias))
    for part, y in zip(out, tensors, strict=True):
        torch.testing.assert_close(part, xf.memory_efficient_attention(y, y, y))
    assert [len(part) for part in bias.make_causal().split(x)] == [2, 1, 3]


def test_lists_of_queries_and_keys():
    queries = [draw(2, 3, 4, 8), draw(1, 2, 4, 8, seed=1)]
    keys = [draw(2, 5, 4, 8, seed=2), draw(1, 1, 4, 8, seed=3)]
    bias, q, k, v = xf.BlockDiagonalMask.from_tensor_lists_qkv(queries, keys, keys)
    assert torch.equal(k, v) and q.shape[1] == 8 and k.shape[1] == 11
    for parts, expected in ((bias.split_queries(q), queries), (bias.split_kv(k), keys)):
        assert all(torch.equal(x, y) for x, y in zip(parts, expected, strict=True))
    assert len(xf.BlockDiagonalMask.from_tensor_lists_qk(queries, keys)) == 3
    with pytest.raises(ValueError, match="split_queries"):
        bias.split(q)


# ---- parts of the keys


def test_merged_parts_are_the_whole():
    """Merges parts of which no query sees one, for queries of which some see nothing at all."""
    q, k, v = qkv(2, 6, 9, 3)
    hidden = torch.zeros(1, 1, 6, 9)
    hidden[..., 4:7] = hidden[:, :, 0] = -INF
    problem = Explicit(*heads_first(q, k, v), hidden == 0)
    outs, lses = zip(
        *(
            xf.memory_efficient_attention_partial(q, k[:, at], v[:, at], hidden[..., at])
            for at in (slice(0, 4), slice(4, 7), slice(7, 9))
        ),
        strict=True,
    )
    out, lse = xf.merge_attentions(torch.stack(outs), torch.stack(lses))
    cotangents = [problem.do.transpose(1, 2), torch.where(lse.isfinite(), problem.dlse, 0)]
    seen = torch.where(lse.isfinite(), lse, 0)
    grads = gradients_of([out, seen], cotangents, q=q, k=k, v=v)
    results = dict(zip(("o", *grads), heads_first(out, *grads.values()), strict=True))
    problem.check({"lse": lse, **results})
    assert xf.merge_attentions(list(outs), list(lses), write_lse=False)[1] is None


def test_forward_alone():
    q, k, v = qkv(2, 6, 9, 3)
    mask = xf.LowerTriangularFromBottomRightMask()
    expected = xf.memory_efficient_attention(q, k, v, mask)
    out = xf.memory_efficient_attention_forward(q, k, v, mask)
    assert torch.equal(out, expected) and not out.requires_grad
    out, lse = xf.memory_efficient_attention_forward_requires_grad(q, k, v, mask)
    assert torch.equal(out, expected) and lse.shape == (2, 3, 6) and not lse.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_output_dtype(dtype):
    """The result in another dtype, with its gradient; of parts, fp32 is the default."""
    q, k, v = qkv(2, 6, 9, 3, dtype=dtype)
    expected = xf.memory_efficient_attention(q, k, v)
    assert expected.dtype == dtype
    parts = [
        xf.memory_efficient_attention,
        xf.memory_efficient_attention_forward,
        lambda *given, **words: xf.memory_efficient_attention_partial(*given, **words)[0],
        lambda *given, **words: xf.memory_efficient_attention_forward_requires_grad(
            *given, **words
        )[0],
    ]
    for function in parts:
        for other in (torch.float64, torch.bfloat16):
            out = function(q, k, v, output_dtype=other)
            assert out.dtype == other and torch.equal(out, expected.to(other))
    out, lse = xf.memory_efficient_attention_partial(q, k, v)
    assert out.dtype == lse.dtype == torch.promote_types(dtype, torch.float32)
    do = torch.ones(expected.shape)
    wide = xf.memory_efficient_attention(q, k, v, output_dtype=torch.float64)
    for x, y in zip(
        torch.autograd.grad(wide, (q, k, v), do.double()),
        torch.autograd.grad(expected, (q, k, v), do.to(dtype)),
        strict=True,
    ):
        assert torch.equal(x, y)


# ---- the real package's objects, and what is refused


def test_objects_of_xformers_itself():
    """Biases of xformers are known by name and fields; in newer versions two are tensors."""

    class LowerTriangularMask(torch.Tensor):
        pass

    class LowerTriangularMaskWithTensorBias(torch.Tensor):
        pass

    q, k, v = qkv(2, 6, 6, 3)
    theirs = torch.empty(0).as_subclass(LowerTriangularMask)
    expected = xf.memory_efficient_attention(q, k, v, xf.LowerTriangularMask())
    assert torch.equal(xf.memory_efficient_attention(q, k, v, theirs), expected)
    theirs = torch.empty(0).as_subclass(LowerTriangularMaskWithTensorBias)
    theirs._subtensor = draw(2, 3, 6, 6)
    ours = xf.LowerTriangularMask().add_bias(theirs._subtensor)
    expected = xf.memory_efficient_attention(q, k, v, ours)
    assert torch.equal(xf.memory_efficient_attention(q, k, v, theirs), expected)


class TensorBias(torch.Tensor, xf.AttentionBias):
    pass


class BlockDiagonalOtherMask(xf.BlockDiagonalMask):
    pass


Q = draw(1, 4, 2, 8)
BLOCK = xf.BlockDiagonalMask.from_seqlens([3, 2])
OTHER = BlockDiagonalOtherMask.from_seqlens([4])
WRONG = {
    "bias": (lambda: xf.memory_efficient_attention(Q, Q, Q, "causal"), NotImplementedError, "str"),
    "subclass": (
        lambda: xf.memory_efficient_attention(Q, Q, Q, OTHER),
        NotImplementedError,
        "a BlockDiagonalOtherMask",
    ),
    "tensor of another kind": (
        lambda: xf.memory_efficient_attention(Q, Q, Q, torch.zeros(1).as_subclass(TensorBias)),
        NotImplementedError,
        "a TensorBias",
    ),
    "bool": (
        lambda: xf.memory_efficient_attention(Q, Q, Q, torch.ones(1, 2, 4, 4, dtype=torch.bool)),
        TypeError,
        "torch.bool",
    ),
    "bias rank": (
        lambda: xf.memory_efficient_attention(Q, Q, Q, torch.ones(4, 4)),
        ValueError,
        "4 dimensions",
    ),
    "bias size": (
        lambda: xf.memory_efficient_attention(Q, Q, Q, torch.ones(1, 2, 4, 5)),
        ValueError,
        "attn_mask: got shape",
    ),
    "tokens": (
        lambda: xf.memory_efficient_attention(Q, Q, Q, BLOCK),
        ValueError,
        "4 tokens, expected 1 and the 5",
    ),
    "heads": (
        lambda: xf.memory_efficient_attention(Q, Q[:, :, :1], Q[:, :, :1]),
        ValueError,
        "key: got heads",
    ),
    "rank": (lambda: xf.memory_efficient_attention(Q, Q[0], Q), ValueError, "key: got shape"),
    "parts": (
        lambda: xf.memory_efficient_attention_partial(Q, Q, Q, p=0.1),
        NotImplementedError,
        "p: got 0.1",
    ),
    "output": (
        lambda: xf.memory_efficient_attention(Q, Q, Q, output_dtype=torch.int32),
        TypeError,
        "output_dtype: got torch.int32",
    ),
    "window": (lambda: BLOCK.make_local_attention(0), ValueError, "window_size: got 0"),
    "padding": (
        lambda: xf.BlockDiagonalPaddedKeysMask.from_seqlens([1], 4, [5]),
        ValueError,
        "at most the padding, 4",
    ),
    "sequences": (
        lambda: xf.BlockDiagonalMask.from_seqlens([1, 2], [3]),
        ValueError,
        "expected those of q, 2",
    ),
}


@pytest.mark.parametrize("call, error, message", WRONG.values(), ids=list(WRONG))
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
