"""flash-attn's functions against plain maths, with its own bottom-right alignment."""

import importlib.util
import inspect
import sys
import textwrap

import pytest
import torch
from compared import Explicit, block_diagonal, gradients_of
from support import assert_close

from clinattn.integrations import flash_attn as fa
from clinattn.integrations.flash_attn import bert_padding, flash_attn_interface

DTYPES = [torch.float32, torch.bfloat16]
CAUSAL = {"causal": True}


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(batch, nq, nk, heads, kv_heads, dim, dtype=torch.float32):
    """(B, N, H, D), with gradients."""
    shapes = ((nq, heads), (nk, kv_heads), (nk, kv_heads))
    return [
        draw(batch, n, h, dim, dtype=dtype, seed=at).requires_grad_()
        for at, (n, h) in enumerate(shapes)
    ]


def sees(nq, nk, causal=False, window_size=(-1, -1)):
    """Pair by pair: query i stands at the key i + nk - nq."""
    left, right = window_size
    visible = torch.zeros(nq, nk, dtype=torch.bool)
    for i in range(nq):
        for j in range(nk):
            place = i + nk - nq
            visible[i, j] = (
                (not causal or j <= place)
                and (left < 0 or j >= place - left)
                and (right < 0 or j <= place + right)
            )
    return visible


def distances(nq, nk):
    return (torch.arange(nq)[:, None] + nk - nq - torch.arange(nk)).abs().float()


def heads_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]


WORDS = {
    "plain": {},
    "scale": {"softmax_scale": 0.3},
    "causal": CAUSAL,
    "window": {"window_size": (3, 2)},
    "left-window": {"window_size": (4, -1)},
    "causal-window": {"window_size": (4, 7), **CAUSAL},
    "softcap": {"softcap": 2.0, **CAUSAL},
}
SIZES = [(7, 7), (5, 13), (13, 5), (1, 9), (33, 65)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nq, nk", SIZES)
@pytest.mark.parametrize("words", WORDS.values(), ids=list(WORDS))
def test_func(words, nq, nk, dtype):
    """Forward, lse and all gradients, GQA, causal bottom right for any lengths."""
    q, k, v = qkv(2, nq, nk, 4, 2, 24, dtype)
    visible = sees(nq, nk, words.get("causal", False), words.get("window_size", (-1, -1)))
    problem = Explicit(
        *heads_first(q, k, v), visible,
        softcap=words.get("softcap", 0.0), scale=words.get("softmax_scale"),
    )  # fmt: skip
    o, lse, s_dmask = fa.flash_attn_func(q, k, v, **words, return_attn_probs=True)
    assert o.is_contiguous() and s_dmask.numel() == 0
    assert lse.dtype == torch.float32 and lse.shape == (2, 4, nq)
    o = o.transpose(1, 2)
    grads = gradients_of([o, lse], [problem.do, problem.dlse], q=q, k=k, v=v)
    grads = dict(zip(grads, heads_first(*grads.values()), strict=True))
    problem.check({"o": o, "lse": lse, **grads})


def test_causal_is_bottom_right():
    """Two queries and five keys: the first sees four. top-left would show it one."""
    q, k, v = torch.zeros(1, 2, 1, 1), torch.zeros(1, 5, 1, 1), torch.eye(5)[None, :, None]
    o = fa.flash_attn_func(*(x.expand(-1, -1, 1, 5) for x in (q, k)), v, causal=True)
    torch.testing.assert_close(o[0, 0, 0], torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0]))
    torch.testing.assert_close(o[0, 1, 0], torch.full((5,), 0.2))


def test_rows_that_see_nothing():
    """Three queries, one key: two of them are before it."""
    q, k, v = qkv(1, 3, 1, 2, 2, 8)
    o, lse, _ = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (o[:, :2] == 0).all() and (lse[..., :2] == -float("inf")).all()
    (dq,) = torch.autograd.grad([o.sum() + lse[..., 2:].sum()], [q])
    assert (dq[:, :2] == 0).all() and dq.isfinite().all()


