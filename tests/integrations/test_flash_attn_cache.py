"""flash-attn's cache of keys and values, written in place."""


import pytest
import torch
from compared import Explicit
from flash_inputs import CAUSAL, TABLE, draw, heads_first, sees
from support import assert_close

from clinattn.integrations import flash_attn as fa


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


@pytest.mark.parametrize("new, n_queries", [(1, 4), (3, 5)])
@pytest.mark.parametrize("words", [CAUSAL, {"window_size": torch.tensor([3, 1])}, {}])
def test_tables_of_the_length_of_the_cache(words, new, n_queries):
    """More queries than new keys: the table has a row for each place there is."""
    q, k, v = (draw(2, n, h, 16, seed=n) for n, h in ((n_queries, 4), (new, 2), (new, 2)))
    angles, lengths = draw(10, 4, seed=5), torch.tensor([10 - n_queries, 1], dtype=torch.int32)
    results = []
    for rows in (10, 14):
        caches = [draw(2, 10, 2, 16, seed=at) for at in (3, 4)]
        table = torch.cat((angles, torch.full((rows - 10, 4), float("nan"))))
        o = fa.flash_attn_with_kvcache(
            q, *caches, k, v, table.cos(), table.sin(), lengths, **words
        )  # fmt: skip
        results.append((o, *caches))
    assert all(map(torch.equal, *results)) and results[0][0].isfinite().all()


def test_a_table_too_short_for_the_queries_is_refused_before_the_cache_is_written():
    q, k, v = (draw(2, n, h, 16, seed=n) for n, h in ((4, 4), (1, 2), (1, 2)))
    caches = cache_of(2, 10)
    table, lengths = draw(10, 4), torch.tensor([7, 1], dtype=torch.int32)
    call = (q, *caches, k, v, table, table, lengths)
    with pytest.raises(ValueError, match="got 10 positions, expected at least 11 for 4 queries"):
        fa.flash_attn_with_kvcache(*call, **CAUSAL)
    with pytest.raises(ValueError, match="softmax_scale: got nan"):
        fa.flash_attn_with_kvcache(*call, softmax_scale=float("nan"))
    with pytest.raises(ValueError, match="alibi_slopes: got shape"):
        fa.flash_attn_with_kvcache(*call, alibi_slopes=torch.ones(3))
    assert all(x.isnan().all() for x in caches)
