"""Nested inputs of nn.MultiheadAttention while clinattn is under torch's attention."""

from contextlib import nullcontext

import pytest
import torch
from sdpa_ways import both_ways
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def nested(layout, **words):
    parts = [torch.randn(n, 24) for n in (5, 1, 9)]
    return torch.nested.nested_tensor(parts, layout=layout, **words)


@both_ways
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
@pytest.mark.parametrize("kind", ["attention", "encoder"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
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
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
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
