"""The attention function that transformers is given."""

import warnings

import pytest
import torch
from torch import nn
from transformers_inputs import (
    BIDIRECTIONAL,
    CAUSAL,
    DOCUMENTS,
    LOCAL,
    MASKS,
    NO_SKIP,
    PADDING,
    POSITIONS,
    RIGHT,
    SLIDING,
    WINDOW,
    config,
    packed,
    their_mask,
)

import clinattn
from clinattn.integrations.transformers import registry as integration
from clinattn.integrations.transformers.masks import attention_mask
from clinattn.integrations.transformers.registry import attention


class Module(nn.Module):
    is_causal = False

    def __init__(self, **flags):
        super().__init__()
        for name, value in flags.items():
            setattr(self, name, value)


def tensors(batch=2, heads=4, kv_heads=2, nq=13, nk=13, dim=24, value_dim=None):
    """q, k, v as transformers has them: transposed from (B, N, H, D)."""
    shapes = [(nq, heads, dim), (nk, kv_heads, dim), (nk, kv_heads, value_dim or dim)]
    return [torch.randn(batch, *shape, requires_grad=True).transpose(1, 2) for shape in shapes]


def plain(q, k, v, visible=None, bias=None, scale=None, softcap=None, sink=None):
    """Eager attention in fp64, (B, N, H, D)."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.double()
    if visible is not None:
        s = s.masked_fill(~visible, -torch.inf)
    if sink is not None:
        column = sink.double()[:, None, None].expand(*s.shape[:3], 1)
        s = torch.cat([s, column], -1)
    p = s.softmax(-1).nan_to_num()[..., : v.shape[2]]
    return (p @ v).transpose(1, 2)


def assert_close(o, expected):
    """To fp32 of sums of a few dozen terms."""
    torch.testing.assert_close(o.double(), expected, rtol=2e-6, atol=2e-6)


def assert_same(call, expected, inputs):
    """Values and gradients."""
    o, weights = call
    assert weights is None and o.is_contiguous()
    assert_close(o, expected)
    do = torch.randn(o.shape, dtype=torch.float64)
    ours = torch.autograd.grad(o, inputs, do.float())
    theirs = torch.autograd.grad(expected, inputs, do, retain_graph=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=2e-5, atol=2e-5)


def causal(nq, nk, window=None):
    ahead = torch.arange(nk) - torch.arange(nq)[:, None] - (nk - nq)
    return (ahead <= 0) & (ahead > -(window or nk + nq))


@pytest.mark.parametrize("nq, nk", [(13, 13), (3, 13), (1, 13)])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("is_causal", [True, False])
def test_words_without_a_mask(nq, nk, window, is_causal):
    """The flag of the call or of the module; a window counts itself, as in transformers."""
    q, k, v = tensors(nq=nq, nk=nk)
    visible = causal(nq, nk, window) if is_causal else None
    if window and not is_causal:
        ahead = torch.arange(nk) - torch.arange(nq)[:, None] - (nk - nq)
        visible = ahead.abs() < window
    expected = plain(q, k, v, visible)
    for module, words in (
        (Module(is_causal=is_causal), {}),
        (Module(is_causal=not is_causal), {"is_causal": is_causal}),
    ):
        call = attention(module, q, k, v, None, sliding_window=window, **words)
        assert_same(call, expected, (q, k, v))


def test_cross_attention_is_not_causal():
    q, k, v = tensors(nq=5, nk=9)
    module = Module(is_causal=True, is_cross_attention=True)
    assert_same(attention(module, q, k, v), plain(q, k, v), (q, k, v))


PLAIN = [x for x in ("causal", "bidirectional", "sliding", "sliding-both-ways") if x in MASKS]


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("padded", [False, True])
def test_the_mask_says_it_all(kind, padded):
    """Whatever the module and the keywords say: eager attention does not hear them either."""
    function, words, _ = MASKS[kind]
    q, k, v = tensors()
    padding = PADDING if padded else None
    mask = attention_mask(
        2, 13, 13, mask_function=function, attention_mask=padding, config=config(), **words
    )
    visible = their_mask(2, 13, 13, mask_function=function, attention_mask=padding)
    misleading = Module(is_causal=kind == "bidirectional")
    call = attention(misleading, q, k, v, mask, sliding_window=2)
    assert_same(call, plain(q, k, v, visible), (q, k, v))


def test_packed_positions():
    q, k, v = tensors()
    mask = attention_mask(
        2, 13, 13, mask_function=packed(SLIDING), config=config(), **LOCAL | NO_SKIP
    )
    visible = their_mask(2, 13, 13, mask_function=packed(SLIDING))
    assert_same(attention(Module(), q, k, v, mask), plain(q, k, v, visible), (q, k, v))


@pytest.mark.parametrize(
    "flags, words, match",
    [
        ({"is_causal": True}, {}, "a causal or windowed layer"),
        ({}, {"is_causal": True}, "a causal or windowed layer"),
        ({}, {"sliding_window": 4}, "a causal or windowed layer"),
        ({}, {"position_ids": POSITIONS[:1]}, "position_ids of packed documents"),
    ],
    ids=["module", "word", "window", "documents"],
)
def test_a_mask_of_keys_that_may_have_lost_its_pattern_is_refused(flags, words, match):
    q, k, v = (x[:1] for x in tensors())
    keys = PADDING[:1, None, None]
    with pytest.raises(ValueError, match=rf"keys alone, \(1, 1, 1, 13\), with {match}"):
        attention(Module(**flags), q, k, v, keys, **words)
    assert_close(attention(Module(), q, k, v, keys)[0], plain(q, k, v, keys))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_two_dimensional_masks(dtype):
    q, k, v = tensors()
    expected = plain(q, k, v, PADDING[:, None, None])
    assert_same(attention(Module(), q, k, v, PADDING.to(dtype)), expected, (q, k, v))


@pytest.mark.parametrize("heads", [1, 4])
def test_complete_masks_of_the_caller(heads):
    """bool and floating 4-D masks, to which nothing is added."""
    q, k, v = tensors()
    visible = torch.rand(2, heads, 13, 13) < 0.7
    visible[..., 0] = True
    expected = plain(q, k, v, visible)
    module = Module(is_causal=True)
    hidden = (-torch.inf, torch.finfo(torch.float32).min)
    for mask in (visible, *(torch.zeros(()).where(visible, x) for x in hidden)):
        assert_same(attention(module, q, k, v, mask, sliding_window=3), expected, (q, k, v))


@pytest.mark.parametrize("padding", [None, PADDING, RIGHT], ids=["full", "padded", "right"])
@pytest.mark.parametrize("function", [CAUSAL, BIDIRECTIONAL], ids=["causal", "bidirectional"])
def test_position_bias(function, padding):
    q, k, v = tensors()
    bias = torch.randn(1, 4, 13, 13, requires_grad=True)
    mask = attention_mask(
        2, 13, 13, mask_function=function, attention_mask=padding, config=config(),
        allow_is_bidirectional_skip=True,
    )  # fmt: skip
    visible = their_mask(2, 13, 13, mask_function=function, attention_mask=padding)
    call = attention(Module(), q, k, v, mask, position_bias=bias, scaling=1.0)
    assert_same(call, plain(q, k, v, visible, bias, scale=1.0), (q, k, v, bias))


def test_position_bias_on_a_cache():
    q, k, v = tensors(nq=3)
    bias = torch.randn(1, 4, 3, 13, requires_grad=True)
    mask = attention_mask(2, 3, 13, q_offset=10, attention_mask=PADDING, config=config())
    visible = causal(3, 13) & PADDING[:, None, None]
    call = attention(Module(), q, k, v, mask, position_bias=bias)
    assert_same(call, plain(q, k, v, visible, bias), (q, k, v, bias))


def test_softcap_and_sinks():
    q, k, v = tensors()
    sink = torch.randn(4, requires_grad=True)
    visible = causal(13, 13) & PADDING[:, None, None]
    mask = attention_mask(2, 13, 13, attention_mask=PADDING, config=config())
    call = attention(Module(), q, k, v, mask, softcap=3.0, s_aux=sink)
    assert_same(call, plain(q, k, v, visible, softcap=3.0, sink=sink), (q, k, v, sink))


@pytest.mark.parametrize("dim, value_dim", [(24, 16), (16, 24), (40, 1)])
def test_values_of_another_head_dimension(dim, value_dim):
    q, k, v = tensors(dim=dim, value_dim=value_dim)
    assert_same(attention(Module(), q, k, v), plain(q, k, v), (q, k, v))


def test_learned_scale():
    q, k, v = tensors()
    scale = torch.tensor(0.3, requires_grad=True)
    call = attention(Module(), q, k, v, scaling=scale)
    assert_same(call, plain(q, k, v, scale=scale.double()), (q, k, v, scale))


ENDS = torch.tensor([0, 4, 5, 5, 13], dtype=torch.int32)
SAME = torch.bucketize(torch.arange(13), ENDS[1:].long(), right=True)
SAME = SAME[:, None] == SAME


@pytest.mark.parametrize("longest", [None, 8, torch.tensor(8)], ids=["none", "int", "tensor"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_rows(is_causal, window, longest):
    q, k, v = tensors(batch=1)
    words = {"max_length_q": longest, "max_length_k": longest}
    words |= {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS}
    ahead = torch.arange(13) - torch.arange(13)[:, None]
    visible = SAME & (ahead.abs() < (window or 99))
    if is_causal:
        visible &= ahead <= 0
    expected = plain(q, k, v, visible)
    call = attention(Module(is_causal=is_causal), q, k, v, sliding_window=window, **words)
    assert_same(call, expected, (q, k, v))


def test_packed_rows_with_a_bias_or_a_mask():
    q, k, v = tensors(batch=1)
    bias = torch.randn(1, 4, 13, 13, requires_grad=True)
    expected = plain(q, k, v, SAME, bias)
    call = attention(Module(), q, k, v, position_bias=bias, cu_seq_lens_q=ENDS)
    assert_same(call, expected, (q, k, v, bias))
    dense = torch.rand(1, 1, 13, 13) < 0.7
    dense |= torch.eye(13, dtype=torch.bool)
    expected = plain(q, k, v, SAME & dense)
    assert_same(attention(Module(), q, k, v, dense, cu_seq_lens_q=ENDS), expected, (q, k, v))


@pytest.mark.parametrize(
    "positions, packed",
    [
        ([0, 1, 2, 0, 1, 2, 3], True),
        ([3, 4, 3, 4, 5, 3, 3], True),
        ([0, 1, 2, 3, 4, 5, 6], False),
        ([0, 0, 0, 1, 1, 2, 2], False),  # the codes of visits
        ([0, 0, 0, 1, 2, 3, 4], False),  # what is known at birth, then events
        ([0, 0, 0, 0, 0, 0, 0], False),
        ([0, 2, 5, 6, 9, 0, 3], False),
        ([0, 1, 0, 1, 1, 0, 1], False),
    ],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.unpoisoned
def test_documents_of_positions(positions, packed, compiled):
    """Rows that start over are documents in transformers' flash path, and so they are here."""
    q, k, v = tensors(batch=1, nq=7, nk=7)
    ids = torch.tensor([positions])

    def call(q, k, v, ids):
        return attention(Module(), q, k, v, position_ids=ids)[0]

    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    documents = (torch.tensor(positions).diff(prepend=torch.tensor([-9])) <= 0).cumsum(0)
    visible = documents[:, None] == documents if packed else None
    assert_close(call(q, k, v, ids), plain(q, k, v, visible))


