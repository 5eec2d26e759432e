"""The dense layout: forward and every gradient of every backend, against fp64."""

import pytest
import torch
import torch.nn.functional as F
from cases import DENSE, MEMORY, SIZES, WINDOWS, Case
from plain import sdpa
from support import (
    BACKENDS,
    DTYPES,
    Problem,
    assert_close,
    dtype_id,
    rounding_unit,
)

from clinattn import FusedAttention, fused_attention

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def tensors(*shape, n=3, requires_grad=True):
    return [torch.randn(*shape, requires_grad=requires_grad) for _ in range(n)]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_matches_truth(case, dtype, backend):
    problem = Problem(case, dtype)
    actual = problem.run(backend)
    problem.check(actual)


# Sizes, spans and magnitudes; how a mask is stored changes no number.
ACCURACY = [*SIZES, *WINDOWS, *(c for c in MEMORY if c.logits is not None)]


@pytest.mark.parametrize("case", ACCURACY, ids=str)
def test_fp32_is_as_accurate_as_torch(case, backend):
    problem = Problem(case, torch.float32)
    problem.dlse = None  # torch returns no lse
    actual, theirs = problem.run(backend), problem.by_torch(sdpa)
    for name in ("o", "dq", "dk", "dv"):
        assert_close(name, actual[name], problem.truth[name], *(x[name] for x in theirs))


@pytest.mark.parametrize("strides", ["contiguous", "transposed"])
def test_outputs_and_gradients_are_contiguous(backend, strides):
    problem = Problem(Case("", heads=4, kv_heads=2, strides=strides), torch.float32)
    for name, x in problem.run(backend).items():
        assert x.is_contiguous(), name


def test_many_heads(backend):
    """More heads than a CUDA grid's second axis has blocks."""
    problem = Problem(Case("", batch=1100, heads=60, nq=2, nk=3, dim=4), torch.float32)
    assert problem.batch * problem.heads > 65535
    problem.check(problem.run(backend))


@pytest.mark.parametrize(
    "batch, heads, nq, nk", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (0, 0, 0, 0)]
)
def test_empty_sizes(batch, heads, nq, nk, backend):
    q = torch.randn(batch, heads, nq, 8, requires_grad=True)
    k, v = tensors(batch, heads, nk, 8, n=2)
    o, lse = fused_attention(q, k, v, return_lse=True, backend=backend)
    assert o.shape == q.shape and lse.shape == q.shape[:-1]
    assert (o == 0).all() and (lse == -float("inf")).all()
    for x, grad in zip((q, k, v), torch.autograd.grad(o.sum() + lse.sum(), (q, k, v)), strict=True):
        assert grad.shape == x.shape and (grad == 0).all()


def test_defaults_to_scaled_dot_product_attention(backend):
    q, k, v = tensors(2, 3, 20, 16)
    torch.testing.assert_close(
        fused_attention(q, k, v, backend=backend), F.scaled_dot_product_attention(q, k, v)
    )
    mask = torch.randn(20, 20)
    torch.testing.assert_close(
        fused_attention(q, k, v, mask, 0.0, False, 0.3, False, backend=backend),
        F.scaled_dot_product_attention(q, k, v, mask, 0.0, False, scale=0.3, enable_gqa=False),
    )


def test_the_function_itself(backend):
    q, k, v = tensors(2, 3, 20, 16)
    o = FusedAttention.apply(q, k, v, backend=backend)
    assert torch.equal(o, fused_attention(q, k, v, backend=backend))
    o, lse, _ = FusedAttention.apply(q, k, v, backend=backend, return_lse=True, window_right=0)
    assert torch.equal(o, fused_attention(q, k, v, is_causal=True, backend=backend))
    assert lse.requires_grad