@pytest.mark.parametrize("per_batch", [False, True], ids=["heads", "batch-heads"])
@pytest.mark.parametrize("nq, nk", [(6, 6), (4, 11), (11, 4)])
def test_alibi(nq, nk, per_batch):
    q, k, v = qkv(2, nq, nk, 4, 2, 16)
    slopes = draw(*((2, 4) if per_batch else (4,))).abs().requires_grad_()
    problem = Explicit(
        *heads_first(q, k, v), sees(nq, nk, causal=True),
        slopes=slopes.view(-1, 4), distance=distances(nq, nk),
    )  # fmt: skip
    o, lse, _ = fa.flash_attn_func(
        q, k, v, causal=True, alibi_slopes=slopes, return_attn_probs=True
    )
    o = o.transpose(1, 2)
    (dslopes,) = torch.autograd.grad([o, lse], [slopes], [problem.do, problem.dlse])
    problem.check({"o": o, "lse": lse, "dslopes": dslopes.view(-1, 4)})


def packed(lengths_q, lengths_k, heads=4, kv_heads=2, dim=24, dtype=torch.float32):
    q, k, v = (x[0] for x in qkv(1, sum(lengths_q), sum(lengths_k), heads, kv_heads, dim, dtype))
    ends = [torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k)]
    return (q, k, v), (*ends, max(lengths_q, default=0), max(lengths_k, default=0))


LENGTHS = {
    "same": ([5, 1, 12], [5, 1, 12]),
    "other": ([5, 7, 3], [9, 2, 3]),
    "empty": ([0, 5, 0, 4, 0], [3, 0, 0, 6, 0]),
    "one": ([1, 1], [33, 1]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("words", WORDS.values(), ids=list(WORDS))
def test_varlen_func(words, lengths, dtype):
    (q, k, v), sequences = packed(*lengths, dtype=dtype)
    bounds = words.get("causal", False), words.get("window_size", (-1, -1))
    visible = block_diagonal([sees(n, m, *bounds) for n, m in zip(*lengths, strict=True)])
    problem = Explicit(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), visible,
        softcap=words.get("softcap", 0.0), scale=words.get("softmax_scale"),
    )  # fmt: skip
    o, lse, _ = fa.flash_attn_varlen_func(q, k, v, *sequences, **words, return_attn_probs=True)
    assert lse.shape == (4, len(q))
    do, dlse = problem.do[0].transpose(0, 1), problem.dlse[0]
    results = {"o": o, **gradients_of([o, lse], [do, dlse], q=q, k=k, v=v)}
    results = {name: x.transpose(0, 1)[None] for name, x in results.items()}
    problem.check({"lse": lse[None], **results})


def test_packed_arguments():
    """kvpacked and qkvpacked, dense and varlen, are the functions of their parts."""
    qkv_ = draw(2, 9, 3, 4, 16)
    q, k, v = qkv_.unbind(2)
    expected = fa.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(fa.flash_attn_qkvpacked_func(qkv_, causal=True), expected)
    assert torch.equal(fa.flash_attn_kvpacked_func(q, qkv_[:, :, 1:], causal=True), expected)
    ends = torch.tensor([0, 9, 18], dtype=torch.int32)
    flat, expected = qkv_.flatten(0, 1), expected.flatten(0, 1)
    actual = fa.flash_attn_varlen_qkvpacked_func(flat, ends, 9, causal=True)
    torch.testing.assert_close(actual, expected)
    actual = fa.flash_attn_varlen_kvpacked_func(
        flat[:, 0], flat[:, 1:], ends, ends, 9, 9, causal=True
    )
    torch.testing.assert_close(actual, expected)


def paged(dense, table, size):
    """Pages of size tokens for dense (B, N, H, D), which the table (B, blocks) leads to."""
    pages = torch.full((int(table.max()) + 1, size, *dense.shape[2:]), float("nan"))
    for row, blocks in zip(dense, table, strict=True):
        for block, part in zip(blocks, row.split(size), strict=False):
            pages[block, : len(part)] = part
    return pages


TABLE = torch.tensor([[4, 0, 6], [1, 5, 2]], dtype=torch.int32)


def test_varlen_pages():
    """NaN in unused places of pages is not read."""
    dense_k, dense_v = draw(2, 11, 2, 16, seed=1), draw(2, 11, 2, 16, seed=2)
    lengths, q = [11, 6], draw(7, 4, 16)
    ends_q, ends_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 7], [0, 11, 17]))
    parts = [torch.cat([x[b, :n] for b, n in enumerate(lengths)]) for x in (dense_k, dense_v)]
    expected = fa.flash_attn_varlen_func(q, *parts, ends_q, ends_k, 4, 11, causal=True)
    pages = [paged(x, TABLE, 4) for x in (dense_k, dense_v)]
    actual = fa.flash_attn_varlen_func(
        q, *pages, ends_q, ends_k, 4, 11, causal=True, block_table=TABLE
    )
    assert torch.equal(actual, expected) and actual.isfinite().all()


