"""Every form that torch's scaled_dot_product_attention takes, held against it in fp64."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from sdpa_ways import outcome, overridden
from support import BACKENDS, backends_module
from torch.utils.flop_counter import FlopCounterMode

import clinattn
from clinattn import FusedAttention, fused_attention
from clinattn.operator.words.checks import check_dense

# shapes of query, key, value and mask, and whether enable_gqa
FORMS = {
    "2-D": ((5, 8), (7, 8), (7, 8), None, False),
    "2-D mask": ((5, 8), (7, 8), (7, 6), (5, 7), False),
    "3-D": ((4, 5, 8), (4, 7, 8), (4, 7, 8), (4, 1, 7), False),
    "3-D one key head": ((4, 5, 8), (1, 7, 8), (1, 7, 8), None, False),
    "3-D grouped": ((4, 5, 8), (2, 7, 8), (2, 7, 8), None, True),
    "5-D": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8), None, False),
    "5-D mask": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8), (2, 1, 4, 5, 7), False),
    "5-D one mask": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8), (1, 1, 1, 5, 7), False),
    "5-D mask of 4": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8), (3, 1, 5, 7), False),
    "5-D grouped": ((2, 3, 4, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 8), None, True),
    "6-D": ((2, 1, 3, 2, 5, 8), (1, 2, 3, 2, 7, 8), (2, 2, 1, 1, 7, 9), None, False),
    "one batch of keys": ((3, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 8), None, False),
    "one batch of queries": ((1, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8), (3, 1, 5, 7), False),
    "one head of keys": ((3, 4, 5, 8), (3, 1, 7, 8), (3, 1, 7, 8), None, False),
    "one head of queries": ((3, 1, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8), None, False),
    "one head of values": ((3, 4, 5, 8), (3, 4, 7, 8), (3, 1, 7, 8), None, False),
    "key and value grouped apart": ((3, 4, 5, 8), (3, 2, 7, 8), (3, 4, 7, 8), None, True),
    "fewer dimensions": ((4, 5, 8), (3, 4, 7, 8), (7, 8), None, False),
    "wider values": ((3, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 24), (5, 7), False),
    "grouped wider values": ((3, 4, 5, 8), (3, 2, 7, 8), (3, 2, 7, 24), None, True),
    "head_dim 300": ((2, 2, 5, 300), (2, 2, 7, 300), (2, 2, 7, 300), None, False),
    "values of 260": ((2, 2, 5, 8), (2, 2, 7, 8), (2, 2, 7, 260), None, False),
    "empty batch": ((0, 4, 5, 8), (0, 4, 7, 8), (0, 4, 7, 6), None, False),
    "empty 5-D": ((2, 0, 4, 5, 8), (2, 0, 4, 7, 8), (2, 0, 4, 7, 8), None, False),
    "no queries": ((2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 6), None, False),
}


def apply(query, key, value, attn_mask=None, enable_gqa=False):
    """FusedAttention, whose groups of heads need no word."""
    return FusedAttention.apply(query, key, value, attn_mask)


WAYS = {"fused_attention": fused_attention, "apply": apply, "override": overridden}


def drawn(shapes, dtype=torch.float64):
    *inputs, mask = shapes
    torch.manual_seed(0)
    made = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in inputs]
    return made, None if mask is None else torch.rand(mask) < 0.8


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_means_what_it_means_in_torch(form, way):
    *shapes, enable_gqa = FORMS[form]
    inputs, mask = drawn(shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the reference, head_dim above 256
        ours = outcome(WAYS[way], inputs, attn_mask=mask, enable_gqa=enable_gqa)
    theirs = outcome(F.scaled_dot_product_attention, inputs, attn_mask=mask, enable_gqa=enable_gqa)
    for name, x, y in zip(("o", "dq", "dk", "dv"), ours, theirs, strict=True):
        assert x.shape == y.shape, name
        torch.testing.assert_close(x, y.nan_to_num(), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("way", WAYS)
def test_no_heads(way):
    """torch's own function ends the process here, up to 2.11."""
    inputs, _ = drawn(((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 6), None))
    o, *grads = outcome(WAYS[way], inputs)
    assert o.shape == (2, 0, 5, 6)
    assert [x.shape for x in grads] == [x.shape for x in inputs]


