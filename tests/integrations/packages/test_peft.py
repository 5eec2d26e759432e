"""Adapters of PEFT on replaced models, and models replaced under adapters, against eager ones."""

import re

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from parity_table import LENGTHS  # noqa: E402

from clinattn.integrations.replace import replace_attention  # noqa: E402
from clinattn.tools.model_report.architectures import find  # noqa: E402
from clinattn.tools.model_report.example_inputs import ExampleInputs, padding_mask  # noqa: E402
from clinattn.tools.model_report.parity import (  # noqa: E402
    CountedAttention,
    InDouble,
    judge,
    quantities,
)

VIRTUAL = 4
DTYPE = torch.float32


def lora(*targets):
    return peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(targets), init_lora_weights=False)


def prefix(task):
    return peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL)


def prompt(task):
    return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL)


def same_scale(found):
    """Gradients under names by which those of one attention are judged at one scale.

    That of a query is a difference of numbers of the size of what reaches the values, also where
    an adapter of its own gets it.
    """
    named = lambda name: re.sub(r"\.lora_([AB])\.default", r"_lora_\1", name)
    return {named(name): x for name, x in found.items()}


def judged(make, batch):
    """Judges make(True), the replaced model, by make(False), which is eager."""
    with InDouble():
        double = nn.Module.double(make(False))
        truth = quantities(double, batch.to(torch.float64, "cpu"), DTYPE, True)
    naive = quantities(make(False), batch, DTYPE, True)
    with CountedAttention() as counted:
        actual = quantities(make(True), batch, DTYPE, True)
    assert any(name.startswith("gradient of ") for name in truth)
    every = [same_scale(x) for x in (actual, truth, naive)]
    parity = judge(*every[:2], every[2:], DTYPE, counted.calls)
    assert counted.calls > 0
    assert parity.passed, parity


def adapted(name, config, replaced, head=None, first="replaced"):
    """An architecture with an adapter. first: what is done first, replacing or adapting."""
    model = find(name).build(head=head)
    if replaced and first == "replaced":
        replace_attention(model)
    torch.manual_seed(3)
    model = peft.get_peft_model(model, config)
    if replaced and first == "adapted":
        replace_attention(model)
    return model.train()


def batch_of(name, padding, output="last_hidden_state", virtual=0):
    """A batch whose outputs stand behind `virtual` tokens of the adapter."""
    architecture = find(name)
    torch.manual_seed(1)
    inputs, real = architecture.batch(architecture.config(), LENGTHS, padding)
    inputs = inputs | {"attention_mask": padding_mask(LENGTHS, padding).long()}
    mask = nn.functional.pad(real["last_hidden_state"], (virtual, 0), value=True)
    return ExampleInputs(inputs, {output: mask})


LORA = {
    "bert": ("query", "value"),
    "modernbert": ("Wqkv", "Wo"),
    "megatron-bert": ("query", "key", "value"),
    "roformer": ("query", "key"),
    "longformer": ("query", "value", "query_global"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "gpt2": ("c_attn",),
    "t5": ("q", "v"),
    "whisper": ("q_proj", "v_proj"),
}


@pytest.mark.parametrize("first", ["replaced", "adapted"])
@pytest.mark.parametrize("name", LORA)
def test_lora_on_projections(name, first):
    if name == "whisper":
        torch.manual_seed(1)
        batch = find(name).batch(find(name).config(), LENGTHS, "right")
    else:
        batch = batch_of(name, "left")
    make = lambda replaced: adapted(name, lora(*LORA[name]), replaced, first=first)
    judged(make, batch)


class Layers(nn.Module):
    """torch.nn's encoder layers, which give what a model of transformers gives."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(48, 3, 56, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x, hidden):
        return {"last_hidden_state": self.encoder(x, src_key_padding_mask=hidden)}


@pytest.mark.parametrize("first", ["replaced", "adapted"])
def test_lora_on_multihead_attention(first):
    def make(replaced):
        torch.manual_seed(0)
        model = Layers()
        if replaced and first == "replaced":
            replace_attention(model)
        torch.manual_seed(3)
        model = peft.get_peft_model(model, lora("self_attn", "linear1"))
        if replaced and first == "adapted":
            assert len(replace_attention(model).kept) == 0
        return model.train()

    real = padding_mask(LENGTHS, "right")
    torch.manual_seed(1)
    inputs = {"x": torch.randn(*real.shape, 48), "hidden": ~real}
    judged(make, ExampleInputs(inputs, {"last_hidden_state": real}))


SOFT = {
    "prefix-bert": ("bert", None, prefix("FEATURE_EXTRACTION"), "last_hidden_state", 0),
    "prefix-llama": ("llama", "LlamaForCausalLM", prefix("CAUSAL_LM"), "logits", 0),
    "prefix-gpt2": ("gpt2", "GPT2LMHeadModel", prefix("CAUSAL_LM"), "logits", 0),
    "prompt-bert": (
        "bert", None, prompt("FEATURE_EXTRACTION"), "last_hidden_state", VIRTUAL
    ),
    "prompt-modernbert": (
        "modernbert", None, prompt("FEATURE_EXTRACTION"), "last_hidden_state", VIRTUAL
    ),
    "prompt-llama": ("llama", "LlamaForCausalLM", prompt("CAUSAL_LM"), "logits", VIRTUAL),
    "prompt-mistral": ("mistral", "MistralForCausalLM", prompt("CAUSAL_LM"), "logits", VIRTUAL),
    "prompt-t5": ("t5", "T5ForConditionalGeneration", prompt("SEQ_2_SEQ_LM"), "logits", 0),
}  # fmt: skip


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("case", SOFT)
def test_prefixes_and_prompts(case, padding):
    name, head, config, output, virtual = SOFT[case]
    make = lambda replaced: adapted(name, config, replaced, head)
    judged(make, batch_of(name, padding, output, virtual))


@pytest.mark.parametrize("tuning", [prefix, prompt], ids=lambda tuning: tuning.__name__)
def test_what_is_generated_behind_an_adapter(tuning):
    config = tuning("CAUSAL_LM")
    inputs = batch_of("llama", "left").inputs
    settings = {"do_sample": False, "max_new_tokens": 9, "min_new_tokens": 9}
    tokens = []
    for replaced in (False, True):
        model = adapted("llama", config, replaced, "LlamaForCausalLM").eval()
        tokens.append(model.generate(**inputs, **settings))
    assert torch.equal(*tokens)
    assert len({tuple(row) for row in tokens[0][:, -9:].tolist()}) > 1


def test_merged_and_unloaded_a_model_keeps_its_attention():
    model = adapted("bert", lora("query", "value"), True).eval()
    inputs = batch_of("bert", "left").inputs
    expected = model(**inputs).last_hidden_state
    merged = model.merge_and_unload()
    with CountedAttention() as counted:
        actual = merged(**inputs).last_hidden_state
    assert counted.calls == 2
    real = padding_mask(LENGTHS, "left")
    torch.testing.assert_close(actual[real], expected[real])