def test_documents_of_positions_within_a_window():
    q, k, v = tensors(batch=1)
    ids = POSITIONS[:1]
    same = DOCUMENTS[:1, :, None] == DOCUMENTS[:1, None]
    near = (torch.arange(13) - torch.arange(13)[:, None]).abs() < 3
    call = attention(Module(), q, k, v, position_ids=ids, sliding_window=3)
    assert_same(call, plain(q, k, v, same & near), (q, k, v))


@pytest.mark.parametrize(
    "words, error, match",
    [
        ({"cache": object()}, NotImplementedError, "cache.*paged.*eager"),
        ({"indices": torch.zeros(1)}, NotImplementedError, "indices.*Module"),
        ({"attention_mask": torch.ones(2, 5)}, ValueError, "5.*13 queries and 13 keys"),
        ({"attention_mask": torch.ones(2, 13, 13)}, ValueError, r"\(2, 13, 13\), expected"),
        ({"cu_seq_lens_q": ENDS}, ValueError, "2 rows, expected 1"),
    ],
    ids=["cache", "indices", "keys", "dimensions", "rows"],
)
def test_refused(words, error, match):
    q, k, v = tensors()
    with pytest.raises(error, match=match):
        attention(Module(), q, k, v, **words)


def test_documents_that_do_not_fill_the_row():
    q, k, v = tensors(batch=1)
    with pytest.raises(ValueError, match="up to 12 in a row of 13"):
        attention(Module(), q, k, v, cu_seq_lens_q=torch.tensor([0, 12], dtype=torch.int32))


def test_words_that_are_not_known_warn_once():
    integration._warn.cache_clear()
    q, k, v = tensors()
    with pytest.warns(UserWarning, match="Module passes 'temperature', which clinattn ignores"):
        attention(Module(), q, k, v, temperature=2.0)
    with pytest.warns(UserWarning, match="output_attentions"):
        assert attention(Module(), q, k, v, output_attentions=True)[1] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(Module(), q, k, v, temperature=2.0, output_attentions=True, use_cache=True)


def test_dropout_only_in_training():
    q, k, v = tensors()
    module = Module()
    torch.manual_seed(1)
    dropped = attention(module, q, k, v, dropout=0.5)[0]
    torch.manual_seed(1)
    expected = clinattn.fused_attention(q, k, v, dropout_p=0.5, enable_gqa=True)
    assert torch.equal(dropped, expected.transpose(1, 2))
    module.eval()
    assert torch.equal(attention(module, q, k, v, dropout=0.5)[0], attention(module, q, k, v)[0])