@pytest.mark.parametrize("form", FORMS)
def test_lse_has_the_form_of_the_output(form):
    *shapes, enable_gqa = FORMS[form]
    (q, k, v), mask = drawn(shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        o, lse = fused_attention(q, k, v, mask, enable_gqa=enable_gqa, return_lse=True)
        _, lse_of_apply, lse_low = FusedAttention.apply(q, k, v, mask, return_lse=True)
    assert lse.shape == lse_of_apply.shape == lse_low.shape == o.shape[:-1]
    if enable_gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -float("inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1).expand(lse.shape))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_values_of_another_width_are_fused(name, layout, monkeypatch):
    """No tensor of another width than those given is made."""
    q, k, v = (torch.randn(2, 40, 3, d).transpose(1, 2) for d in (24, 24, 80))
    if layout == "dense":
        o = fused_attention(q, k, v, backend=name)
    else:
        ends = torch.tensor([0, 40, 80], dtype=torch.int32)
        packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        o = clinattn.fused_attention_varlen(*packed, ends, backend=name)
        o = o.unflatten(0, (2, 40)).transpose(1, 2)
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v))
    with FlopCounterMode(display=False) as counter:
        fused_attention(q, k, v, backend=name)
    assert counter.get_total_flops() == 2 * (24 + 80) * 2 * 3 * 40 * 40


@pytest.mark.parametrize("way", WAYS)
def test_wide_heads_are_served_in_linear_memory_after_one_warning(way):
    backends_module._select.cache_clear()
    backends_module._warn_once.cache_clear()
    q = torch.randn(1, 1, 3000, 320, requires_grad=True)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: seen.append(x.numel()) or x, lambda x: x
    ):
        with pytest.warns(RuntimeWarning, match="does not serve head_dim above 256") as told:
            for _ in range(2):
                o = WAYS[way](q, q, q)
                o.sum().backward()
    assert len(told) == 1
    assert max(seen) < 3000 * 3000 / 4
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, q, q))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the compiled backend")
def test_wide_heads_are_refused_by_kernels_asked_for_by_name():
    q, v = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 257)
    with pytest.raises(NotImplementedError, match="'cpu' does not serve head_dim above 256; these"):
        fused_attention(q, q, v, backend="cpu")
    o = fused_attention(q, q, v, backend="reference")
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, q, v))


@pytest.mark.parametrize(
    "shapes, words",
    [
        (
            ((8,), (7, 8), (7, 8)),
            r"query: got shape \(8,\), expected at least \(tokens, head_dim\)",
        ),
        (((5, 8), (7, 8), (6, 8)), r"value: got shape \(6, 8\), expected the 7 tokens of key"),
        (((2, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8)), r"key: .* broadcasts: \(3,\) to \(2,\)"),
        (((4, 5, 8), (2, 7, 8), (2, 7, 8)), "enable_gqa=True lets groups of query heads share one"),
        (((2, 5, 8), (2, 7, 9), (2, 7, 9)), "key: got head_dim 9, expected that of query, 8"),
        (((2, 5, 8), (2, 7, 8), (2, 7, 0)), "expected a head_dim of at least 1"),
    ],
)
def test_what_does_not_broadcast_is_refused(shapes, words):
    q, k, v = (torch.randn(shape) for shape in shapes)
    with pytest.raises(ValueError, match=words):
        fused_attention(q, k, v)
    if "enable_gqa" not in words:  # which apply does not have
        with pytest.raises(ValueError, match=words):
            FusedAttention.apply(q, k, v)


def test_other_forms_are_refused_where_only_one_is_taken():
    """The checks that other interfaces share raise; a form that is passed over is not served."""
    q, one = torch.randn(2, 4, 5, 8), torch.randn(1, 4, 5, 8)
    for inputs in ((q, one, one), (q, q, q[:, :1]), (q[0], q[0], q[0])):
        with pytest.raises(ValueError, match="with one batch size"):
            check_dense(*inputs, True)
    check_dense(q, q[:, :2], q[:, :2, :, :3], True)


def test_arguments_per_sequence_need_four_dimensions():
    q = torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match="kv_lengths: got one with 3 dimensions of query, key and"):
        fused_attention(q, q, q, kv_lengths=torch.tensor([5]))
    with pytest.raises(ValueError, match="alibi_slopes: got one with 2 dimensions"):
        fused_attention(q[0], q[0], q[0], alibi_slopes=torch.ones(1))
    q = torch.randn(2, 3, 4, 5, 8)  # B is 2 * 3
    lengths = torch.tensor([5, 4, 3, 2, 1, 5])
    o = fused_attention(q, q, q, kv_lengths=lengths)
    flat = q.flatten(0, 1)
    assert torch.equal(o.flatten(0, 1), fused_attention(flat, flat, flat, kv_lengths=lengths))
