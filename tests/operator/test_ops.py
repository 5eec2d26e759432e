"""The ops: schemas, fakes, FLOP counts, and what the router promises to backends."""

import pytest
import torch
from op_arguments import VARIANTS, forward_args
from support import BACKENDS, backends_module
from torch.utils.flop_counter import FlopCounterMode

import clinattn
from clinattn import fused_attention, fused_attention_varlen
from clinattn.backends.call import Arguments
from clinattn.backends.reference import attention as reference

FORWARD = torch.ops.clinattn.attention_forward
BACKWARD = torch.ops.clinattn.attention_backward

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nq, nk", [(5, 9), (9, 5)])
def test_bottom_right_alignment_of_features(nq, nk, backend):
    """Distances and the global prefix count from the same place as causal order does."""
    q, k, v, do = (torch.randn(2, 2, n, 8, dtype=torch.float64) for n in (nq, nk, nk, nq))
    slopes, table = torch.rand(1, 2).double(), torch.randn(2, 5).double()
    args = (
        *(q, k, v, None, *(None,) * 9, slopes, table, None, 0.3, -1, 0, True, nq, nk),
        *(0.0, 2, 0.0),
    )
    o, lse, low = FORWARD(*args, backend)
    grads = BACKWARD(do, None, o, lse, low, *args, 12, backend)

    leaves = [x.clone().requires_grad_() for x in (q, k, v, slopes, table)]
    i, j = torch.arange(nq)[:, None] + nk - nq, torch.arange(nk)
    s = 0.3 * leaves[0] @ leaves[1].mT - leaves[3][..., None, None] * (j - i).abs()
    s = s + leaves[4][:, (j - i).clamp(-2, 2) + 2]
    s = s.masked_fill(~((j <= i) | (j < 2) | (i < 2)), -float("inf"))
    expected = s.softmax(-1) @ leaves[2]
    torch.testing.assert_close(o, expected)
    truths = torch.autograd.grad(expected, leaves, do)
    wanted = (*grads[:3], grads[5], grads[6])
    for x, truth in zip(wanted, truths, strict=True):
        torch.testing.assert_close(x, truth)


def test_meta_tensors():
    q, k, v = (torch.randn(2, 3, 5, 8, device="meta", requires_grad=True) for _ in range(3))
    o, lse = fused_attention(q, k, v, return_lse=True)
    assert o.device.type == "meta" and o.shape == q.shape and lse.shape == (2, 3, 5)
    (dq,) = torch.autograd.grad(o.sum(), q)
    assert dq.shape == q.shape


def test_the_router_copies_only_what_it_must(monkeypatch):
    """Backends get tensors whose last stride is 1, and otherwise those that the caller passed."""
    seen = {}

    def record(name, forward):
        def wrapper(*args):
            seen[name] = args
            return forward(*args)

        return wrapper

    real = backends_module._load("reference")
    recorded = real._replace(
        forward=record("forward", real.forward), backward=record("backward", real.backward)
    )
    monkeypatch.setattr("clinattn.operator.ops.implementation", lambda *_, **__: recorded)
    q, k, v = (torch.randn(2, 5, 3, 8).transpose(1, 2).requires_grad_() for _ in range(3))
    reversed_v = torch.randn(2, 3, 8, 5).mT.requires_grad_()
    o = fused_attention(q, k, reversed_v)
    o.sum().backward()
    (call,) = seen["forward"]
    assert [x.data_ptr() for x in (call.q, call.k)] == [q.data_ptr(), k.data_ptr()]
    assert call.q.stride() == q.stride()
    assert call.v.stride(-1) == 1
    call, incoming, _ = seen["backward"]
    assert incoming.do.stride(-1) == 1 and call.q.data_ptr() == q.data_ptr()


def test_masks_arrive_unexpanded(monkeypatch):
    seen = []
    real = backends_module._load("reference")

    def forward(call):
        seen.append(call)
        return real.forward(call)

    implementation = real._replace(forward=forward)
    monkeypatch.setattr("clinattn.operator.ops.implementation", lambda *_, **__: implementation)
    q = torch.randn(2, 3, 5, 8)
    keys = torch.tensor([[False, True, True, False, True], [False] * 5])[:, None, None]
    for mask, shape in (
        (torch.rand(5, 5) < 0.5, (1, 1, 5, 5)),
        ((torch.rand(2, 1, 5, 5) < 0.5).expand(2, 3, 5, 5), (2, 1, 5, 5)),
        (keys, (2, 1, 1, 5)),
        (keys.expand(2, 3, 5, 5), (2, 1, 1, 5)),
        (torch.zeros(2, 3, 1, 5), (2, 3, 1, 5)),
    ):
        fused_attention(q, q, q, mask)
        assert seen[-1].mask.shape == shape
    fused_attention(q, q, q, keys)
    assert seen[-1].kv_start.tolist() == [1, 0] and seen[-1].kv_end.tolist() == [5, 0]
    assert seen[-1].kv_start.dtype == seen[-1].kv_end.dtype == torch.int32
    fused_attention(q, q, q, keys, kv_lengths=torch.tensor([4, 4]))
    assert seen[-1].kv_end.tolist() == [4, 0]
    padding = torch.tensor([[False, True, True, True, False], [True] * 5])[:, None, None]
    fused_attention(q, q, q, padding)
    assert seen[-1].mask is None
    assert seen[-1].kv_start.tolist() == [1, 0] and seen[-1].kv_end.tolist() == [4, 5]


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "keywords, pairs",
    [
        ({}, 2 * 6 * 8),
        ({"is_causal": True}, 2 * (1 + 2 + 3 + 4 + 5 + 6)),
        ({"window": 1}, 2 * (2 + 3 * 5)),
        ({"kv_lengths": torch.tensor([8, 3])}, 6 * 8 + 6 * 3),
        ({"q_lengths": torch.tensor([2, 0]), "kv_lengths": torch.tensor([8, 3])}, 2 * 8),
        ({"window": 0, "global_prefix": 1}, 2 * (8 + 5 * 2)),
    ],
    ids=["full", "causal", "window", "kv_lengths", "lengths", "prefix"],
)
def test_flops_of_visible_pairs(keywords, pairs):
    """4 D for each visible pair and head forward, 10 D backward."""
    q = torch.randn(2, 4, 6, 16, requires_grad=True)
    k = torch.randn(2, 2, 8, 16)
    forward = lambda: fused_attention(q, k, k, enable_gqa=True, backend="reference", **keywords)
    assert flops(forward) == 4 * 16 * 4 * pairs
    assert flops(lambda: forward().sum().backward()) == 14 * 16 * 4 * pairs