def test_return_lse(backend):
    q, k, v = tensors(2, 3, 20, 16)
    o, lse = fused_attention(q, k, v, return_lse=True, backend=backend)
    assert torch.equal(o, fused_attention(q, k, v, backend=backend))
    torch.testing.assert_close(lse, ((q @ k.mT) / 4).logsumexp(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=dtype_id)
def test_dtypes_of_results(dtype, backend):
    q, k, v = (x.to(dtype) for x in tensors(1, 1, 5, 8))
    o, lse = fused_attention(q, k, v, return_lse=True, backend=backend)
    assert o.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_self_attention_of_one_tensor(backend):
    x = torch.randn(2, 3, 20, 16, requires_grad=True)
    ours = fused_attention(x, x, x, backend=backend)
    theirs = F.scaled_dot_product_attention(x, x, x)
    torch.testing.assert_close(ours, theirs)
    do = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, x, do), torch.autograd.grad(theirs, x, do), rtol=1e-4, atol=1e-5
    )


def test_same_result_with_and_without_grad(backend):
    q, k, v = tensors(2, 3, 40, 16)
    with torch.no_grad():
        inference = fused_attention(q, k, v, backend=backend)
    assert not inference.requires_grad
    with torch.inference_mode():
        assert torch.equal(fused_attention(q, k, v, backend=backend), inference)
    assert torch.equal(fused_attention(q, k, v, backend=backend), inference)


