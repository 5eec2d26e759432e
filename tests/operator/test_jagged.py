"""fused_attention of jagged tensors: each sequence has what it has alone, to the bit."""

import pytest
import torch
from jagged import MAKES, drawn, packed, parts_of, with_holes

from clinattn import fused_attention, fused_attention_varlen

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

HEADS, KV_HEADS, DIM = 4, 2, 24
LENGTHS = {
    "same": ([5, 1, 12], [5, 1, 12]),
    "other": ([5, 7, 3, 65], [9, 2, 3, 33]),
    "empty": ([0, 5, 2, 4], [3, 6, 0, 6]),
}
WORDS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "window": {"window": (3, 2), "bottom_right": True},
    "alibi and prefix": {"alibi_slopes": drawn(0, HEADS).abs(), "global_prefix": 2, "window": 1},
    "softcap and bias": {"softcap": 2.0, "relative_bias": drawn(0, HEADS, 9)},
}


def leaves(lengths_q, lengths_k, dtype=torch.float32):
    return (
        parts_of(lengths_q, HEADS, DIM, 10, dtype),
        parts_of(lengths_k, KV_HEADS, DIM, 20, dtype),
        parts_of(lengths_k, KV_HEADS, DIM, 30, dtype),
    )


def gradients(o, lse, leaves):
    total = sum((x.float().square().sum() for x in o), torch.zeros(()))
    total = total + sum(x[x > -float("inf")].sum() for x in lse)
    return torch.autograd.grad(total, [x for xs in leaves for x in xs])


@pytest.mark.parametrize("make", MAKES.values(), ids=list(MAKES))
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("words", WORDS.values(), ids=list(WORDS))
def test_sequences_have_what_they_have_alone(words, lengths, make):
    """Output, lse and gradients, with grouped heads and queries that see nothing."""
    check_alone(words, leaves(*lengths), make)


def test_values_of_another_width():
    q, k, _ = leaves(*LENGTHS["other"])
    v = parts_of(LENGTHS["other"][1], KV_HEADS, 40, 30)
    check_alone({"is_causal": True}, (q, k, v), packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    check_alone({"is_causal": True}, leaves(*LENGTHS["other"], dtype), with_holes)


def check_alone(words, parts, make):
    words = words | {"enable_gqa": True, "return_lse": True}
    query, key, value = map(make, parts)
    o, lse = fused_attention(query, key, value, **words)
    alone = []
    for given in zip(*parts, strict=True):
        if "global_prefix" in words:  # a packed call takes more than the keys of a sequence
            words["global_prefix"] = min(2, len(given[1]))
        alone.append(fused_attention(*(x.transpose(0, 1)[None] for x in given), **words))
    assert o.layout == lse.layout == torch.jagged
    assert o.shape == (*query.shape[:3], value.shape[3]) and lse.shape == query.shape[:3]
    for results, expected in ((o.unbind(), 0), (lse.unbind(), 1)):
        assert all(torch.equal(x, y[expected][0]) for x, y in zip(results, alone, strict=True))
    actual = gradients(o.unbind(), lse.unbind(), parts)
    expected = gradients([x[0][0] for x in alone], [x[1][0] for x in alone], parts)
    assert all(map(torch.equal, actual, expected))
    assert all(x.isfinite().all() for x in actual)


def test_result_joins_its_query():
    """The sum with the query, whose sequences it shares; holes are zeros."""
    query = with_holes(parts_of([3, 5], HEADS, DIM, 0))
    o = fused_attention(query, query, query)
    assert (query + o).shape == query.shape and torch.equal(o.offsets(), query.offsets())
    rows = o.values().transpose(0, 1).flatten(1)
    assert (rows != 0).any(1).sum() == 8 and rows.isfinite().all()
    query = packed(parts_of([3, 5], HEADS, DIM, 0))
    o = fused_attention(query, query, query)
    assert o.transpose(1, 2).flatten(-2).shape == (*query.transpose(1, 2).shape[:2], HEADS * DIM)


def test_nothing_is_copied_or_padded():
    """The packed call gets views of what the jagged tensors hold."""
    given = []

    def packed_call(q, k, v, *ends, **words):
        given.extend((q, k, v))
        return fused_attention_varlen(q, k, v, *ends, **words)

    from clinattn.operator.jagged import jagged_attention

    x = packed(parts_of([3, 5], HEADS, DIM, 0))
    jagged_attention(None, packed_call, x, x, x, {}, times=None, return_lse=False)
    assert all(y.data_ptr() == x.values().data_ptr() and y.shape == (8, HEADS, DIM) for y in given)


def test_dropout_is_that_of_the_packed_call():
    q, k, v = map(packed, leaves([3, 70], [5, 66]))
    ends = (x.offsets().int() for x in (q, k))
    values = (x.values().transpose(0, 1) for x in (q, k, v))
    torch.manual_seed(3)
    expected = fused_attention_varlen(*values, *ends, dropout_p=0.4, enable_gqa=True)
    torch.manual_seed(3)
    o = fused_attention(q, k, v, dropout_p=0.4, enable_gqa=True)
    assert torch.equal(o.values().transpose(0, 1), expected)


def test_times():
    lengths, parts = [4, 9], parts_of([4, 9], HEADS, DIM, 0)
    x = packed(parts)
    hours = [drawn(at, n).cumsum(0).abs().sort().values for at, n in enumerate(lengths)]
    times = torch.nested.as_nested_tensor(hours, layout=torch.jagged)
    words = {"time_window": 1.0, "time_decay": torch.rand(HEADS)}
    o = fused_attention(x, x, x, times=times, **words)
    for part, own, actual in zip(parts, hours, o.unbind(), strict=True):
        alone = part.transpose(0, 1)[None]
        expected = fused_attention(alone, alone, alone, times=own[None], **words)
        assert torch.equal(actual, expected[0])


def test_other_ranks():
    """(B, j, D) has no heads; in (B, j, N, D) each row is attended over by itself, as in torch."""
    parts = [drawn(at, n, DIM) for at, n in enumerate((3, 5))]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    o, lse = fused_attention(x, x, x, is_causal=True, return_lse=True)
    assert o.shape == x.shape and lse.shape == x.shape[:2]
    for part, actual in zip(parts, o.unbind(), strict=True):
        alone = part[None, None]
        assert torch.equal(actual, fused_attention(alone, alone, alone, is_causal=True)[0, 0])
    rows = [drawn(at, n, 6, DIM) for at, n in enumerate((3, 5))]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged)
    o, lse = fused_attention(x, x, x, return_lse=True)
    values = x.values()[:, None]
    assert o.shape == x.shape and lse.shape == x.shape[:3]
    assert torch.equal(o.values()[:, None], fused_attention(values, values, values))


