"""flash-attn's functions against plain maths, with its own bottom-right alignment."""

import inspect

import pytest
import torch
from compared import Explicit, block_diagonal, gradients_of
from flash_inputs import (
    CAUSAL,
    DTYPES,
    TABLE,
    distances,
    draw,
    heads_first,
    packed,
    paged,
    qkv,
    sees,
)

from clinattn.integrations import flash_attn as fa
from clinattn.integrations.flash_attn.flash_attn_interface import FlashAttnFunc

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



def test_features_are_found_by_name():
    """Callers look for arguments in the signature."""
    names = set(inspect.signature(fa.flash_attn_varlen_func).parameters)
    expected = {"dropout_p", "window_size", "deterministic", "softcap", "max_seqlen_q"}
    assert expected | {"block_table", "return_attn_probs"} <= names
    for name in fa.__all__:
        kinds = {p.kind for p in inspect.signature(getattr(fa, name)).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


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
    "num_splits": (
        lambda: fa.flash_attn_with_kvcache(Q, K, K, num_splits=129), ValueError, "num_splits: got",
    ),
    "by position": (lambda: FlashAttnFunc.apply(Q, K, K), TypeError, "got 3 arguments"),
    "gradients or not": (
        lambda: FlashAttnFunc.apply(Q, K, K, 0, None, False, (-1, -1), 0, None, False, False, 2),
        TypeError,
        "is_grad_enabled",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call, error, message", WRONG.values(), ids=list(WRONG))
def test_wrong_arguments(call, error, message):
    before = K.clone()
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(K, before)
