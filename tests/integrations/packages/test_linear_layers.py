"""Models of transformers with linear layers replaced, against their own code and fp64."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
import transformers
from adapted import assert_no_worse, evaluate, randomized, softmax_as_given, torch_attention
from replaced_models import BERT, COMPILED, MODELS, NUMBERS, SMALL, around, make_inputs, make_model
from torch import nn

from clinattn.integrations.replace import replace_attention
from clinattn.integrations.torch.linear import Linear
from clinattn.integrations.transformers import stream
from clinattn.integrations.transformers.bert_shaped import BertShaped

pytestmark = [COMPILED, pytest.mark.usefixtures("any_size")]
PEER = "clinattn.integrations.transformers.bert_shaped.fused_attention"


@pytest.mark.parametrize("name", MODELS)
def test_what_is_replaced(name):
    model = make_model(name)
    report = replace_attention(model, linear=True)
    layers = [n for n, m in model.named_modules() if type(m) is Linear]
    assert [x.name for x in report.linear] == layers
    assert not any(type(m) is nn.Linear for m in model.modules())
    assert not report.kept and not report.linear_kept and not report.around_kept
    assert around(model) == MODELS[name][2]
    layers = [m for m in model.modules() if isinstance(m, stream.Layer)]
    assert len(layers) == 2 and any(isinstance(m, stream.Embeddings) for m in model.modules())


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", MODELS)
def test_results_and_every_gradient(name, numbers, served):
    dtype, autocast = NUMBERS[numbers]
    rounded = torch.bfloat16 if autocast else dtype
    inputs, valid = make_inputs()
    model = make_model(name).train().to(dtype)
    replaced = copy.deepcopy(model)
    replace_attention(replaced, linear=True)
    with softmax_as_given():
        truth = evaluate(copy.deepcopy(model).double(), inputs, valid)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        naive = [evaluate(model, inputs, valid)]
        # gradients from a rounded o, as fused attention computes them: see adapted.assert_parity
        attention_alone = copy.deepcopy(model)
        replace_attention(attention_alone)
        if any(isinstance(m, BertShaped) for m in attention_alone.modules()):
            with mock.patch(PEER, torch_attention):
                naive.append(evaluate(attention_alone, inputs, valid))
        assert not served
        actual = evaluate(replaced, inputs, valid)
        with torch.no_grad():
            hidden = replaced(**inputs)[0]
    assert served
    assert_no_worse(actual, truth, naive, rounded)
    inferred = {"o": torch.where(valid[..., None], hidden, 0)}
    assert_no_worse(inferred, {"o": truth["o"]}, naive, rounded)


def test_what_follows_a_product_is_in_its_pass(served):
    inputs, _ = make_inputs()
    for name, calls in {
        "bert": {(None, False, True, True), ("gelu", False, False, False)},
        "bert-tanh": {("gelu_tanh", False, False, False)},
        "bert-relu": {("relu", False, False, False)},
        "megatron-bert": {(None, False, True, False)},
        "modernbert": {("gelu", True, False, False)},
        "distilbert": {("gelu", False, False, False)},
    }.items():
        model = make_model(name).eval()
        replace_attention(model, linear=True)
        served.clear()
        with torch.no_grad():
            model(**inputs)
        assert calls <= set(served), name


HEADS = {
    "BertForMaskedLM": {"PostNorm", "Activated", "Transform"},
    "ModernBertForMaskedLM": {"Gated"},
    "BertForSequenceClassification": BERT,
    "CLIPTextModel": {"TwoLayers"},
}


@pytest.mark.parametrize("name", HEADS)
def test_models_with_heads(name):
    cls = getattr(transformers, name)
    model = randomized(cls(cls.config_class(**SMALL))).eval()
    inputs, _ = make_inputs()
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(**inputs)[0]
        naive = model(**inputs)[0]
        replace_attention(model, linear=True)
        actual = model(**inputs)[0]
    assert around(model) == HEADS[name]
    assert_no_worse({"o": actual}, {"o": expected}, [{"o": naive}], torch.float32)


DROPPING = {  # a model, and its module around a linear layer with dropout
    "PostNorm": ("bert", lambda model: model.encoder.layer[0].output),
    "AddedToResidual": ("megatron-bert", lambda model: model.encoder.layer[0].attention.output),
    "AddedInOrder": ("megatron-bert", lambda model: model.encoder.layer[0].output),
    "FeedForward": ("distilbert", lambda model: model.transformer.layer[0].ffn),
    "Gated": ("modernbert", lambda model: model.layers[0].mlp),
}


@pytest.mark.parametrize("numbers", ["fp32", "bf16"])
@pytest.mark.parametrize("family", DROPPING)
def test_dropout(family, numbers):
    """As many numbers are zeroed as are to be, and the others grown to make up for it."""
    dtype, _ = NUMBERS[numbers]
    name, find = DROPPING[family]
    model = make_model(name).to(dtype)
    replace_attention(model, linear=True)
    module, p, rows = find(model), 0.4, 400
    assert type(module).__mro__[1].__name__ == family
    if family == "Gated":  # dropout before its last layer, which is made to return its input
        module.Wo = nn.Identity()
        module.drop.p = p
    else:
        module.dropout.p = p
    if family == "PostNorm":
        module.LayerNorm = nn.Identity()
    layer = module.dense if hasattr(module, "dense") else getattr(module, "lin1", None)
    x = torch.randn(2, rows, (layer or module.Wi).in_features, dtype=dtype)
    inputs = (x,) if family in ("FeedForward", "Gated") else (x, torch.zeros(2, rows, 24))
    with torch.no_grad():
        whole = module.eval()(*inputs)
        module.train()
        torch.manual_seed(3)
        first, second = module(*inputs), module(*inputs)
        torch.manual_seed(3)
        assert torch.equal(module(*inputs), first)
    zeros = first == 0
    assert (zeros != (second == 0)).any()
    spread = (p * (1 - p) / zeros.numel()) ** 0.5
    assert abs(zeros.double().mean() - p) < 5 * spread
    unit = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(first[~zeros], whole[~zeros] / (1 - p), rtol=unit, atol=unit)


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", ["bert", "longformer", "modernbert", "megatron-bert"])
def test_bits_of_a_sequence_alone_and_in_a_batch(name, numbers):
    dtype, autocast = NUMBERS[numbers]
    model = make_model(name).eval().to(dtype)
    replace_attention(model, linear=True)
    ids = make_inputs(24)[0]["input_ids"]
    mask = torch.ones_like(ids)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        together = model(ids, attention_mask=mask)[0]
        for i in range(3):
            alone = model(ids[i : i + 1], attention_mask=mask[:1])[0]
            assert torch.equal(alone[0], together[i])
