"""Models of transformers with linear layers replaced, against their own code and fp64."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from unittest import mock

import pytest
import torch
from adapted import assert_no_worse, evaluate, randomized, softmax_as_given, torch_attention
from torch import nn

transformers = pytest.importorskip("transformers")
opacus = pytest.importorskip("opacus")
peft = pytest.importorskip("peft")

from clinattn.backends import cpu  # noqa: E402
from clinattn.encoder import linear  # noqa: E402
from clinattn.integrations.formula import formula_of  # noqa: E402
from clinattn.integrations.replace import replace_attention  # noqa: E402
from clinattn.integrations.torch.linear import Linear  # noqa: E402
from clinattn.integrations.transformers import around_linear, stream  # noqa: E402

pytestmark = pytest.mark.skipif(
    not linear.serves(), reason="needs the compiled linear layers"
)
PEER = "clinattn.integrations.transformers.bert_shaped.fused_attention"
SMALL = {
    "vocab_size": 50, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2,
    "intermediate_size": 20, "max_position_embeddings": 64, "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0, "pad_token_id": 1,
}  # fmt: skip
BERT = {"PostNorm", "Activated"}
# Configuration, what it is made with besides, and families.
MODELS = {
    "bert": ("Bert", {}, BERT),
    "bert-tanh": ("Bert", {"hidden_act": "gelu_new"}, BERT),
    "bert-relu": ("Bert", {"hidden_act": "relu"}, BERT),
    "bert-silu": ("Bert", {"hidden_act": "silu"}, BERT),
    "bert-chunks": ("Bert", {"chunk_size_feed_forward": 1}, BERT),
    "bert-generation": ("BertGeneration", {}, BERT),
    "big-bird": ("BigBird", {"attention_type": "original_full"}, BERT),
    "camembert": ("Camembert", {}, BERT),
    "data2vec-text": ("Data2VecText", {}, BERT),
    "distilbert": (
        "DistilBert",
        {"dim": 24, "n_heads": 3, "n_layers": 2, "hidden_dim": 20, "dropout": 0.0,
         "attention_dropout": 0.0},
        {"FeedForward"},
    ),
    "electra": ("Electra", {"embedding_size": 16}, BERT),
    "ernie": ("Ernie", {}, BERT),
    "layoutlm": ("LayoutLM", {}, BERT),
    "longformer": ("Longformer", {"attention_window": 8}, BERT),
    "markuplm": ("MarkupLM", {"max_depth": 5}, BERT),
    "megatron-bert": ("MegatronBert", {}, {"AddedInOrder", "AddedToResidual", "Activated"}),
    "modernbert": (
        "ModernBert",
        {"global_attn_every_n_layers": 2, "local_attention": 16, "mlp_dropout": 0.0},
        {"Gated"},
    ),
    "modernbert-silu": ("ModernBert", {"hidden_activation": "silu"}, {"Gated"}),
    "rembert": ("RemBert", {"input_embedding_size": 16}, BERT),
    "roberta": ("Roberta", {}, BERT),
    "roc-bert": (
        "RoCBert",
        {"pronunciation_vocab_size": 9, "shape_vocab_size": 9, "pronunciation_embed_dim": 8,
         "shape_embed_dim": 8},
        BERT,
    ),
    "roformer": ("RoFormer", {"embedding_size": 24}, BERT),
    "splinter": ("Splinter", {}, BERT),
    "tapas": ("Tapas", {}, BERT),
    "visual_bert": ("VisualBert", {"visual_embedding_dim": 8}, BERT),
    "xlm-roberta": ("XLMRoberta", {}, BERT),
}  # fmt: skip
# fp32, weights of bf16, and autocast
NUMBERS = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "autocast": (torch.float32, True),
}


def make_model(name, **changed):
    prefix, more, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, prefix + "Config")(**{**SMALL, **more, **changed})
    cls = getattr(transformers, prefix + ("Encoder" if name == "bert-generation" else "Model"))
    return randomized(cls(config))


def make_inputs(n=29):
    torch.manual_seed(1)
    valid = torch.ones(3, n, dtype=torch.bool)
    valid[1, n // 2 :] = valid[2, -1:] = False
    return {"input_ids": torch.randint(3, 50, (3, n)), "attention_mask": valid.long()}, valid


def around(model):
    """The families in a model."""
    found = (type(m) for m in model.modules() if isinstance(m, around_linear.AroundLinear))
    return {cls.__mro__[1].__name__ for cls in found}


@pytest.fixture
def served(monkeypatch):
    """Of each call of the compiled layers, what followed the product."""
    seen = []
    real = linear._computed

    def watched(form, layer, x, dropout, residual, norm):
        seen.append((form.activation, form.gated, residual is not None, norm is not None))
        return real(form, layer, x, dropout, residual, norm)

    monkeypatch.setattr(linear, "_computed", watched)
    return seen


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
        with mock.patch(PEER, torch_attention):
            naive.append(evaluate(attention_alone, inputs, valid))
        assert not served
        actual = evaluate(replaced, inputs, valid)
        with torch.no_grad():
            hidden = replaced(**inputs)[0]
    assert served or cpu.instruction_set() == "amx"
    assert_no_worse(actual, truth, naive, rounded)
    inferred = {"o": torch.where(valid[..., None], hidden, 0)}
    assert_no_worse(inferred, {"o": truth["o"]}, naive, rounded)


@pytest.mark.skipif(cpu.instruction_set() == "amx", reason="AMX serves 256 rows and more")
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


@pytest.mark.skipif(cpu.instruction_set() == "amx", reason="AMX serves 256 rows and more")
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


SHAPES = ["bert", "longformer", "modernbert", "distilbert", "megatron-bert"]


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


def test_hooks_of_children_run_in_bfloat16():
    model = make_model("bert").eval().bfloat16()
    inputs, valid = make_inputs()
    naive, truth = model(**inputs)[0], copy.deepcopy(model).double()(**inputs)[0]
    replace_attention(model, linear=True)
    seen = []
    for child in (model.encoder.layer[0].output.LayerNorm, model.encoder.layer[1].output.dropout):
        child.register_forward_hook(lambda *_: seen.append(1))
    actual = model(**inputs)[0]
    assert len(seen) == 2
    found = [{"o": x.detach()[valid]} for x in (actual, truth, naive)]
    assert_no_worse(found[0], found[1], found[2:], torch.bfloat16)


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_leave_a_stream_in_the_dtype_of_the_model(name):
    model = make_model(name).eval().bfloat16()
    inputs, valid = make_inputs()
    asked = {"output_hidden_states": True}
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(**inputs, **asked).hidden_states
        naive = model(**inputs, **asked).hidden_states
        replace_attention(model, linear=True)
        output = model(**inputs, **asked)
        as_tuple = model(**inputs, return_dict=False)
        plain = model(**inputs).last_hidden_state
    assert plain.dtype == as_tuple[0].dtype == torch.bfloat16
    assert torch.equal(plain, output.last_hidden_state) and torch.equal(plain, as_tuple[0])
    assert len(output.hidden_states) == len(truth) == 3
    errors = []
    for states in (output.hidden_states, naive):
        assert all(x.dtype == torch.bfloat16 for x in states)
        errors.append((states[-1][valid] - truth[-1][valid]).norm())
    assert errors[0] < 0.9 * errors[1]


def test_layers_added_later_end_the_stream():
    """A layer that does not take fp32 beside its weights of bf16 gets bf16."""
    model = make_model("bert").eval().bfloat16()
    inputs, _ = make_inputs()
    replace_attention(model, linear=True)
    expected = model(**inputs)[0]
    attention = model.encoder.layer[1].attention.self
    plain = nn.Linear(24, 24).bfloat16()
    plain.load_state_dict(attention.query.state_dict())
    attention.query = plain
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=0.05, atol=0.05)


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
    assert served or cpu.instruction_set() == "amx"
    assert_no_worse(actual, truth, [naive], dtype)
    with torch.no_grad():
        expected = model.eval()(**inputs)[0][valid]
        merged = model.merge_and_unload()(**inputs)[0][valid]
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(merged, expected, rtol=tolerance, atol=tolerance)


def test_what_is_written_into_is_not_what_it_was_rounded_from():
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x = torch.randn(5, 6)
            y = stream.rounded(x, torch.bfloat16)
            assert stream.unrounded(y) is x
            assert stream.unrounded(y.clone()) is None
            y[0, 0] += 1
            assert stream.unrounded(y) is None


def test_what_was_rounded_is_kept_no_longer_than_the_result():
    model = make_model("bert").bfloat16()
    inputs, _ = make_inputs()
    replace_attention(model, linear=True)
    before = len(stream._unrounded)
    for _ in range(2):
        hidden = model(**inputs)[0]
        hidden.sum().backward()
    assert len(stream._unrounded) == before + 1
    del hidden
    assert len(stream._unrounded) == before


@pytest.mark.parametrize("name", SHAPES)
def test_a_hook_of_a_layer_changes_what_the_next_one_gets(name):
    model = make_model(name).eval().bfloat16()
    inputs, _ = make_inputs()
    replace_attention(model, linear=True)
    layers = [m for m in model.modules() if isinstance(m, stream.Layer)]
    seen = []

    def emptied(module, args, y):
        seen.append((y[0] if isinstance(y, tuple) else y).dtype)
        return (y[0] * 0, *y[1:]) if isinstance(y, tuple) else y * 0

    layers[0].register_forward_hook(emptied)
    layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].abs().max()))
    model(**inputs)
    assert seen == [torch.bfloat16, 0]


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


class Decorated(nn.Module):
    @torch.no_grad()
    def forward(self, hidden_states):
        return self.dense(hidden_states)


class Twice(nn.Module):
    def forward(self, hidden_states):
        y = self.dense(hidden_states)
        return y + y


class Unread(nn.Module):
    def forward(self, hidden_states):
        y = self.dense(hidden_states)
        y = self.other(hidden_states)
        return y


class Branching(nn.Module):
    def forward(self, hidden_states):
        if self.training:
            return hidden_states
        return self.dense(hidden_states)


class Straight(nn.Module):
    def forward(self, hidden_states):
        """A docstring."""
        x = self.dense(hidden_states)
        first, second = x.chunk(2)
        hidden_states = self.act(first)
        return hidden_states * second


def test_formulas():
    for cls in (Decorated, Twice, Unread, Branching):
        assert formula_of(cls.forward) is None, cls
    both = "self.dense(hidden_states).chunk(2)"
    assert formula_of(Straight.forward) == f"self.act({both}[0]) * {both}[1]"
    assert formula_of(torch.relu) is None


def test_a_formula_under_other_parameters_is_of_no_family():
    class Moved(nn.Module):
        def forward(self, input_tensor, hidden_states):
            return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)

    assert formula_of(Moved.forward) == around_linear.PostNorm.formula
    assert around_linear.family_of(Moved) is None


def test_families_name_what_their_formula_calls():
    for family in around_linear.FAMILIES:
        assert all(f"self.{name}(" in family.formula for name in family.layers)
        method = getattr(family, family.method)
        names = set(inspect.signature(method).parameters) - {"self"}
        assert all(f"({name})" in family.formula or f"+ {name}" in family.formula
                   or f"{name} +" in family.formula for name in names)  # fmt: skip
