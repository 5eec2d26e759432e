"""torch.func, double backward, saved tensors: the Functions around the ops."""

import functools

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, FEATURES
from features import SEED
from plain import plain_attention
from support import BACKENDS, Problem
from torch.func import grad, vjp, vmap

from clinattn import FusedAttention, fused_attention, fused_attention_varlen

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def doubles(*shape, n=3):
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for _ in range(n)]


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"is_causal": True},
        {"window": 1},
        {"attn_mask": torch.randn(3, 4, dtype=torch.float64)},
        {"attn_mask": torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1]]).bool()[:, None, None]},
        {"kv_lengths": torch.tensor([3, 0]), "q_lengths": torch.tensor([3, 2])},
    ],
    ids=["plain", "causal", "window", "bias", "mask", "lengths"],
)
def test_gradcheck(keywords, backend):
    q, k, v = (
        torch.randn(2, h, n, 2, dtype=torch.float64, requires_grad=True)
        for h, n in ((2, 3), (1, 4), (1, 4))
    )

    def call(q, k, v):
        o, lse = fused_attention(
            q, k, v, enable_gqa=True, return_lse=True, backend=backend, **keywords
        )
        return o, lse.masked_fill(lse == -float("inf"), 0)

    assert torch.autograd.gradcheck(call, (q, k, v))
    assert torch.autograd.gradgradcheck(call, (q, k, v), fast_mode=True)


def test_gradcheck_packed(backend):
    q, k, v = doubles(9, 2, 5)
    cu_q, cu_k = torch.tensor([0, 4, 4, 8]).int(), torch.tensor([0, 2, 6, 9]).int()

    def call(q, k, v):
        return fused_attention_varlen(q, k, v, cu_q, cu_k, window=2, backend=backend)

    assert torch.autograd.gradcheck(call, (q, k, v))
    assert torch.autograd.gradgradcheck(call, (q, k, v), fast_mode=True)


def test_double_backward_is_that_of_torch(backend):
    """A gradient penalty, as in training for flat or robust models."""
    q, k, v = doubles(2, 2, 33, 16)

    def penalty(attention):
        grads = torch.autograd.grad(attention(q, k, v).square().sum(), (q, k, v), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v))

    def theirs(q, k, v):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v)

    ours = penalty(lambda q, k, v: fused_attention(q, k, v, backend=backend))
    torch.testing.assert_close(ours, penalty(theirs), rtol=1e-9, atol=1e-9)


def test_double_backward_in_low_precision_has_its_dtype(backend):
    q, k, v = (x.bfloat16() for x in doubles(1, 1, 9, 8))
    o = fused_attention(q, k, v, backend=backend)
    (dq,) = torch.autograd.grad(o.sum(), q, create_graph=True)
    assert dq.dtype == torch.bfloat16
    again = torch.autograd.grad(dq.float().square().sum(), (q, k, v))
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in again)


def test_third_derivative_is_refused(backend):
    q, k, v = doubles(1, 1, 4, 4)
    x = fused_attention(q, k, v, backend=backend).square().sum()
    for _ in range(2):
        (g,) = torch.autograd.grad(x, q, create_graph=True)
        x = g.square().sum()
    with pytest.raises(NotImplementedError, match="no third derivative"):
        torch.autograd.grad(x, q)


def test_forward_mode_is_refused(backend):
    q, k, v = doubles(1, 1, 4, 4)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda q: fused_attention(q, k, v, backend=backend), (q,), (q,))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q.detach(), torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="jvp"):
            fused_attention(dual, k.detach(), v.detach(), backend=backend)


def test_only_the_gradients_that_are_asked_for_flow(backend):
    q, k, v = doubles(1, 2, 5, 4)
    o, lse = fused_attention(q, k, v, return_lse=True, backend=backend)
    assert torch.autograd.grad(lse.sum(), v, allow_unused=True, retain_graph=True)[0].eq(0).all()
    expected = torch.autograd.grad((q @ k.mT / 2).logsumexp(-1).sum(), (q, k))
    torch.testing.assert_close(torch.autograd.grad(lse.sum(), (q, k)), expected)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (2, 1, 0), (0, None, None), (None, 0, 0)], ids=str)
def test_vmap(in_dims, backend):
    shapes = {0: (3, 2, 2, 9, 8), 1: (2, 3, 2, 9, 8), 2: (2, 2, 3, 9, 8), None: (2, 2, 9, 8)}
    inputs = [torch.randn(shapes[d]) for d in in_dims]

    def call(q, k, v):
        return fused_attention(q, k, v, is_causal=True, return_lse=True, backend=backend)

    o, lse = vmap(call, in_dims)(*inputs)
    for i in range(3):
        one = [x if d is None else x.select(d, i) for x, d in zip(inputs, in_dims, strict=True)]
        torch.testing.assert_close((o[i], lse[i]), call(*one))


