"""S_dmask, the matrix that shows which pairs dropout took: from it, all results follow."""

import pytest
import torch
from flash_inputs import distances, packed, qkv, sees
from support import assert_close

from clinattn.integrations import flash_attn as fa
from clinattn.integrations.flash_attn.flash_attn_interface import (
    _flash_attn_forward,
    _flash_attn_varlen_forward,
)

P = 0.3
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0])
WORDS = {
    "plain": {},
    "causal": {"causal": True},
    "window and softcap": {"window_size": (30, 4), "softcap": 2.0, "softmax_scale": 0.3},
    "alibi": {"alibi_slopes": SLOPES, "causal": True},
}


def probabilities(q, k, words, dtype):
    """(heads, nq, nk) in dtype of one sequence (n, heads, head_dim), with what is seen."""
    nq, nk, heads = len(q), len(k), q.shape[1]
    k = k.repeat_interleave(heads // k.shape[1], 1)
    s = torch.einsum("ihd,jhd->hij", q.to(dtype), k.to(dtype))
    s = s * words.get("softmax_scale", q.shape[-1] ** -0.5)
    if "softcap" in words:
        s = words["softcap"] * torch.tanh(s / words["softcap"])
    if "alibi_slopes" in words:
        s = s - words["alibi_slopes"].to(dtype)[:, None, None] * distances(nq, nk)
    seen = sees(nq, nk, words.get("causal", False), words.get("window_size", (-1, -1)))
    return torch.softmax(s.masked_fill(~seen, -float("inf")), -1).nan_to_num(0.0), seen


def check_sequence(matrix, q, k, v, o, words):
    """The matrix (heads, rounded, rounded), and o, which must be that of the pairs it keeps."""
    nq, nk = len(q), len(k)
    assert (matrix[:, nq:] == 0).all() and (matrix[:, :, nk:] == 0).all()
    matrix = matrix[:, :nq, :nk]
    expected, outputs = [], []
    for dtype in (torch.float64, torch.float32):
        p, seen = probabilities(q, k, words, dtype)
        kept = p.masked_fill(matrix.signbit(), 0.0) / (1 - P)
        heads_of_v = v.to(dtype).repeat_interleave(q.shape[1] // v.shape[1], 1)
        expected.append(p)
        outputs.append(torch.einsum("hij,jhd->ihd", kept, heads_of_v))
    assert (matrix[:, ~seen] == 0).all()
    assert_close("S_dmask", matrix.abs(), *expected)
    assert_close("o", o, *outputs)
    return int((matrix.signbit() & seen).sum()), q.shape[1] * int(seen.sum())


def check_share(counts):
    """The dropped pairs are a share P of those seen, within five deviations."""
    dropped, pairs = (sum(x) for x in zip(*counts, strict=True))
    assert abs(dropped / pairs - P) < 5 * (P * (1 - P) / pairs) ** 0.5


@torch.no_grad()
@pytest.mark.parametrize("nq, nk", [(37, 150), (130, 128)])
@pytest.mark.parametrize("words", WORDS.values(), ids=list(WORDS))
def test_dense(words, nq, nk):
    q, k, v = qkv(2, nq, nk, 4, 2, 16)
    o, _, matrix = fa.flash_attn_func(q, k, v, P, **words, return_attn_probs=True)
    rounded = (128 if nq <= 128 else 256, 128 if nk <= 128 else 256)
    assert matrix.shape == (2, 4, *rounded) and matrix.dtype == q.dtype
    check_share([check_sequence(*x, words) for x in zip(matrix, q, k, v, o, strict=True)])


@torch.no_grad()
@pytest.mark.parametrize("words", WORDS.values(), ids=list(WORDS))
def test_packed(words):
    lengths_q, lengths_k = [40, 0, 7, 131], [65, 3, 0, 140]
    (q, k, v), sequences = packed(lengths_q, lengths_k)
    o, _, matrix = fa.flash_attn_varlen_func(
        q, k, v, *sequences, P, **words, return_attn_probs=True
    )
    assert matrix.shape == (4, 4, 256, 256)
    parts = [x.split(n) for x, n in ((q, lengths_q), (k, lengths_k), (v, lengths_k))]
    given = zip(matrix, *parts, o.split(lengths_q), strict=True)
    check_share([check_sequence(*x, words) for x in given])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_of_the_same_pairs(dtype):
    """dv of one-hot do is a column of what is kept."""
    q, k, v = (x.detach() for x in qkv(1, 20, 30, 4, 4, 32, dtype))
    v.requires_grad_()
    with torch.enable_grad():
        o, _, matrix = fa.flash_attn_func(q, k, v, P, return_attn_probs=True)
        do = torch.zeros_like(o)
        do[0, 7, :, 0] = 1
        (dv,) = torch.autograd.grad(o, [v], do)
    row = matrix[0, :, 7, :30]
    expected = row.masked_fill(row.signbit(), 0.0).float() / (1 - P)
    actual = dv[0, :, :, 0].T.float()
    info = torch.finfo(dtype)  # each side rounds twice, by half an eps
    torch.testing.assert_close(actual, expected, rtol=2 * info.eps, atol=2 * info.tiny)
    assert matrix.dtype == dtype and not matrix.requires_grad


def test_all_forms_return_the_same():
    qkv_ = torch.randn(2, 9, 3, 4, 16)
    q, k, v = qkv_.unbind(2)
    ends = torch.tensor([0, 9, 18], dtype=torch.int32)
    flat = qkv_.flatten(0, 1)
    off = (None, True, -1, -1, 0.0, None)
    calls = (
        lambda: fa.flash_attn_func(q, k, v, P, causal=True, return_attn_probs=True)[2],
        lambda: fa.flash_attn_qkvpacked_func(qkv_, P, causal=True, return_attn_probs=True)[2],
        lambda: fa.flash_attn_kvpacked_func(
            q, qkv_[:, :, 1:], P, causal=True, return_attn_probs=True
        )[2],
        lambda: fa.flash_attn_varlen_qkvpacked_func(
            flat, ends, 9, P, causal=True, return_attn_probs=True
        )[2],
        lambda: fa.flash_attn_varlen_kvpacked_func(
            flat[:, 0], flat[:, 1:], ends, ends, 9, 9, P, causal=True, return_attn_probs=True
        )[2],
        lambda: _flash_attn_forward(q, k, v, P, *off, True)[2],
        lambda: _flash_attn_varlen_forward(*flat.unbind(1), ends, ends, 9, 9, P, *off, True)[2],
    )
    results = []
    for call in calls:
        torch.manual_seed(5)
        results.append(call())
    for x in results[1:]:
        assert torch.equal(x.signbit(), results[0].signbit())
        torch.testing.assert_close(x, results[0])


def test_without_dropout_there_is_none():
    q, k, v = qkv(1, 5, 5, 2, 2, 8)
    assert fa.flash_attn_func(q, k, v, return_attn_probs=True)[2].numel() == 0
    with pytest.raises(ValueError, match="return_softmax: got True without dropout"):
        _flash_attn_forward(q, k, v, 0.0, None, False, -1, -1, 0.0, None, True)