@pytest.mark.unpoisoned
def test_compiles_into_one_graph():
    call = lambda q, k: fused_attention(q, k, k, is_causal=True, enable_gqa=True)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for lengths in ([3, 5], [9, 1]):
        q, k, _ = leaves(lengths, lengths)
        results = []
        for f in (compiled, call):
            o = f(packed(q), packed(k))
            results.append([o.values(), *torch.autograd.grad(o.values().sum(), [*q, *k])])
        assert all(map(torch.equal, *results))
    torch.compiler.reset()


X, Y = (packed(parts_of(n, HEADS, DIM, 0)).detach() for n in ([3, 5], [4, 4]))
DENSE = torch.randn(2, HEADS, 5, DIM)
REFUSED = {
    "mask": ((X, X, X), {"attn_mask": torch.ones(5, 5) > 0}, ValueError, "attn_mask: got one with"),
    "lengths": ((X, X, X), {"kv_lengths": torch.tensor([3, 5])}, ValueError, "kv_lengths: got"),
    "segments": ((X, X, X), {"segment_ids": DENSE}, ValueError, "segment_ids: got one with"),
    "dense key": ((X, DENSE, X), {}, TypeError, "key: got a dense one"),
    "dense query": ((DENSE, X, X), {}, TypeError, "key: got a nested tensor"),
    "strided": (
        (X, torch.nested.nested_tensor([DENSE[0]]), X), {}, TypeError, "key: got a strided nested",
    ),
    "value": ((X, X, Y), {}, ValueError, "value: got sequences of other lengths"),
    "sequences": (
        (X, *2 * [packed(parts_of([3], HEADS, DIM, 0))]), {}, ValueError, r"got \[2, 1, 1\] seq",
    ),
    "ranks": ((X, X, X.transpose(1, 2)), {}, ValueError, r"tokens in \[2, 2, 1\]"),
    "heads": ((X, *2 * [packed(parts_of([3, 5], 2, DIM, 0))]), {}, ValueError, "key: got 2 heads"),
    "times": ((X, X, X), {"times": torch.zeros(2, 5)}, ValueError, "times: expected a jagged"),
    "none": ((X, None, X), {}, TypeError, "key: got NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("tensors, words, error, match", REFUSED.values(), ids=list(REFUSED))
def test_bad_input_is_refused(tensors, words, error, match):
    with pytest.raises(error, match=match):
        fused_attention(*tensors, **words)