def test_gradient_of_one_input_alone(backend):
    q, k, v = tensors(2, 3, 20, 16, requires_grad=False)
    full = [x.clone().requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(fused_attention(*full, backend=backend).square().sum(), full)
    for at in range(3):
        inputs = [q, k, v]
        inputs[at] = inputs[at].clone().requires_grad_()
        (grad,) = torch.autograd.grad(
            fused_attention(*inputs, backend=backend).square().sum(), inputs[at]
        )
        assert torch.equal(grad, grads[at])


def test_a_key_mask_is_a_length(backend):
    """The ways to say right padding agree to the bit; as numbers to add, but for their rounding."""
    q, k, v = tensors(3, 2, 65, 16)
    lengths = torch.tensor([65, 20, 0])
    mask = (torch.arange(65) < lengths[:, None])[:, None, None]
    expected = fused_attention(q, k, v, kv_lengths=lengths, backend=backend)
    for form in (mask, mask.expand(3, 2, 65, 65)):
        assert torch.equal(fused_attention(q, k, v, form, backend=backend), expected)
    float_mask = torch.zeros(mask.shape).masked_fill(~mask, -float("inf"))
    torch.testing.assert_close(fused_attention(q, k, v, float_mask, backend=backend), expected)


@pytest.mark.parametrize("mask_dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_float_mask_of_any_dtype(dtype, mask_dtype, backend):
    q, k, v = (x.to(dtype) for x in tensors(1, 2, 33, 16))
    mask = torch.randn(33, 33).to(torch.bfloat16).to(mask_dtype)  # the same numbers in all of them
    o = fused_attention(q, k, v, mask, backend=backend)
    expected = fused_attention(q.double(), k.double(), v.double(), mask.double())
    torch.testing.assert_close(o.double(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_digits_of_a_mask_outlive_the_dtype_of_the_query(backend):
    q, k, v = (torch.randn(1, 2, 33, 16).bfloat16() for _ in range(3))
    for dtype in (torch.float16, torch.float64):
        mask = torch.randn(33, 33).to(dtype)  # more digits than bf16 has
        o = fused_attention(q, k, v, mask, backend=backend)
        assert torch.equal(o, fused_attention(q, k, v, mask.float(), backend=backend))
        assert not torch.equal(o, fused_attention(q, k, v, mask.bfloat16(), backend=backend))


def test_transposed_mask(backend):
    q, k, v = tensors(1, 2, 33, 16)
    mask = torch.rand(33, 33) < 0.6
    expected = fused_attention(q, k, v, mask.mT.contiguous(), backend=backend)
    assert torch.equal(fused_attention(q, k, v, mask.mT, backend=backend), expected)


def test_autocast(backend):
    q, k, v = tensors(2, 2, 20, 16)
    with torch.autocast("cpu", torch.bfloat16):
        o, lse = fused_attention(q, k, v, return_lse=True, backend=backend)
        mixed = fused_attention(q.bfloat16(), k, v, backend=backend)
    assert o.dtype == torch.bfloat16 and lse.dtype == torch.float32
    low = fused_attention(*(x.bfloat16() for x in (q, k, v)), backend=backend)
    assert torch.equal(o, low) and torch.equal(mixed, low)
    grads = torch.autograd.grad(o.float().sum(), (q, k, v))
    assert all(grad.dtype == torch.float32 for grad in grads)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_attention(*(x.double() for x in (q, k, v))).dtype == torch.float64


def test_inputs_are_left_as_they_are(backend):
    problem = Problem(Case("", batch=2, kv_lengths=(30, 65), mask="float:1hqk"), torch.float32)
    inputs, keywords = problem.arguments
    tensors_in = [*inputs, keywords["attn_mask"], keywords["kv_lengths"]]
    before = [x.detach().clone() for x in tensors_in]
    problem.run(backend)
    for x, copy in zip(tensors_in, before, strict=True):
        assert x.equal(copy) or torch.equal(x.isnan(), copy.isnan())


def test_tolerance_can_fail(backend):
    truth = torch.randn(10, dtype=torch.float64)
    near = truth.float()
    assert_close("exact", near, truth, near)
    unit = rounding_unit(truth, torch.float32)
    for wrong in (near + 4 * unit, near * torch.nan, near.clone().fill_(-float("inf"))):
        with pytest.raises(AssertionError):
            assert_close("wrong", wrong, truth, near)


@pytest.mark.parametrize("nq, nk", [(5, 9), (9, 5), (1, 9)])
@pytest.mark.parametrize("keywords", [{"is_causal": True}, {"window": (2, 1)}], ids=str)
def test_bottom_right(nq, nk, keywords, backend):
    """The last query stands at the last key of the tensors, whatever a mask hides of them."""
    q, k, v = torch.randn(2, 3, nq, 16), *torch.randn(2, 2, 3, nk, 16)
    keep = torch.ones(2, 1, 1, nk, dtype=torch.bool)
    keep[0, ..., -3:] = False
    keep[1, ..., :2] = False
    distance = torch.arange(nk) - torch.arange(nq)[:, None] - (nk - nq)
    left, right = keywords.get("window", (nk + nq, 0))
    visible = (distance >= -left) & (distance <= right)
    expected = fused_attention(q, k, v, visible & keep, backend=backend)
    o = fused_attention(q, k, v, keep, bottom_right=True, backend=backend, **keywords)
    torch.testing.assert_close(o, expected)
    # A length, unlike a mask, says where the sequence ends.
    lengths = torch.tensor([nk - 3, nk])
    o = fused_attention(
        q, k, v, kv_lengths=lengths, bottom_right=True, backend=backend, **keywords
    )
    for b, n in enumerate(lengths.tolist()):
        at = (slice(b, b + 1), slice(None), slice(n))
        alone = fused_attention(
            q[b : b + 1], k[at], v[at], bottom_right=True, backend=backend, **keywords
        )
        torch.testing.assert_close(o[b : b + 1], alone)


@pytest.mark.unpoisoned
def test_a_trace_keeps_no_values_of_masks(backend):
    """A mask that was a range when torch.jit.trace saw it may have holes later."""
    q, k, v = tensors(2, 3, 20, 16)
    ranges = torch.arange(20)[None] < torch.tensor([[20], [9]])
    call = lambda q, k, v, mask: fused_attention(q, k, v, mask[:, None, None], backend=backend)
    traced = torch.jit.trace(call, (q, k, v, ranges), check_trace=False)
    holes = torch.rand(2, 20) < 0.5
    torch.testing.assert_close(traced(q, k, v, holes), call(q, k, v, holes))
