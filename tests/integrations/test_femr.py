"""A model of FEMR's shape, with scores of every pair and without."""

import pytest
import torch
from femr_shaped import Shape, Transformer, patients, scores_attention
from support import assert_close

from clinattn.integrations import xformers as xf

SHAPE = Shape(vocab_size=50, hidden_size=48, intermediate_size=80, heads=3, layers=3,
              attention_width=20)  # fmt: skip
LENGTHS = [70, 1, 33, 20]


def results(attention, dtype):
    """Returns the hidden states and all gradients."""
    torch.manual_seed(0)
    model = Transformer(SHAPE, attention).to(dtype)
    tokens, ages = patients(LENGTHS, SHAPE.vocab_size)
    hidden = model(tokens, ages, LENGTHS)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad((hidden * weights).sum(), list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    return {"hidden": hidden.detach(), **dict(zip(names, grads, strict=True))}


def in_double(q, k, v, bias):
    """scores_attention without its cast to fp32."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bias = bias.materialize((*q.shape[:3], k.shape[2]), q.dtype)
    weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias, -1)
    return (weights @ v).transpose(1, 2)


def test_one_line_replaces_attention():
    truth = results(in_double, torch.float64)
    before = results(scores_attention, torch.float32)
    after = results(xf.memory_efficient_attention, torch.float32)
    for name, x in after.items():
        assert_close(name, x, truth[name], before[name])


def test_attention_stays_within_a_patient_and_its_width():
    """A token changes what follows in its patient, up to a width for each layer."""
    model = Transformer(SHAPE, xf.memory_efficient_attention).eval()
    tokens, ages = patients(LENGTHS, SHAPE.vocab_size)
    changed = tokens.clone()
    changed[2] = (changed[2] + 1) % SHAPE.vocab_size
    with torch.no_grad():
        differs = (model(tokens, ages, LENGTHS) != model(changed, ages, LENGTHS)).any(-1)
    reach = SHAPE.layers * (SHAPE.attention_width - 1)
    assert differs[2:reach].all() and not differs[:2].any() and not differs[2 + reach + 1 :].any()


def test_the_package_is_served_as_femr_uses_it():
    undo = xf.install(force=True)
    try:
        import xformers.ops

        bias = xformers.ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(
            torch.tensor(LENGTHS).tolist()
        ).make_local_attention(SHAPE.attention_width)
        assert isinstance(bias, xformers.ops.AttentionBias)
        q = torch.randn(1, sum(LENGTHS), 2, 8)
        expected = scores_attention(q, q, q, bias)
        torch.testing.assert_close(xformers.ops.memory_efficient_attention(q, q, q, bias), expected)
    finally:
        undo()


@pytest.mark.parametrize("width", [1, 20, 496])
def test_one_attention(width):
    """Up to patients that are shorter than the width."""
    bias = xf.BlockDiagonalMask.from_seqlens(LENGTHS).make_local_attention(width)
    q, k, v = torch.randn(3, 1, sum(LENGTHS), 2, 16).unbind(0)
    truth = in_double(q.double(), k.double(), v.double(), bias)
    naive = scores_attention(q, k, v, bias)
    assert_close("o", xf.memory_efficient_attention(q, k, v, bias), truth, naive)
