"""Encoders that are BERT in their maths with their attention replaced, against their own code."""

from __future__ import annotations

import pytest
import torch
from adapted import adapt_all, assert_parity, assert_same_module, randomized
from support import dtype_id

transformers = pytest.importorskip("transformers")

from clinattn.integrations import swap  # noqa: E402
from clinattn.integrations.transformers import bert_shaped  # noqa: E402

PEER = "clinattn.integrations.transformers.bert_shaped.fused_attention"
SMALL = {
    "vocab_size": 50, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2,
    "intermediate_size": 20, "max_position_embeddings": 64, "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}  # fmt: skip
MODELS = {
    "mpnet": ("MPNet", {}),
    "megatron_bert": ("MegatronBert", {}),
    "rembert": ("RemBert", {"input_embedding_size": 16, "classifier_dropout_prob": 0.0}),
    "roformer": ("RoFormer", {"embedding_size": 24}),
    "roformer-values": ("RoFormer", {"embedding_size": 24, "rotary_value": True}),
    "tapas": ("Tapas", {}),
    "visual_bert": ("VisualBert", {"visual_embedding_dim": 8}),
}


def make_model(name: str, **changed) -> torch.nn.Module:
    prefix, more = MODELS[name]
    config = getattr(transformers, prefix + "Config")(**SMALL, **more, **changed)
    return randomized(getattr(transformers, prefix + "Model")(config))


def make_inputs(padding: str, n: int = 29) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    valid = torch.ones(3, n, dtype=torch.bool)
    if padding == "right":
        valid[1, n // 2 :] = valid[2, -1:] = False
    if padding == "left":
        valid[1, : n // 2] = valid[2, :1] = False
    if padding == "holes":
        valid = torch.rand(3, n) < 0.7
    return {"input_ids": torch.randint(3, 50, (3, n)), "attention_mask": valid.long()}, valid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("name", MODELS)
def test_parity(name, padding, dtype):
    inputs, valid = make_inputs(padding)
    model = make_model(name).train()
    assert_parity(model, bert_shaped.adapt, inputs, valid, dtype, PEER)


@pytest.mark.parametrize("name", MODELS)
def test_given_bias(name):
    """A mask of queries and keys that the caller made, with numbers of its own."""
    layer = next(m for m in make_model(name).double().modules() if type(m) in REPLACED)
    hidden = torch.randn(2, 9, 24, dtype=torch.float64)
    bias = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    expected = layer(hidden, bias)
    assert bert_shaped.adapt(layer).replaced
    actual = layer(hidden, bias)
    assert len(actual) == len(expected)
    torch.testing.assert_close(actual[0], expected[0])


REPLACED = set(bert_shaped.REPLACEMENTS)


def test_every_class_is_tested():
    tested = {type(m) for name in MODELS for m in make_model(name).modules()}
    assert tested >= REPLACED and len(REPLACED) == len(bert_shaped.FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_padding_may_hold_nan(name):
    layer = next(m for m in make_model(name).modules() if type(m) in REPLACED)
    bert_shaped.adapt(layer)
    hidden = torch.randn(2, 9, 24)
    mask = torch.zeros(2, 1, 1, 9)
    mask[..., 6:] = torch.finfo(mask.dtype).min
    expected = layer(hidden, mask)[0][:, :6]
    hidden[:, 6:] = float("nan")
    assert torch.equal(layer(hidden, mask)[0][:, :6], expected)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_has_the_same_distribution(name):
    """Mean and variance over draws are those of the original: within 5 standard errors."""
    model = make_model(name).double()
    layer = next(m for m in model.modules() if type(m) in REPLACED)
    layer.dropout.p = 0.3
    draws = 4000
    hidden = torch.randn(1, 7, 24, dtype=torch.float64).expand(draws, -1, -1)
    with torch.no_grad():
        full = layer.eval()(hidden[:1])[0][0]
        theirs = (layer.train()(hidden)[0] - full) ** 2
        bert_shaped.adapt(layer)
        ours = layer(hidden)[0]
        assert torch.equal(layer.eval()(hidden)[0], layer(hidden)[0])
    for name, actual, expected, spread in (
        ("mean", ours, full, ours.std(0)),
        ("variance", (ours - full) ** 2, theirs.mean(0), theirs.std(0) * 2**0.5),
    ):
        off = (actual.mean(0) - expected).abs() / (spread / draws**0.5)
        assert off.max() < 5, f"{name}: {off.max():.1f} standard errors"


@pytest.mark.parametrize("name", MODELS)
def test_attentions_come_from_the_original(name, monkeypatch):
    monkeypatch.setattr(swap, "_warned", set())
    model = make_model(name).eval()
    inputs, _ = make_inputs("right")
    expected = model(**inputs, output_attentions=True)
    adapt_all(model, bert_shaped.adapt)
    with pytest.warns(RuntimeWarning, match="attention probabilities"):
        actual = model(**inputs, output_attentions=True)
    assert actual.keys() == expected.keys() and len(actual.attentions) == 2
    for a, b in zip(actual.attentions, expected.attentions, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_the_module_stays_itself(name):
    inputs, _ = make_inputs("none")
    assert_same_module(
        make_model(name).eval(),
        bert_shaped.adapt,
        bert_shaped.restore,
        lambda model: model(**inputs)[0].detach(),
    )


@pytest.mark.parametrize("name", ["megatron_bert", "rembert", "roformer"])
def test_decoders_are_left(name):
    model = make_model(name, is_decoder=True, add_cross_attention=True)
    before = [type(m) for m in model.modules()]
    outcomes = adapt_all(model, bert_shaped.adapt)
    assert outcomes and all("decoder" in x.detail for x in outcomes)
    assert [type(m) for m in model.modules()] == before


def test_what_decoders_are_given_is_refused():
    layer = next(m for m in make_model("megatron_bert").modules() if type(m) in REPLACED)
    bert_shaped.adapt(layer)
    with pytest.raises(NotImplementedError, match="encoder_hidden_states"):
        layer(torch.randn(1, 4, 24), encoder_hidden_states=torch.randn(1, 4, 24))
