"""Nested inputs of torch's attention and modules while clinattn is under torch's attention."""

import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from jagged import MAKES, drawn, packed, parts_of
from sdpa_ways import both_ways
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clinattn import fused_attention
from clinattn.integrations.torch import sdpa
from clinattn.integrations.torch.modules import adapt

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def nested(layout, **words):
    parts = [torch.randn(n, 24) for n in (5, 1, 9)]
    return torch.nested.nested_tensor(parts, layout=layout, **words)


@both_ways
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
@pytest.mark.parametrize("kind", ["attention", "encoder"])
def test_nested_inputs_of_modules(kind, layout, training, way):
    """Nested inputs give each sequence what it gets alone, gradients included."""
    layer = nn.TransformerEncoderLayer(24, 2, 32, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2) if kind == "encoder" else layer.self_attn
    model.train(training)
    call = model if kind == "encoder" else lambda x: model(x, x, x, need_weights=False)[0]
    x = nested(layout, requires_grad=True)
    with way():
        o = call(x)
        expected = [call(part[None].detach())[0] for part in x.unbind()]
    assert o.is_nested and o.layout == layout
    for part, other in zip(o.unbind(), expected, strict=True):
        torch.testing.assert_close(part, other)
    sum(part.sum() for part in o.unbind()).backward()
    assert x.grad.is_nested and all(p.grad is not None for p in model.parameters())


@both_ways
@torch.no_grad()
def test_nested_inputs_that_are_torchs(way):
    """Weights, a large head and other switches: its fused path, as without clinattn."""
    small, large = (nn.MultiheadAttention(n, 2, batch_first=True).eval() for n in (24, 600))
    x, wide = nested(torch.strided), torch.nested.nested_tensor([torch.randn(3, 600)])
    fast, forward = torch.backends.mha.get_fastpath_enabled(), nn.MultiheadAttention.forward
    for module, inputs, words, switch in (
        (small, x, {}, nullcontext()),
        (large, wide, {"need_weights": False}, nullcontext()),
        (small, x, {"need_weights": False}, sdpa_kernel(SDPBackend.MATH)),
    ):
        expected = module(inputs, inputs, inputs, **words)[0]
        with way(), switch:
            actual = module(inputs, inputs, inputs, **words)[0]
        assert all(map(torch.equal, actual.unbind(), expected.unbind()))
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert nn.MultiheadAttention.forward is forward


@both_ways
@pytest.mark.parametrize("make", MAKES.values(), ids=list(MAKES))
@pytest.mark.parametrize(
    "words",
    [{}, {"is_causal": True}, {"scale": 0.3, "enable_gqa": True}, {"dropout_p": 0.3}],
    ids=["plain", "causal", "gqa and scale", "dropout"],
)
def test_jagged_attention_is_that_of_fused_attention(words, make, way):
    """Also what torch's own refuses: causal order on a CPU, grouped heads, holes, other makes."""
    kv_heads = 2 if "enable_gqa" in words else 4
    parts = [parts_of(n, h, 16, 0) for n, h in (([5, 1, 9], 4), ([7, 3, 9], kv_heads))]
    results = []
    for attention, block in ((fused_attention, nullcontext), (F.scaled_dot_product_attention, way)):
        q, k = map(make, parts)
        torch.manual_seed(3)
        with block(), warnings.catch_warnings():
            warnings.simplefilter("error")
            o = attention(q, k, k, **words)
        leaves = [x for xs in parts for x in xs]
        o = [x * drawn(1, *x.shape) for x in o.unbind()]
        results.append([*o, *torch.autograd.grad(sum(x.sum() for x in o), leaves)])
    assert all(map(torch.equal, *results))


@both_ways
def test_jagged_attention_agrees_with_torchs(way):
    q, k = (packed(parts_of(n, 4, 16, 0)) for n in ([5, 1, 9], [7, 3, 9]))
    rows = torch.nested.nested_tensor([drawn(n, n, 6, 16) for n in (3, 5)], layout=torch.jagged)
    for inputs in ((q, k, k), (rows, rows, rows)):
        expected = F.scaled_dot_product_attention(*inputs)
        with way():
            actual = F.scaled_dot_product_attention(*inputs)
        assert actual.shape == expected.shape and actual.offsets() is expected.offsets()
        torch.testing.assert_close(actual.values(), expected.values())


@both_ways
def test_jagged_attention_that_is_torchs(way, monkeypatch):
    """Other switches, and what it refuses."""
    monkeypatch.setattr(sdpa, "_warned", set())
    x, y = (packed(parts_of(n, 4, 16, 0)) for n in ([5, 1, 9], [7, 3, 5]))
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(x, x, x)
        with way():
            assert torch.equal(F.scaled_dot_product_attention(x, x, x).values(), expected.values())
    for inputs, words in (
        ((x, x, x), {"attn_mask": torch.ones(9, 9) > 0}),
        ((x, torch.randn(3, 4, 9, 16), x), {}),
        ((x, x, y), {}),
        ((x, x.double(), x), {}),
        ((x, *2 * [packed(parts_of([5, 1, 9], 1, 16, 0))]), {}),
    ):
        with pytest.raises((RuntimeError, ValueError)) as theirs:
            F.scaled_dot_product_attention(*inputs, **words)
        with way(), pytest.raises(type(theirs.value)) as ours:
            F.scaled_dot_product_attention(*inputs, **words)
        assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]
    before = F.scaled_dot_product_attention(x, x, x)
    assert not torch.equal(before.values(), fused_attention(x, x, x).values())


@both_ways
@pytest.mark.unpoisoned
def test_jagged_attention_compiles(way):
    x = packed(parts_of([5, 1, 9], 4, 16, 0)).detach()
    attention = lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    with way():
        assert torch.equal(compiled(x).values(), fused_attention(x, x, x, is_causal=True).values())
    torch.compiler.reset()


@pytest.mark.parametrize("given", ["mask", "hint"])
def test_causal_encoder_of_jagged_inputs(given):
    """A causal mask, or is_causal alone, is causal order in each sequence."""
    layer = nn.TransformerEncoderLayer(24, 2, 32, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    adapt(model)
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    parts = [drawn(n, n, 24) for n in (5, 1, 9)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    o = model(x, **({"mask": mask} if given == "mask" else {"is_causal": True}))
    for part, actual in zip(parts, o.unbind(), strict=True):
        n = len(part)
        torch.testing.assert_close(actual, model(part[None], mask=mask[:n, :n])[0])


@both_ways
def test_module_of_jagged_inputs_with_holes(way):
    """Of nn.MultiheadAttention; dropout, so an encoder layer, refuses them in torch."""
    module = nn.MultiheadAttention(24, 2, batch_first=True)
    padded, lengths = torch.full((3, 12, 24), float("nan")), torch.tensor([5, 1, 9])
    for row, n in zip(padded, lengths, strict=True):
        row[:n] = drawn(int(n), int(n), 24)
    x = torch.nested.narrow(padded, 1, torch.zeros(3).long(), lengths, layout=torch.jagged)
    with way():
        o = module(x, x, x, need_weights=False)[0]
        parts = [row[:n] for row, n in zip(padded, lengths, strict=True)]
        alone = [module(part, part, part, need_weights=False)[0] for part in parts]
    assert (x + o).shape == x.shape
    for actual, expected in zip(o.unbind(), alone, strict=True):
        torch.testing.assert_close(actual, expected)
