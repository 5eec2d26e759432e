"""Models of transformers with linear layers replaced, as they are used: copies, LoRA, Opacus."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from adapted import assert_no_worse, evaluate, softmax_as_given
from replaced_models import COMPILED, NUMBERS, SHAPES, make_inputs, make_model
from torch import nn

from clinattn.integrations.replace import replace_attention

opacus = pytest.importorskip("opacus")
peft = pytest.importorskip("peft")
pytestmark = [COMPILED, pytest.mark.usefixtures("any_size")]


@pytest.mark.parametrize("name", SHAPES)
def test_the_model_stays_itself(name, tmp_path):
    model = make_model(name).eval()
    inputs, valid = make_inputs()
    run = lambda model: model(**inputs)[0].detach()[valid]
    expected, classes = run(model), {n: type(m) for n, m in model.named_modules()}
    state = {n: x.clone() for n, x in model.state_dict().items()}
    report = replace_attention(model, linear=True)
    ours = run(model)
    torch.testing.assert_close(ours, expected)
    assert str(replace_attention(model, linear=True)) == str(report)
    after = {n: type(m) for n, m in model.named_modules()}
    assert all(after[n].__name__ == cls.__name__ for n, cls in classes.items())
    assert model.state_dict().keys() == state.keys()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {n: type(m) for n, m in other.named_modules()} == after
        assert torch.equal(run(other), ours)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert {n: type(m) for n, m in loaded.named_modules()} == classes
    torch.testing.assert_close(run(loaded), expected)
    report.undo()
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert torch.equal(run(model), expected)


def test_hooks_of_children_run():
    model = make_model("bert").eval()
    inputs, _ = make_inputs()
    replace_attention(model, linear=True)
    layer, seen = model.encoder.layer[0], []
    children = {
        "dense": layer.output.dense, "dropout": layer.output.dropout,
        "norm": layer.output.LayerNorm, "act": layer.intermediate.intermediate_act_fn,
    }  # fmt: skip
    expected = model(**inputs)[0]
    for name, child in children.items():
        child.register_forward_hook(lambda *_, name=name: seen.append(name))
    torch.testing.assert_close(model(**inputs)[0], expected)
    assert sorted(seen) == sorted(children)


def lora(model):
    targets = ["query", "value", "dense", "Wqkv", "Wo", "Wi"]
    names = {n.split(".")[-1] for n, _ in model.named_modules()}
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=[x for x in targets if x in names],
        init_lora_weights=False,
    )  # fmt: skip
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("numbers", ["fp32", "bf16"])
@pytest.mark.parametrize("first", ["replaced", "adapted"])
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_lora(name, first, numbers, served):
    """The base layer is a plain nn.Linear that LoRA calls, and is replaced within it."""
    dtype, _ = NUMBERS[numbers]
    inputs, valid = make_inputs()
    model = lora(make_model(name).train().to(dtype))
    with softmax_as_given():
        truth = evaluate(copy.deepcopy(model).double(), inputs, valid)
    naive = evaluate(model, inputs, valid)
    if first == "adapted":
        report = replace_attention(model, linear=True)
        for x in report.around_kept:
            assert re.search("lora.layer.Linear, which|a layer in it was not replaced", x.reason)
        assert any(x.name.endswith("base_layer") for x in report.linear)
    else:
        model = make_model(name).train().to(dtype)
        replace_attention(model, linear=True)
        model = lora(model)
    actual = evaluate(model, inputs, valid)
    assert served
    assert_no_worse(actual, truth, [naive], dtype)
    with torch.no_grad():
        expected = model.eval()(**inputs)[0][valid]
        merged = model.merge_and_unload()(**inputs)[0][valid]
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(merged, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SHAPES)
def test_inference_mode_and_checkpointing_give_the_same(name):
    model = make_model(name).bfloat16()
    inputs, valid = make_inputs()
    replace_attention(model, linear=True)
    plain = evaluate(model.train(), inputs, valid)
    with torch.inference_mode():
        hidden = model(**inputs)[0]
    with torch.no_grad():
        assert torch.equal(hidden, model(**inputs)[0])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for x, y in zip(evaluate(model, inputs, valid).values(), plain.values(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("numbers", ["fp32", "bf16"])
def test_a_compiled_model_gets_what_it_had(numbers):
    dtype, _ = NUMBERS[numbers]
    model = make_model("bert").eval().to(dtype)
    inputs, _ = make_inputs()
    with torch.no_grad():
        replace_attention(model)
        expected = torch.compile(model, backend="eager")(**inputs)[0]
        torch._dynamo.reset()
        replace_attention(model, linear=True)
        actual = torch.compile(model, backend="eager", fullgraph=True)(**inputs)[0]
    torch._dynamo.reset()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
def test_gradients_of_samples(mode):
    """Opacus knows nn.Linear by its class; the subclass goes by the rule for any module."""
    model = make_model("bert").train()
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        norm.requires_grad_(False)
    model.embeddings.requires_grad_(False)
    inputs, _ = make_inputs()

    def norms(model):
        private = opacus.grad_sample.utils.wrap_model(
            model, grad_sample_mode=mode, **({"max_grad_norm": 1.0} if mode == "ghost" else {})
        )
        private(**inputs)[0].square().sum().backward()
        if mode == "ghost":
            return private.get_norm_sample()
        return torch.stack(
            [p.grad_sample.flatten(1).norm(dim=1) for p in model.parameters() if p.requires_grad]
        )

    pooled = list(model.pooler.parameters()) if model.pooler is not None else []
    for p in pooled:
        p.requires_grad_(False)
    expected = norms(copy.deepcopy(model))
    replace_attention(model, linear=True)
    torch.testing.assert_close(norms(model), expected, rtol=1e-3, atol=1e-4)
