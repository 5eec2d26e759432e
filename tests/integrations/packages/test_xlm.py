"""XLM and FlauBERT with their attention replaced, against their own code in fp64."""

from __future__ import annotations

import pytest
import torch
from adapted import adapt_all, assert_parity, assert_same_module, randomized
from support import dtype_id

pytest.importorskip("transformers")

from transformers import FlaubertConfig, FlaubertModel, XLMConfig, XLMModel  # noqa: E402

from clinattn.integrations import swap  # noqa: E402
from clinattn.integrations.transformers import xlm  # noqa: E402

MODELS = {"xlm": (XLMConfig, XLMModel), "flaubert": (FlaubertConfig, FlaubertModel)}
PEER = "clinattn.integrations.transformers.xlm.fused_attention"


def make_model(name: str, **changed) -> torch.nn.Module:
    config, model = MODELS[name]
    values = {
        "vocab_size": 50, "n_words": 50, "emb_dim": 24, "n_heads": 3, "n_layers": 2,
        "max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0,
        "layerdrop": 0.0, "use_lang_emb": False,
    }  # fmt: skip
    return randomized(model(config(**(values | changed))))


def make_inputs(padding: str, n: int = 29) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    valid = torch.ones(3, n, dtype=torch.bool)
    if padding == "right":
        valid[1, n // 2 :] = valid[2, -1:] = False
    if padding == "left":
        valid[1, : n // 2] = valid[2, :1] = False
    return {"input_ids": torch.randint(3, 50, (3, n)), "attention_mask": valid.long()}, valid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_parity(name, padding, dtype):
    inputs, valid = make_inputs(padding)
    assert_parity(make_model(name).train(), xlm.adapt, inputs, valid, dtype, PEER)


@pytest.mark.parametrize("name", MODELS)
def test_causal(name):
    """Masks of queries and keys, which the models make where they are causal."""
    inputs, valid = make_inputs("right")
    assert_parity(make_model(name, causal=True), xlm.adapt, inputs, valid, torch.float32, PEER)


@pytest.mark.parametrize("name", MODELS)
def test_cache_is_filled(name):
    from transformers import DynamicCache

    layer = next(m for m in make_model(name).modules() if type(m) in xlm.REPLACEMENTS)
    hidden, mask = torch.randn(2, 5, 24), torch.ones(2, 5)
    original, ours = DynamicCache(), DynamicCache()
    expected = layer(hidden, mask, cache=original)[0]
    xlm.adapt(layer)
    torch.testing.assert_close(layer(hidden, mask, cache=ours)[0], expected)
    mask = torch.ones(2, 6)
    again = layer(hidden[:, :1], mask, cache=ours)[0]
    xlm.restore(layer)
    torch.testing.assert_close(again, layer(hidden[:, :1], mask, cache=original)[0])


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_drawn_in_training_alone(name):
    layer = next(m for m in make_model(name).modules() if type(m) in xlm.REPLACEMENTS)
    layer.dropout = 0.5
    xlm.adapt(layer)
    hidden, mask = torch.randn(2, 5, 24), torch.ones(2, 5)
    draws = [layer.train(train)(hidden, mask)[0] for train in (True, True, False, False)]
    assert not torch.equal(draws[0], draws[1]) and torch.equal(draws[2], draws[3])


@pytest.mark.parametrize("name", MODELS)
def test_attentions_come_from_the_original(name, monkeypatch):
    monkeypatch.setattr(swap, "_warned", set())
    model = make_model(name).eval()
    inputs, _ = make_inputs("right")
    expected = model(**inputs, output_attentions=True)
    adapt_all(model, xlm.adapt)
    with pytest.warns(RuntimeWarning, match="attention probabilities"):
        actual = model(**inputs, output_attentions=True)
    assert actual.keys() == expected.keys() and len(actual.attentions) == 2
    for a, b in zip(actual.attentions, expected.attentions, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_the_module_stays_itself(name):
    inputs, _ = make_inputs("none")
    run = lambda model: model(**inputs)[0].detach()
    assert_same_module(make_model(name).eval(), xlm.adapt, xlm.restore, run)


def test_cross_attention_is_refused():
    layer = next(m for m in make_model("xlm").modules() if type(m) in xlm.REPLACEMENTS)
    xlm.adapt(layer)
    with pytest.raises(NotImplementedError, match="kv"):
        layer(torch.randn(1, 4, 24), torch.ones(1, 4), kv=torch.randn(1, 4, 24))
