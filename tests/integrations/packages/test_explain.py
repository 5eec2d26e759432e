"""explain and attribute on models of transformers, against their own eager attention."""

import importlib.util
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from explained import Matrices, assert_equal
from torch import nn

import clinattn
from clinattn.encoder import EncoderConfig, SequenceClassifier
from clinattn.explain.attribute import METHODS

SMALL = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip
MODERN = {
    "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
    "local_attention": 6, "global_attn_every_n_layers": 3,
}  # fmt: skip
MODELS = {
    "BertForSequenceClassification": {},
    "RobertaForSequenceClassification": {},
    "ModernBertForSequenceClassification": MODERN,
    "MegatronBertForSequenceClassification": {},
    "DistilBertForSequenceClassification": {},
    "GPT2ForSequenceClassification": {},
}
# Its eager attention has softmax in fp32, where the lowest fp64 number is -inf: NaN in padding
EAGER = {"ModernBertForSequenceClassification": torch.float32}
N, LENGTHS = 17, torch.tensor([17, 9])
TERMS = 3 * (N + 32) * 40  # sums in a row through three layers


def model_of(name):
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**SMALL, **MODELS[name])).double().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def batch_of(side):
    mask = (torch.arange(N) < LENGTHS[:, None]).long()
    ids = torch.randint(5, 60, (2, N)) * mask
    if side == "left":
        ids, mask = ids.flip(1), mask.flip(1)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_eager_attention_is_the_truth(name, side):
    model, batch = model_of(name).to(EAGER.get(name, torch.float64)), batch_of(side)
    real = batch["attention_mask"].to(model.dtype)
    first = real * (real.cumsum(1) == 1)
    model.set_attn_implementation("eager")
    out = model(**batch, output_attentions=True)
    attentions = out.attentions
    grads = torch.autograd.grad(out.logits[:, 1].sum(), attentions, allow_unused=True)
    matrices = Matrices(attentions)
    clinattn.replace_attention(model)
    with clinattn.explain(model) as e:
        out = model(**batch)
    assert len(e.layers) == 3
    received = matrices.received(real) * real[:, None]
    assert_equal("received", e.received(heads=None), received, TERMS)
    rows = matrices.entropy() * real[:, None]
    assert_equal("entropy", e.entropy(heads=None), rows, TERMS)
    assert_equal("rollout", e.rollout(0), matrices.rollout(first) * real, TERMS)
    if side == "left" and name.startswith("Modern"):
        return  # its logits are read from a token of padding, in a window of padding
    truth = matrices.relevance(first, list(grads)) * real
    assert_equal("relevance", e.relevance(out.logits[:, 1]), truth, TERMS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_a_padded_row_is_the_row_alone(name, method):
    model, batch = model_of(name), batch_of("right")
    clinattn.replace_attention(model)
    scores = clinattn.attribute(model, batch, 2, method)
    n = int(LENGTHS[1])
    assert (scores[1, n:] == 0).all() and (scores[1, :n] != 0).any()
    alone = clinattn.attribute(model, {k: x[1:, :n] for k, x in batch.items()}, 2, method)
    assert_equal("alone", scores[1, :n], alone[0], TERMS)


@pytest.mark.parametrize("name", MODELS)
def test_attnlrp_is_the_same_through_torchs_and_our_layers(name):
    """Eager matrices, torch's SDPA, ours, and in fp32 ours with compiled linear layers."""
    model, batch = model_of(name), batch_of("right")
    results = []
    for implementation in ("sdpa",) if name in EAGER else ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        results.append(clinattn.attribute(model, batch, 1))
    clinattn.replace_attention(model)
    results.append(clinattn.attribute(model, batch, 1))
    for other in results[1:]:
        assert_equal(name, other, results[0], TERMS)
    model.float()
    clinattn.replace_attention(model, linear=True)
    size = float(results[0].abs().max())
    error = float((clinattn.attribute(model, batch, 1) - results[0]).abs().max())
    assert error <= TERMS * torch.finfo(torch.float32).eps * max(size, 1)


def test_the_warning_of_attentions_points_here():
    """In a process of its own, as warnings come once."""
    script = """
import torch, transformers, warnings, clinattn
size = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8)
for name in ("Bert", "MegatronBert"):
    config = getattr(transformers, name + "Config")(**size)
    model = getattr(transformers, name + "Model")(config).eval()
    clinattn.replace_attention(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(torch.ones(1, 3).long(), output_attentions=True)
    print(name, any("clinattn.explain" in str(x.message) for x in caught))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["Bert", "True", "MegatronBert", "True"], done.stderr[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("captum") is None, reason="captum is not installed")
@pytest.mark.parametrize("name", ["ours", "bert"])
def test_integrated_gradients_are_those_of_captum(name):
    from captum.attr import LayerGradientXActivation, LayerIntegratedGradients

    warnings.simplefilter("ignore")
    ids, other = torch.randint(5, 50, (2, 2, 11))
    if name == "ours":
        size = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
        config = EncoderConfig.preset("clinicalbert", vocab_size=60, windows=(), **size)
        model = SequenceClassifier(config, 3).double().eval()
        layer, inputs = model.encoder.embeddings, {"inputs": ids, "layout": "padded"}
    else:
        model = model_of("BertForSequenceClassification")
        layer, inputs = model.get_input_embeddings(), {"input_ids": ids}
    clinattn.replace_attention(model) if name == "bert" else None
    forward = lambda x: model(**{**inputs, next(iter(inputs)): x}).logits
    theirs = LayerIntegratedGradients(forward, layer).attribute(ids, other, target=1, n_steps=7)
    ours = clinattn.attribute(model, inputs, 1, "integrated_gradients", steps=7, baseline=other)
    # captum forms the places of the steps in fp32
    assert_equal("integrated", ours.float(), theirs.sum(-1).detach(), TERMS)
    theirs = LayerGradientXActivation(forward, layer).attribute(ids, target=1)
    ours = clinattn.attribute(model, inputs, 1, "gradient_x_input")
    assert_equal("gradient", ours, theirs.sum(-1).detach(), TERMS)