@pytest.mark.parametrize("mask_dim", [0, None])
@pytest.mark.parametrize(
    "shape", [(9, 9), (1, 1, 1, 9), (2, 1, 9, 9), (2, 2, 9, 9), (2, 1, 1, 9)], ids=str
)
def test_vmap_over_masks_and_lengths(shape, mask_dim, backend):
    q, k, v = (torch.randn(3, 2, 2, 9, 8) for _ in range(3))
    mask = torch.rand(*(() if mask_dim is None else (3,)), *shape) < 0.6
    lengths = torch.tensor([[9, 1], [0, 5], [4, 9]])

    def call(q, k, v, mask, lengths):
        return fused_attention(q, k, v, mask, kv_lengths=lengths, backend=backend)

    o = vmap(call, (0, 0, 0, mask_dim, 0))(q, k, v, mask, lengths)
    for i in range(3):
        one = mask if mask_dim is None else mask[i]
        torch.testing.assert_close(o[i], call(q[i], k[i], v[i], one, lengths[i]))


def test_vmap_of_vmap(backend):
    q, k, v = (torch.randn(2, 3, 2, 2, 9, 8) for _ in range(3))
    o = vmap(vmap(lambda q, k, v: fused_attention(q, k, v, backend=backend)))(q, k, v)
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v))


class WithoutPython:
    """Function.apply as torch 2.14 and later have it: a call with no Python function inside."""

    def __init__(self, apply):
        self.apply = apply

    def __get__(self, instance, owner):
        return functools.partial(self.apply.__get__(instance, owner))


def test_transforms_take_any_kind_of_apply(monkeypatch, backend):
    own = vars(torch.autograd.Function)["apply"]
    monkeypatch.setattr(torch.autograd.Function, "apply", WithoutPython(own))
    q, k, v = (torch.randn(3, 1, 2, 5, 8) for _ in range(3))
    loss = lambda q, k, v: fused_attention(q, k, v, backend=backend).square().sum()
    dq = vmap(grad(loss))(q, k, v)
    assert dq.shape == q.shape


def test_vmap_of_the_packed_layout_is_refused(backend):
    q, k, v = (torch.randn(2, 9, 2, 8) for _ in range(3))
    cu_seqlens = torch.tensor([0, 4, 9]).int()
    with pytest.raises(NotImplementedError, match="vmap over the packed layout"):
        vmap(lambda q, k, v: fused_attention_varlen(q, k, v, cu_seqlens, backend=backend))(q, k, v)


@pytest.mark.parametrize("order", ["vmap-grad", "grad-vmap"])
def test_per_sample_gradients(order, backend):
    """As in differentially private training: one set of gradients for each sample."""
    x = torch.randn(4, 9, 8)
    weights = torch.randn(3, 8, 8) / 3

    def loss(weights, x):
        q, k, v = (x @ w for w in weights)
        heads = [y.unflatten(-1, (2, 4)).transpose(0, 1)[None] for y in (q, k, v)]
        o, lse = fused_attention(*heads, return_lse=True, backend=backend)
        return o.square().sum() + lse.sum()

    expected = [grad(loss)(weights, row) for row in x]
    if order == "vmap-grad":
        torch.testing.assert_close(vmap(grad(loss), (None, 0))(weights, x), torch.stack(expected))
    else:
        total = grad(lambda w: vmap(loss, (None, 0))(w, x).sum())(weights)
        torch.testing.assert_close(total, sum(expected), rtol=1e-4, atol=1e-4)
    leaf = weights.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(loss(leaf, x[0]), leaf)
    torch.testing.assert_close(by_autograd, expected[0])


def test_grad_of_grad(backend):
    q, k, v = (x.detach() for x in doubles(1, 2, 5, 4))

    def inner(attention):
        def loss(q):
            return attention(q, k, v).square().sum()

        return grad(lambda q: grad(loss)(q).square().sum())(q)

    ours = inner(lambda q, k, v: fused_attention(q, k, v, backend=backend))

    def theirs(q, k, v):
        return (q @ k.mT / 2).softmax(-1) @ v

    torch.testing.assert_close(ours, inner(theirs))


def test_vjp_used_after_its_transform(backend):
    q, k, v = (x.detach() for x in doubles(1, 2, 5, 4))
    o, pull = vjp(lambda q, k, v: FusedAttention.apply(q, k, v, backend=backend), q, k, v)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*inputs).sum(), inputs)
    torch.testing.assert_close(pull(torch.ones_like(o)), expected)


def test_activation_checkpointing(backend):
    q, k, v = doubles(1, 2, 5, 4)
    call = lambda q, k, v: fused_attention(q, k, v, backend=backend)
    expected = torch.autograd.grad(call(q, k, v).square().sum(), (q, k, v))
    o = torch.utils.checkpoint.checkpoint(call, q, k, v, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(o.square().sum(), (q, k, v)), expected)


def test_selective_checkpointing_can_save_the_op(backend):
    from torch.utils.checkpoint import (
        CheckpointPolicy,
        checkpoint,
        create_selective_checkpoint_contexts,
    )

    calls = []

    def policy(context, op, *args, **kwargs):
        ours = op == torch.ops.clinattn.attention_forward.default
        calls.append(ours)
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    q, k, v = doubles(1, 2, 5, 4)
    o = checkpoint(
        lambda q, k, v: fused_attention(q * 1, k, v, backend=backend),
        *(q, k, v),
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    (dq,) = torch.autograd.grad(o.sum(), q)
    (expected,) = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).sum(), q)
    torch.testing.assert_close(dq, expected)
    assert any(calls)


