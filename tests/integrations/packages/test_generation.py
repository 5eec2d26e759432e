"""Greedy decoding gives the tokens of eager attention, left-padded and with every kind of cache."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from parity_table import LENGTHS  # noqa: E402

from clinattn.integrations.replace import replace_attention  # noqa: E402
from clinattn.tools.model_report.architectures import find, spread_weights  # noqa: E402
from clinattn.tools.model_report.parity import CountedAttention  # noqa: E402

NEW_TOKENS = 9

CACHES = {
    "none": {"use_cache": False},
    "dynamic": {},
    "static": {"cache_implementation": "static"},
}
CASES = [
    ("llama", "LlamaForCausalLM", "dynamic"),
    ("llama", "LlamaForCausalLM", "static"),
    ("llama", "LlamaForCausalLM", "none"),
    ("gpt2", "GPT2LMHeadModel", "dynamic"),
    ("gpt2", "GPT2LMHeadModel", "static"),
    ("mistral", "MistralForCausalLM", "dynamic"),
    ("qwen3", "Qwen3ForCausalLM", "dynamic"),
    ("gemma2", "Gemma2ForCausalLM", "dynamic"),
    ("t5", "T5ForConditionalGeneration", "dynamic"),
    ("bart", "BartForConditionalGeneration", "dynamic"),
    ("whisper", "WhisperForConditionalGeneration", "dynamic"),
]


def prompts(architecture, config):
    """Left-padded prompts of a decoder, or padded inputs of an encoder."""
    torch.manual_seed(1)
    inputs = architecture.batch(config, LENGTHS, "left").inputs
    return {name: x for name, x in inputs.items() if not name.startswith("decoder_")}


@pytest.mark.parametrize("name, head, cache", CASES, ids=[f"{n}-{c}" for n, _, c in CASES])
def test_greedy_tokens_are_those_of_eager_attention(name, head, cache):
    architecture = find(name)
    model = architecture.build(head=head).eval()
    if not architecture.spread:  # tokens have to differ
        spread_weights(model)
    inputs = prompts(architecture, model.config)
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    settings |= CACHES[cache]
    run = lambda: model.generate(**inputs, **settings)
    expected = run()
    replace_attention(model)
    with CountedAttention() as counted:
        tokens = run()
    assert counted.calls >= NEW_TOKENS * model.config.num_hidden_layers
    assert torch.equal(tokens, expected)
    assert len({tuple(row) for row in tokens[:, -NEW_TOKENS:].tolist()}) > 1
