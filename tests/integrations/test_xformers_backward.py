"""memory_efficient_attention_backward against the gradients of memory_efficient_attention."""

import pytest
import torch
from compared import Explicit
from xformers_calls import draw, heads_first, qkv, sees

from clinattn.integrations import xformers as xf

BLOCKS = xf.BlockDiagonalMask.from_seqlens([3, 4], [4, 5])
OVERLAPPING = xf.BlockDiagonalGappyKeysMask.from_seqlens([3, 4], [4, 1, 9], [4, 5])
CASES = {
    "plain": ((2, 7, 9, 3), {}, None),
    "without heads": ((2, 7, 9), {}, None),
    "groups": ((2, 7, 9, 2, 3), {}, None),
    "other values": ((2, 7, 9, 3), {"dim_v": 40}, None),
    "causal": ((2, 7, 9, 3), {}, xf.LowerTriangularMask()),
    "local": ((2, 7, 9, 3), {}, xf.LocalAttentionFromBottomRightMask(2, 1)),
    "tensor": ((2, 7, 9, 3), {}, draw(2, 3, 7, 9, seed=7)),
    "tensor for all": ((2, 7, 9, 3), {}, draw(2, 1, 1, 9, seed=7)),
    "causal with a tensor": ((2, 7, 7, 3), {}, xf.LowerTriangularMask().add_bias(draw(1, 1, 7, 7))),
    "blocks": ((1, 7, 9, 3), {}, xf.BlockDiagonalCausalMask.from_seqlens([3, 4], [4, 5])),
    "blocks, other values": ((1, 7, 9, 3), {"dim_v": 8}, BLOCKS),
    "blocks in groups": ((1, 7, 9, 2, 3), {}, BLOCKS),
    "padded": ((1, 7, 12, 3), {}, xf.BlockDiagonalPaddedKeysMask.from_seqlens([3, 4], 6, [2, 5])),
    "overlapping": ((1, 7, 9, 3), {}, OVERLAPPING),
}  # fmt: skip


def bitwise(case, dtype, scale=0.3):
    """Returns pairs: a gradient by the function, and the same by autograd."""
    shape, words, bias = case
    q, k, v = qkv(*shape, **words, dtype=dtype)
    out, lse = xf.memory_efficient_attention_forward_requires_grad(q, k, v, bias, scale=scale)
    grad = draw(*out.shape, dtype=dtype, seed=9)
    found = xf.memory_efficient_attention_backward(grad, out, lse, q, k, v, bias, scale=scale)
    whole = xf.memory_efficient_attention(q, k, v, bias, scale=scale)
    return zip(found, torch.autograd.grad(whole, (q, k, v), grad), strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_gradients(case, dtype):
    """The same as autograd's, but for what rounding takes from lse."""
    for found, expected in bitwise(case, dtype):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)
        assert not found.requires_grad


def test_parts_of_the_keys():
    """With the output and lse of all keys: dq of the parts add up, as in a ring of devices."""
    q, k, v = qkv(2, 6, 9, 3)
    hidden = torch.zeros(1, 1, 6, 9).masked_fill(~sees(6, 9, right=3), -torch.inf)
    problem = Explicit(*heads_first(q, k, v), hidden == 0)
    problem.dlse.zero_()
    parts = [slice(0, 4), slice(4, 9)]
    outs, lses = zip(
        *(
            xf.memory_efficient_attention_partial(q, k[:, at], v[:, at], hidden[..., at])
            for at in parts
        ),
        strict=True,
    )
    out, lse = xf.merge_attentions(list(outs), list(lses))
    grad = problem.do.transpose(1, 2)
    dqs, dks, dvs = zip(
        *(
            xf.memory_efficient_attention_backward(
                grad, out, lse, q, k[:, at], v[:, at], hidden[..., at]
            )
            for at in parts
        ),
        strict=True,
    )
    results = {"dq": sum(dqs), "dk": torch.cat(dks, 1), "dv": torch.cat(dvs, 1)}
    problem.check(dict(zip(results, heads_first(*results.values()), strict=True)))


def test_expanded_heads_have_gradients_of_their_own():
    q = draw(2, 5, 2, 3, 8)
    k, v = (draw(2, 9, 2, 1, 8, seed=at).expand(-1, -1, -1, 3, -1) for at in (1, 2))
    apart = [x.contiguous() for x in (k, v)]
    out, lse = xf.memory_efficient_attention_forward_requires_grad(q, k, v)
    grad = draw(*out.shape, seed=9)
    found = xf.memory_efficient_attention_backward(grad, out, lse, q, k, v)
    expected = xf.memory_efficient_attention_backward(grad, out, lse, q, *apart)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
    one = xf.memory_efficient_attention_backward(grad, out, lse, q, k[:, :, :, :1], v[:, :, :, :1])
    for x, y in zip(one[1:], found[1:], strict=True):
        assert x.shape == (2, 9, 2, 1, 8)
        torch.testing.assert_close(x, y.sum(3, keepdim=True))


def test_a_query_that_sees_nothing():
    bias = xf.BlockDiagonalCausalFromBottomRightMask.from_seqlens([5, 2], [3, 2])
    case = ((1, 7, 5, 3), {}, bias)
    for found, expected in bitwise(case, torch.float32):
        torch.testing.assert_close(found, expected)
        assert found.isfinite().all()


Q = draw(1, 4, 2, 8)
OUT, LSE = xf.memory_efficient_attention_forward_requires_grad(Q, Q, Q)
BACKWARD = xf.memory_efficient_attention_backward
WRONG = {
    "dropout": (lambda: BACKWARD(OUT, OUT, LSE, Q, Q, Q, p=0.1), NotImplementedError, "p: got 0.1"),
    "dropout before": (
        lambda: xf.memory_efficient_attention_forward_requires_grad(Q, Q, Q, p=0.1),
        NotImplementedError,
        "p: got 0.1",
    ),
    "grad": (lambda: BACKWARD(OUT[:, :3], OUT, LSE, Q, Q, Q), ValueError, "grad: got"),
    "output": (lambda: BACKWARD(OUT, OUT[0], LSE, Q, Q, Q), ValueError, "output: got"),
    "integers": (lambda: BACKWARD(OUT.int(), OUT, LSE, Q, Q, Q), ValueError, "grad: got torch.i"),
    "lse": (lambda: BACKWARD(OUT, OUT, LSE[..., :3], Q, Q, Q), ValueError, r"lse: got .*2, 4\)"),
    "half lse": (lambda: BACKWARD(OUT, OUT, LSE.half(), Q, Q, Q), ValueError, "lse: got torch.fl"),
    "bias": (
        lambda: BACKWARD(OUT, OUT, LSE, Q, Q, Q, torch.zeros(1, 2, 4, 5)),
        ValueError,
        "attn_mask: got shape",
    ),
    "device": (
        lambda: BACKWARD(OUT, OUT, LSE.to("meta"), Q, Q, Q), ValueError, "lse: got device meta",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call, error, message", WRONG.values(), ids=list(WRONG))
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