def test_flops_of_intervals():
    q, p = torch.randn(2, 3, 6, 16), torch.randn(8, 3, 16)
    ids = torch.tensor([[0, 0, 1, 1, 1, 4], [3, 3, 3, 3, 3, 3]])
    dense = lambda: fused_attention(q, q, q, segment_ids=ids, backend="reference")
    assert flops(dense) == 4 * 16 * 3 * (4 + 9 + 1 + 36)
    packed = lambda: fused_attention_varlen(
        p, p, p, torch.tensor([0, 3, 8]).int(), backend="reference", time_window=1.0,
        times=torch.tensor([0.0, 1, 2, 0, 0, 5, 5, 6]),
    )  # fmt: skip
    assert flops(packed) == 4 * 16 * 3 * (2 + 3 + 2 + 2 + 2 + 3 + 3 + 3)


def test_flops_of_packed_sequences():
    q = torch.randn(10, 3, 16)
    cu_seqlens = torch.tensor([0, 3, 3, 8]).int()
    assert flops(lambda: fused_attention_varlen(q, q, q, cu_seqlens)) == 4 * 16 * 3 * (9 + 25)
    causal = flops(lambda: fused_attention_varlen(q, q, q, cu_seqlens, is_causal=True))
    assert causal == 4 * 16 * 3 * (6 + 15)


def test_flops_of_fake_tensors_are_those_of_full_sequences():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.randn(2, 4, 6, 16)
        lengths = torch.ones(2, dtype=torch.int32)
        assert flops(lambda: fused_attention(q, q, q, kv_lengths=lengths)) == 4 * 16 * 4 * 2 * 36


def test_bad_values_below_the_edge_stay_in_bounds():
    """On a GPU nobody looks at lengths, so every backend clamps them."""
    args = list(forward_args(**VARIANTS["lengths"]))
    args[6:9] = (
        torch.tensor([99, -5]).int(),
        torch.tensor([-9, 3]).int(),
        torch.tensor([99, 99]).int(),
    )
    clamped = list(args)
    clamped[6:9] = (
        torch.tensor([5, 0]).int(),
        torch.tensor([0, 3]).int(),
        torch.tensor([7, 7]).int(),
    )
    for backend in BACKENDS:
        for actual, expected in zip(
            FORWARD(*args, backend), FORWARD(*clamped, backend), strict=True
        ):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nq, nk", [(5, 9), (9, 5)])
def test_bottom_right_alignment(nq, nk, backend):
    """flash-attn's causal alignment, which its shim asks the op for."""
    q, k = torch.randn(2, 2, nq, 8), torch.randn(2, 2, nk, 8)
    args = (q, k, k, *(None,) * 13, 0.3, -1, 0, True, nq, nk, 0.0, 0, 0.0, backend)
    o, lse, _ = FORWARD(*args)
    mask = torch.ones(nq, nk).tril(nk - nq).bool()
    expected, expected_lse = fused_attention(q, k, k, mask, scale=0.3, return_lse=True)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_with_the_lse_of_more_keys(backend):
    """Ring attention: each part of the keys is differentiated with the o and lse of them all."""
    q, k, v, do = torch.randn(4, 1, 2, 40, 16)
    dlse = torch.randn(1, 2, 40)
    tail = (None,) * 13 + (0.25, -1, -1, False, 40)
    off = (0.0, 0, 0.0)
    o, lse, _ = FORWARD(q, k, v, *tail, 40, *off, backend)
    whole = BACKWARD(do, dlse, o, lse, None, q, k, v, *tail, 40, *off, 0, backend)[:3]
    parts = [
        BACKWARD(do, dlse, o, lse, None, q, k[:, :, at], v[:, :, at], *tail, 20, *off, 0, backend)
        for at in (slice(0, 20), slice(20, 40))
    ]
    (dq0, *first), (dq1, *second) = parts
    torch.testing.assert_close(dq0 + dq1, whole[0])
    for a, b, both in zip(first[:2], second[:2], whole[1:], strict=True):
        torch.testing.assert_close(torch.cat([a, b], 2), both)


def test_reference_takes_the_arguments_of_the_ops():
    call = Arguments(*forward_args())
    assert torch.equal(reference.attention_forward(call)[0], FORWARD(*call, "reference")[0])
    assert clinattn.backends()["reference"]