def test_dropout():
    """Deterministic given torch's generator, and an average over pairs that is what is left."""
    q, k = torch.zeros(2, 64, 4, 8), torch.zeros(2, 64, 4, 8)
    v = torch.ones(2, 64, 4, 8)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(fa.flash_attn_func(q, k, v, dropout_p=0.25, return_attn_probs=True)[0])
    assert torch.equal(*runs)
    # 2 * 64 * 4 rows of 64 pairs: the mean of Bernoulli(0.75) / 0.75 within five deviations
    deviation = (0.25 / 0.75 / (2 * 64 * 4 * 64)) ** 0.5
    assert abs(runs[0].mean().item() - 1) < 5 * deviation
    assert not torch.equal(runs[0], v)


def test_autocast_leaves_dtypes_alone():
    q, k, v = (draw(1, 5, 2, 8, dtype=torch.float16, seed=at) for at in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fa.flash_attn_func(q, k, v).dtype == torch.float16


# ---- caches


def cache_of(rows, size, heads=2, dim=16):
    """NaN wherever nothing was written."""
    return [torch.full((rows, size, heads, dim), float("nan")) for _ in range(2)]


@pytest.mark.parametrize("words", [CAUSAL, {"window_size": (3, 0)}], ids=["causal", "window"])
@pytest.mark.parametrize("where", ["rows", "batch_idx", "pages"])
def test_decoding_equals_the_full_sequence(where, words):
    """A prompt at once and then token by token, into a cache that is written in place."""
    batch, n, prompt = 2, 12, 5
    q, k, v = (draw(batch, n, h, 16, seed=at) for at, h in enumerate((4, 2, 2)))
    problem = Explicit(*heads_first(q, k, v), sees(n, n, **words))
    more = {}
    if where == "pages":
        k_cache, v_cache = cache_of(7, 4)
        more["block_table"] = TABLE
    elif where == "batch_idx":
        k_cache, v_cache = cache_of(5, 14)
        more["cache_batch_idx"] = torch.tensor([3, 1], dtype=torch.int32)
    else:
        k_cache, v_cache = cache_of(batch, 14)
    outs, lses = [], []
    for start, end in [(0, prompt), *((at, at + 1) for at in range(prompt, n))]:
        new = [x[:, start:end] for x in (q, k, v)]
        lengths = start if start % 2 else torch.full((batch,), start, dtype=torch.int32)
        o, lse = fa.flash_attn_with_kvcache(
            new[0], k_cache, v_cache, new[1], new[2],
            cache_seqlens=lengths, return_softmax_lse=True, **words, **more,
        )  # fmt: skip
        outs.append(o)
        lses.append(lse)
    problem.check({"o": torch.cat(outs, 1).transpose(1, 2), "lse": torch.cat(lses, 2)})
    if where == "rows":
        assert torch.equal(k_cache[:, :n], k) and k_cache[:, n:].isnan().all()
    if where == "batch_idx":
        assert torch.equal(v_cache[[3, 1], :n], v) and v_cache[[0, 2, 4]].isnan().all()


@pytest.mark.parametrize("causal", [False, True])
def test_cache_lengths_and_left_padding(causal):
    k_cache, v_cache = cache_of(3, 9)
    starts, ends = [0, 2, 3], [9, 6, 4]
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for cache in (k_cache, v_cache):
            cache[row, start:end] = draw(end - start, 2, 16, seed=row)
    q = draw(3, 2, 4, 16, seed=9)
    o, lse = fa.flash_attn_with_kvcache(
        q, k_cache, v_cache,
        cache_seqlens=torch.tensor(ends, dtype=torch.int32),
        cache_leftpad=torch.tensor(starts, dtype=torch.int32),
        causal=causal, return_softmax_lse=True,
    )  # fmt: skip
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        kv = [cache[row : row + 1, start:end] for cache in (k_cache, v_cache)]
        inputs = heads_first(q[row : row + 1], *kv)
        problem = Explicit(*inputs, sees(2, end - start, causal))
        problem.check({"o": o[row : row + 1].transpose(1, 2), "lse": lse[row : row + 1]})


def turn(x, angles, interleaved, dtype):
    """Pair by pair; x (B, N, H, D), angles (B, N, R / 2)."""
    x = x.to(dtype, copy=True)
    cos, sin = angles.cos().to(dtype)[:, :, None], angles.sin().to(dtype)[:, :, None]
    half = angles.shape[-1]
    for pair in range(half):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        a, b, c, s = x[..., first].clone(), x[..., second].clone(), cos[..., pair], sin[..., pair]
        x[..., first], x[..., second] = a * c - b * s, a * s + b * c
    return x


@pytest.mark.parametrize("causal", [False, True], ids=["one place", "ordered"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [8, 16])
def test_cache_rotary(rotary_dim, interleaved, causal):
    """Keys turn at their place in the cache; queries do so if there is an order, else all alike."""
    q, k, v = (draw(2, 3, h, 16, seed=at) for at, h in enumerate((4, 2, 2)))
    k_cache, v_cache = (draw(2, 10, 2, 16, seed=at) for at in (3, 4))
    old_k, old_v = k_cache.clone(), v_cache.clone()
    angles = draw(12, rotary_dim // 2, seed=5).double()
    lengths = torch.tensor([4, 1], dtype=torch.int32)
    places = lengths[:, None].long() + torch.arange(3)
    o = fa.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, angles.cos().float(), angles.sin().float(), lengths,
        causal=causal, rotary_interleaved=interleaved,
    )  # fmt: skip
    at_q = angles[places if causal else places[:, :1].expand(-1, 3)]
    results = {}
    for dtype in (torch.float64, torch.float32):
        q_, k_ = turn(q, at_q, interleaved, dtype), turn(k, angles[places], interleaved, dtype)
        for row, n in enumerate(lengths.tolist()):
            keys = torch.cat([old_k[row, :n].to(dtype), k_[row]])[None]
            values = torch.cat([old_v[row, :n], v[row]])[None].to(dtype)
            problem = Explicit(*heads_first(q_[row][None], keys, values), sees(3, n + 3, causal))
            naive = problem.evaluated(dtype, problem.order(shuffled=False))
            results[row, dtype] = (k_[row], naive["o"][0].transpose(0, 1))
    for row, n in enumerate(lengths.tolist()):
        pairs = zip(results[row, torch.float64], results[row, torch.float32], strict=True)
        for actual, (truth, naive) in zip((k_cache[row, n : n + 3], o[row]), pairs, strict=True):
            assert_close("rotary", actual, truth, naive)
        assert torch.equal(v_cache[row, n : n + 3], v[row])


# ---- ring hooks


def merge(out, lse, block_out, block_lse):
    """Two parts of the keys into one, as ring attention does."""
    block_out, block_lse = block_out.float(), block_lse.transpose(-2, -1).unsqueeze(-1)
    if out is None:
        return block_out, block_lse
    out = out - torch.sigmoid(block_lse - lse) * (out - block_out)
    return out, lse - torch.nn.functional.logsigmoid(lse - block_lse)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_ring_of_two(causal):
    """The second rank's queries with its own keys, then the first rank's: as over all of them."""
    n = 9
    q, k, v = qkv(2, 2 * n, 2 * n, 4, 2, 24)
    problem = Explicit(*heads_first(q, k, v), sees(2 * n, 2 * n, causal))
    scale, off = 24**-0.5, (-1, -1, 0.0, None)
    ranks = [[x.detach()[:, r * n : (r + 1) * n] for x in (q, k, v)] for r in range(2)]
    outs, lses = [], []
    for rank in range(2):
        out = lse = None
        for step in range(2):
            source = (rank - step) % 2
            if causal and source > rank:
                continue
            _, kr, vr = ranks[source]
            block = flash_attn_interface._flash_attn_forward(
                ranks[rank][0], kr, vr, 0.0, scale, causal and step == 0, *off, False
            )
            out, lse = merge(out, lse, *block[:2])
        outs.append(out)
        lses.append(lse.squeeze(-1).transpose(1, 2))
    grads = [torch.zeros(2, 2 * n, h, 24) for h in (4, 2, 2)]
    dout = problem.do.transpose(1, 2)
    for rank in range(2):
        rows = slice(rank * n, (rank + 1) * n)
        for source in range(rank + 1 if causal else 2):
            qr, (_, kr, vr) = ranks[rank][0], ranks[source]
            blocks = [torch.full_like(x, float("nan")) for x in (qr, kr, vr)]
            flash_attn_interface._flash_attn_backward(
                dout[:, rows], qr, kr, vr, outs[rank], lses[rank], *blocks, 0.0, scale,
                causal and source == rank, *off, False,
            )  # fmt: skip
            at = slice(source * n, (source + 1) * n)
            for grad, block, where in zip(grads, blocks, (rows, at, at), strict=True):
                grad[:, where] += block
    problem.dlse.zero_()
    results = {"o": torch.cat(outs, 1), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    problem.check({name: x.transpose(1, 2) for name, x in results.items()})


def test_ring_hooks_varlen():
    """The keys of each sequence in two halves, merged; gradients from the lse of the whole."""
    lengths = [4, 0, 10]
    halves = [[(n + 1) // 2 for n in lengths], [n // 2 for n in lengths]]
    (q, k, v), (ends, _, most, _) = packed(lengths, lengths)
    blocks = [torch.ones(n, n, dtype=torch.bool) for n in lengths]
    problem = Explicit(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_diagonal(blocks))
    q, k, v = (x.detach() for x in (q, k, v))
    token = torch.cat([torch.arange(n) >= h for n, h in zip(lengths, halves[0], strict=True)])
    scale, out, lse, parts = 24**-0.5, None, None, []
    for part, half in enumerate(halves):
        at = (token == bool(part)).nonzero().squeeze(1)
        ends_k = torch.tensor([0, *half]).cumsum(0).int()
        sequences = (ends, ends_k, most, max(half))
        block = flash_attn_interface._flash_attn_varlen_forward(
            q, k[at], v[at], *sequences, 0.0, scale, False
        )
        out, lse = merge(out, lse, *block[:2])
        parts.append((at, sequences))
    dout, total = problem.do[0].transpose(0, 1), [torch.zeros_like(x) for x in (q, k, v)]
    for at, sequences in parts:
        grads = [torch.full_like(x, float("nan")) for x in (q, k[at], v[at])]
        flash_attn_interface._flash_attn_varlen_backward(
            dout, q, k[at], v[at], out, lse.squeeze(-1).transpose(0, 1), *grads, *sequences,
            0.0, scale, False, -1, -1, 0.0, None, False,
        )  # fmt: skip
        total[0] += grads[0]
        total[1][at], total[2][at] = grads[1:]
    problem.dlse.zero_()
    results = {"o": out, **dict(zip(("dq", "dk", "dv"), total, strict=True))}
    problem.check({name: x.transpose(0, 1)[None] for name, x in results.items()})


def test_hooks_with_dropout_are_the_function():
    """rng_state carries the pairs that were dropped into the backward pass."""
    q, k, v = qkv(2, 7, 9, 4, 2, 16)
    torch.manual_seed(5)
    o = fa.flash_attn_func(q, k, v, dropout_p=0.5, causal=True)
    do = draw(*o.shape, seed=7)
    expected = torch.autograd.grad(o, [q, k, v], do)
    torch.manual_seed(5)
    args, off = (0.5, 0.25, True, -1, -1, 0.0, None), (False,)
    out, lse, _, rng_state = flash_attn_interface._flash_attn_forward(q, k, v, *args, *off)
    assert torch.equal(out, o)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    flash_attn_interface._flash_attn_backward(
        do, q, k, v, out, lse, *grads, *args, True, rng_state=rng_state
    )
    torch.testing.assert_close(grads, list(expected))
    with pytest.raises(ValueError, match="rng_state"):
        flash_attn_interface._flash_attn_backward(do, q, k, v, out, lse, *grads, *args, True)


# ---- bert_padding


def test_padding_round_trip():
    hidden = draw(3, 5, 2).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]])
    unused = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    tokens, indices, ends, longest, used = bert_padding.unpad_input(hidden, mask, unused)
    both = (mask + unused).bool()
    assert torch.equal(tokens, hidden[both])
    assert indices.tolist() == both.flatten().nonzero().flatten().tolist()
    assert ends.tolist() == [0, 3, 3, 7] and ends.dtype == torch.int32
    assert longest == 4 and type(longest) is int
    assert used.tolist() == [2, 0, 3] and used.dtype == torch.int32
    back = bert_padding.pad_input(tokens, indices, 3, 5)
    assert torch.equal(back, torch.where(both[..., None], hidden, 0))
    (grad,) = torch.autograd.grad(back.sum(), [hidden])
    assert torch.equal(grad, both[..., None].expand_as(grad).float())
    assert len(bert_padding.unpad_input(hidden, mask)) == 5


def test_concatenated_sequences():
    hidden = draw(3, 6, 2)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    tokens, indices, ends, longest = bert_padding.unpad_input_for_concatenated_sequences(
        hidden, lengths
    )
    assert ends.tolist() == [0, 2, 5, 8, 10, 16] and longest == 6
    assert torch.equal(tokens, torch.cat([hidden[0, :5], hidden[1, :5], hidden[2]]))
    assert torch.equal(bert_padding.index_first_axis(hidden.flatten(0, 1), indices), tokens)
    rows = bert_padding.index_put_first_axis(tokens, indices, 18)
    assert torch.equal(rows.view(3, 6, 2)[:2, 5:], torch.zeros(2, 1, 2))


# ---- names and errors


def test_features_are_found_by_name():
    """Callers look for arguments in the signature."""
    names = set(inspect.signature(fa.flash_attn_varlen_func).parameters)
    expected = {"dropout_p", "window_size", "deterministic", "softcap", "max_seqlen_q"}
    assert expected | {"block_table", "return_attn_probs"} <= names
    for name in fa.__all__:
        kinds = {p.kind for p in inspect.signature(getattr(fa, name)).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


HOOKS = {
    "_flash_attn_forward": "q k v dropout_p softmax_scale causal window_size_left "
    "window_size_right softcap alibi_slopes return_softmax",
    "_flash_attn_backward": "dout q k v out softmax_lse dq dk dv dropout_p softmax_scale causal "
    "window_size_left window_size_right softcap alibi_slopes deterministic rng_state",
    "_flash_attn_varlen_forward": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
    "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes "
    "return_softmax block_table leftpad_k seqused_k zero_tensors",
    "_flash_attn_varlen_backward": "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k "
    "max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size_left window_size_right "
    "softcap alibi_slopes deterministic rng_state zero_tensors",
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_show_their_arguments(name):
    """Ring code builds its calls from getfullargspec, which does not look behind decorators."""
    hook = getattr(flash_attn_interface, name)
    assert inspect.isfunction(hook) and inspect.getfullargspec(hook).args == HOOKS[name].split()


def test_lengths_in_tensors():
    (q, k, v), (*ends, most_q, most_k) = packed([5, 3], [2, 9])
    expected = fa.flash_attn_varlen_func(q, k, v, *ends, most_q, most_k)
    lengths = torch.tensor(most_q), torch.tensor(most_k)
    assert torch.equal(fa.flash_attn_varlen_func(q, k, v, *ends, *lengths), expected)


Q, K = draw(1, 4, 4, 8), draw(1, 6, 2, 8)
WRONG = {
    "rank": (lambda: fa.flash_attn_func(Q[0], K, K), ValueError, "q: got shape"),
    "heads": (lambda: fa.flash_attn_func(Q, K[:, :, [0, 1, 1]], K), ValueError, "k: got 3 heads"),
    "batch": (lambda: fa.flash_attn_func(Q, *2 * [K.repeat(2, 1, 1, 1)]), ValueError, "batch"),
    "value": (lambda: fa.flash_attn_func(Q, K, K[:, :5]), ValueError, "v: got shape"),
    "window": (lambda: fa.flash_attn_func(Q, K, K, window_size=3), TypeError, "window_size"),
    "softcap": (lambda: fa.flash_attn_func(Q, K, K, softcap=-1.0), ValueError, "softcap"),
    "dropout": (lambda: fa.flash_attn_func(Q, K, K, dropout_p=2), ValueError, "dropout_p"),
    "qkv": (lambda: fa.flash_attn_qkvpacked_func(Q), ValueError, "qkv: got shape"),
    "kvcache gradient": (
        lambda: fa.flash_attn_with_kvcache(Q.clone().requires_grad_(), K, K),
        NotImplementedError,
        "no_grad",
    ),
    "cache is full": (
        lambda: fa.flash_attn_with_kvcache(Q, K, K, K[:, :2], K[:, :2], cache_seqlens=5),
        ValueError,
        "cache_seqlens: got 5",
    ),
    "append where": (
        lambda: fa.flash_attn_with_kvcache(Q, K, K, K[:, :2], K[:, :2]), ValueError, "where to",
    ),
    "rotary without keys": (
        lambda: fa.flash_attn_with_kvcache(Q, K, K, rotary_cos=K, rotary_sin=K),
        ValueError,
        "rotary",
    ),
    "block": (
        lambda: fa.flash_attn_with_kvcache(
            Q, K, K, cache_seqlens=3, block_table=torch.tensor([[1]], dtype=torch.int32)
        ),
        ValueError,
        "block_table: got blocks from 1",
    ),
    "seqused": (
        lambda: flash_attn_interface._flash_attn_varlen_forward(
            Q[0], K[0], K[0], None, None, 4, 6, 0.0, 1.0, False, seqused_k=K
        ),
        NotImplementedError,
        "seqused_k",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call, error, message", WRONG.values(), ids=list(WRONG))
def test_wrong_arguments(call, error, message):
    before = K.clone()
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(K, before)


# ---- install


@pytest.fixture
def installed():
    fa.install()
    yield
    fa.uninstall()


SCRIPT = """
    from flash_attn import __version__, flash_attn_func
    from flash_attn.bert_padding import pad_input, unpad_input
    from flash_attn.flash_attn_interface import _flash_attn_forward, flash_attn_varlen_func

    def attend(x, mask):
        tokens, indices, ends, longest, _ = unpad_input(x, mask)
        tokens = flash_attn_varlen_func(tokens, tokens, tokens, ends, ends, longest, longest)
        return pad_input(tokens, indices, *mask.shape)
"""


def test_code_that_imports_flash_attn(installed, tmp_path, monkeypatch):
    (tmp_path / "model_with_flash.py").write_text(textwrap.dedent(SCRIPT))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        from model_with_flash import attend, flash_attn_func
    finally:
        sys.modules.pop("model_with_flash", None)
    x, mask = draw(2, 5, 2, 8), torch.ones(2, 5)
    torch.testing.assert_close(attend(x, mask), flash_attn_func(x, x, x))
    assert importlib.util.find_spec("flash_attn").name == "flash_attn"
    with pytest.raises(ModuleNotFoundError, match="flash_attn.layers"):
        importlib.import_module("flash_attn.layers")


def test_uninstall_leaves_nothing():
    undo = fa.install()
    assert fa.install() is undo and "flash_attn" in sys.modules
    undo()
    assert not [name for name in sys.modules if name.split(".")[0] == "flash_attn"]
    assert importlib.util.find_spec("flash_attn") is None
    undo()


def test_the_real_package_stays(tmp_path, monkeypatch):
    """Only force puts it aside, and it comes back."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("real = True")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(RuntimeError, match="force=True"):
        fa.install()
    try:
        real = importlib.import_module("flash_attn")
        undo = fa.install(force=True)
        assert not hasattr(importlib.import_module("flash_attn"), "real")
        undo()
        assert importlib.import_module("flash_attn") is real
    finally:
        sys.modules.pop("flash_attn", None)