@pytest.mark.parametrize(
    "case",
    [c for c in [*CASES, *FEATURES] if c.work < 4e5 and not c.logits and c.cotangent != "o"],
    ids=str,
)
def test_double_backward_matches_truth(case, backend):
    """Every argument once more in the second derivative; NaN in the padding stays out of it."""
    problem = Problem(case, torch.float64)
    inputs, keywords = problem.arguments
    call = fused_attention_varlen if case.packed else fused_attention
    torch.manual_seed(SEED)
    o, lse = call(*inputs, **{**keywords, "backend": backend})
    do, dlse = problem.cotangents()
    actual = second_order(o, lse, do, dlse, [*inputs, *problem.leaves.values()])

    *clean, do, dlse = (x.detach() for x in problem.clean)
    clean = [x.requires_grad_() for x in clean]
    terms, leaves = problem.terms, problem.terms.parameters
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    rest = (problem.visible, problem.bias, problem.scale, terms, leaves)
    o, lse = plain_attention(*clean, *rest)
    truths = second_order(o, lse, do, dlse, [*clean, *leaves.values()])
    truths[:3] = (problem.given(x) for x in truths[:3])
    for x, truth in zip(actual, truths, strict=True):
        torch.testing.assert_close(x, truth, rtol=1e-9, atol=1e-9)


def second_order(o, lse, do, dlse, inputs):
    """Gradients of a sum over first gradients, weighted so that each one's part is told apart."""
    if do is None:
        do = torch.zeros_like(o)
    grads = torch.autograd.grad([o, lse], inputs, [do, dlse], create_graph=True)
    weights = [torch.full_like(g, i + 1.0) for i, g in enumerate(grads)]
    return list(torch.autograd.grad(grads, inputs, weights))


def biases(backend):
    """Tensors with gradients, and a call with all of them, on (2, 2, 5, 2) inputs."""
    times = torch.tensor([[0.0, 1, 1, 4, 5], [2, 3, 5, 5, 9]]).double()
    shapes = {
        "attn_mask": (1, 2, 5, 5),
        "time_decay": (2,),
        "alibi_slopes": (2, 2),
        "relative_bias": (2, 5),
    }
    tensors = [torch.rand(s, dtype=torch.float64, requires_grad=True) for s in shapes.values()]

    def call(q, k, v, *given):
        keywords = dict(zip(shapes, given, strict=True))
        return fused_attention(
            q, k, v, times=times.to(q.dtype), softcap=2.0, return_lse=True, backend=backend,
            **keywords,
        )  # fmt: skip

    return call, tensors


def test_gradcheck_of_biases(backend):
    call, tensors = biases(backend)
    inputs = (*doubles(2, 2, 5, 2), *tensors)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_gradient_of_a_bias_alone(backend):
    """As in fine-tuning of a frozen model: nothing else needs a gradient."""
    call, tensors = biases(backend)
    qkv = [x.detach() for x in doubles(2, 2, 5, 2)]
    full = torch.autograd.grad(call(*qkv, *tensors)[0].square().sum(), tensors)
    for at, expected in enumerate(full):
        given = [x.detach() for x in tensors]
        given[at] = tensors[at]
        (alone,) = torch.autograd.grad(call(*qkv, *given)[0].square().sum(), tensors[at])
        assert torch.equal(alone, expected)


@pytest.mark.parametrize("dims", [(0, 0, 0, 0), (None, None, None, None), (0, None, 0, None)])
def test_vmap_over_biases(dims, backend):
    call, tensors = biases(backend)
    qkv = [torch.stack([x.detach(), 2 * x.detach()]) for x in doubles(2, 2, 5, 2)]
    given = [
        x.detach() if d is None else torch.stack([x.detach(), x.detach() / 2])
        for x, d in zip(tensors, dims, strict=True)
    ]

    def loss(*args):
        o, lse = call(*args)
        return o.square().sum() + lse.sum()

    dims = (0, 0, 0, *dims)
    everything = tuple(range(7))
    values = vmap(loss, dims)(*qkv, *given)
    grads = vmap(grad(loss, everything), dims)(*qkv, *given)
    for i in range(2):
        one = [x if d is None else x[i] for x, d in zip((*qkv, *given), dims, strict=True)]
        torch.testing.assert_close(values[i], loss(*one))
        for x, expected in zip(grads, grad(loss, everything)(*one), strict=True):
            torch.testing.assert_close(x[i], expected)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_over_dropout(randomness, backend):
    q = torch.randn(2, 2, 33, 8)
    call = lambda q: fused_attention(q, q, q, dropout_p=0.5, backend=backend)
    first, second = vmap(call, randomness=randomness)(torch.stack([q, q]))
    assert torch.equal(first, second) == (randomness == "same")
