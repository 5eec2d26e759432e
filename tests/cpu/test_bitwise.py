"""The same bits: over runs, threads, neighbours, padding and packing.

Kernels promise all of it. The reference, made of torch's own products, promises it over runs.
"""

import pytest
import torch
from support import BACKENDS, KERNELS, dtype_id

from clinattn import fused_attention, fused_attention_varlen

LENGTHS = (113, 1, 64, 33, 100)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KEYWORDS = {"plain": {}, "causal": {"is_causal": True}, "window": {"window": (20, 9)}}

over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
over_keywords = pytest.mark.parametrize("keywords", KEYWORDS.values(), ids=KEYWORDS)
over_kernels = pytest.mark.parametrize(
    "backend",
    KERNELS
    or [pytest.param("cpu", marks=pytest.mark.skip("the compiled backend is not built here"))],
)


def sequences(dtype, heads=4, kv_heads=2, dim=24):
    """Yields q, k, v, do (H, n, D) and dlse (H, n) for each length."""
    for n in LENGTHS:
        q, do = (torch.randn(heads, n, dim).to(dtype) for _ in range(2))
        k, v = (torch.randn(kv_heads, n, dim).to(dtype) for _ in range(2))
        yield q, k, v, do, torch.randn(heads, n)


def evaluate(call, q, k, v, do, dlse, **keywords):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o, lse = call(q, k, v, enable_gqa=True, return_lse=True, **keywords)
    grads = torch.autograd.grad([o, lse], [q, k, v], [do, dlse.to(lse.dtype)])
    return [x.detach() for x in (o, lse, *grads)]


def alone(sequence, **keywords):
    return [x[0] for x in evaluate(fused_attention, *(x[None] for x in sequence), **keywords)]


def assert_equal(actual, expected, context=""):
    for name, a, b in zip(("o", "lse", "dq", "dk", "dv"), actual, expected, strict=False):
        assert torch.equal(a, b), f"{name} {context}: {(a != b).sum()} of {a.numel()} differ"


@pytest.mark.parametrize("backend", BACKENDS)
@over_dtypes
def test_over_runs(dtype, backend):
    """Other work in between leaves other numbers in the scratch memory."""
    sequence, *others = sequences(dtype)
    expected = alone(sequence, backend=backend)
    for other in others:
        for scale in (1e4, torch.nan):
            alone([x * scale for x in other], backend=backend)
        assert_equal(alone(sequence, backend=backend), expected)


@over_kernels
@over_dtypes
@over_keywords
def test_over_threads(keywords, dtype, backend, threads):
    batch = [torch.stack([x] * 3) for x in next(iter(sequences(dtype)))]
    threads(1)
    expected = evaluate(fused_attention, *batch, backend=backend, **keywords)
    for count in (2, 3):
        threads(count)
        actual = evaluate(fused_attention, *batch, backend=backend, **keywords)
        assert_equal(actual, expected, f"with {count} threads")


@over_kernels
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=dtype_id)
def test_over_threads_in_a_long_window(dtype, backend, threads):
    """Tasks of other sizes begin at other keys, and more keys are seen than are packed together."""
    sequence = *torch.randn(4, 1, 1, 3000, 64).to(dtype), torch.zeros(1, 1, 3000)
    keywords = {"window": (1300, 70), "backend": backend}
    threads(1)
    expected = evaluate(fused_attention, *sequence, **keywords)
    for count in (2, 3):
        threads(count)
        actual = evaluate(fused_attention, *sequence, **keywords)
        assert_equal(actual, expected, f"with {count} threads")


@over_kernels
@over_dtypes
@over_keywords
def test_packed_alone_and_at_any_place(keywords, dtype, backend):
    members = list(sequences(dtype))
    expected = [alone(member, backend=backend, **keywords) for member in members]
    for order in (range(len(members)), reversed(range(len(members)))):
        order = list(order)
        *qkvd, dlse = (torch.cat([members[s][i] for s in order], 1) for i in range(5))
        qkvd = [x.transpose(0, 1) for x in qkvd]
        cu_seqlens = torch.tensor([0, *(LENGTHS[s] for s in order)]).cumsum(0).int()
        keywords = {**keywords, "backend": backend, "cu_seqlens_q": cu_seqlens}
        results = evaluate(fused_attention_varlen, *qkvd, dlse, **keywords)
        results = [x if x.dim() == 2 else x.transpose(0, 1) for x in results]  # (heads, T, ...)
        parts = [x.split([LENGTHS[s] for s in order], 1) for x in results]
        for at, s in enumerate(order):
            assert_equal([part[at] for part in parts], expected[s], f"of sequence {s}")


@over_kernels
@over_dtypes
@over_keywords
@pytest.mark.parametrize("extra", [0, 1, 64])
def test_right_padded(extra, keywords, dtype, backend):
    members = list(sequences(dtype))
    n = max(LENGTHS) + extra
    padded = [pad([member[i] for member in members], n, left=False) for i in range(5)]
    lengths = torch.tensor(LENGTHS)
    results = evaluate(
        fused_attention, *padded, q_lengths=lengths, kv_lengths=lengths, backend=backend, **keywords
    )
    for s, member in enumerate(members):
        actual = [x[s, :, : LENGTHS[s]] for x in results]
        assert_equal(actual, alone(member, backend=backend, **keywords), f"of sequence {s}")


@over_kernels
@over_dtypes
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_behind_a_key_mask(side, dtype, backend):
    """o, lse and dq. Queries in the padding do see keys, so dk and dv sum over more of them."""
    members = list(sequences(dtype))
    n, left = max(LENGTHS) + 7, side == "left"
    padded = [pad([member[i] for member in members], n, left, fill=0.5) for i in range(5)]
    visible = pad([torch.ones(1, length) for length in LENGTHS], n, left, fill=0).bool()[:, :, None]
    for mask in (visible, visible.expand(-1, 4, n, -1)):
        results = evaluate(fused_attention, *padded, attn_mask=mask, backend=backend)
        for s, member in enumerate(members):
            rows = slice(n - LENGTHS[s], n) if left else slice(0, LENGTHS[s])
            actual = [x[s, :, rows] for x in results[:3]]
            assert_equal(actual, alone(member, backend=backend)[:3], f"of sequence {s}")


@over_kernels
@over_dtypes
def test_position_in_the_batch_and_number_of_heads(dtype, backend):
    member = next(iter(sequences(dtype)))
    expected = alone(member, backend=backend)
    for batch, at in ((1, 0), (2, 1), (7, 3)):
        stacked = [torch.randn(batch, *x.shape).to(x) for x in member]
        for x, y in zip(stacked, member, strict=True):
            x[at] = y
        results = evaluate(fused_attention, *stacked, backend=backend)
        assert_equal([x[at] for x in results], expected, f"at {at} of {batch}")
    per_kv_head = [x[: len(x) // 2] for x in member]  # the first kv head and its query heads
    actual = alone(per_kv_head, backend=backend)
    assert_equal(actual, [x[: len(x) // 2] for x in expected], "of half the heads")


@over_kernels
@over_dtypes
def test_memory_layout(dtype, backend):
    member = [x[None] for x in next(iter(sequences(dtype)))]
    expected = evaluate(fused_attention, *member, backend=backend)
    *qkvd, dlse = member
    for layout in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],  # off by one element
        lambda x: x.mT.contiguous().mT,
    ):
        actual = evaluate(fused_attention, *map(layout, qkvd), dlse, backend=backend)
        assert_equal(actual, expected)


def pad(members, n, left, fill=float("nan")):
    """(H, length, ...) each -> (B, H, n, ...), filled up on one side."""
    padded = members[0].new_full((len(members), len(members[0]), n, *members[0].shape[2:]), fill)
    for s, x in enumerate(members):
        rows = slice(n - x.shape[1], n) if left else slice(0, x.shape[1])
        padded[s, :, rows] = x
    return padded
