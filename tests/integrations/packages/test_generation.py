"""Decoding gives the tokens of eager attention: greedy, beams, guessed ahead, with every cache."""

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
    ("mistral", "MistralForCausalLM", "static"),
    ("qwen3", "Qwen3ForCausalLM", "dynamic"),
    ("qwen3", "Qwen3ForCausalLM", "static"),
    ("gemma2", "Gemma2ForCausalLM", "dynamic"),
    ("gemma2", "Gemma2ForCausalLM", "static"),
    ("t5", "T5ForConditionalGeneration", "dynamic"),
    ("bart", "BartForConditionalGeneration", "dynamic"),
    ("whisper", "WhisperForConditionalGeneration", "dynamic"),
]


def prompts(architecture, config):
    """Left-padded prompts of a decoder, or padded inputs of an encoder."""
    torch.manual_seed(1)
    inputs = architecture.batch(config, LENGTHS, "left").inputs
    return {name: x for name, x in inputs.items() if not name.startswith("decoder_")}


def speaking(name, head):
    """A model in evaluation mode with eager attention, whose tokens differ and do not end."""
    architecture = find(name)
    model = architecture.build(head=head).eval()
    if not architecture.spread:
        spread_weights(model)
    model.generation_config.eos_token_id = model.config.vocab_size  # no token
    return model


def check_same_tokens(model, inputs, settings, calls=NEW_TOKENS):
    """Compares what `model` generates before and after; at least `calls` passes are clinattn's."""
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS} | settings
    run = lambda: model.generate(**inputs, **settings)
    expected = run()
    replace_attention(model)
    with CountedAttention() as counted:
        tokens = run()
    assert counted.calls >= calls * model.config.num_hidden_layers
    assert torch.equal(tokens, expected)
    return tokens


@pytest.mark.parametrize("name, head, cache", CASES, ids=[f"{n}-{c}" for n, _, c in CASES])
def test_greedy_tokens_are_those_of_eager_attention(name, head, cache):
    model = speaking(name, head)
    tokens = check_same_tokens(model, prompts(find(name), model.config), CACHES[cache])
    assert len({tuple(row) for row in tokens[:, -NEW_TOKENS:].tolist()}) > 1


BEAMS = [
    ("llama", "LlamaForCausalLM", "dynamic"),
    ("llama", "LlamaForCausalLM", "static"),
    ("mistral", "MistralForCausalLM", "dynamic"),
    ("gpt2", "GPT2LMHeadModel", "dynamic"),
    ("t5", "T5ForConditionalGeneration", "dynamic"),
    ("bart", "BartForConditionalGeneration", "dynamic"),
    ("whisper", "WhisperForConditionalGeneration", "dynamic"),
]


@pytest.mark.parametrize("name, head, cache", BEAMS, ids=[f"{n}-{c}" for n, _, c in BEAMS])
def test_beams_are_those_of_eager_attention(name, head, cache):
    model = speaking(name, head)
    settings = CACHES[cache] | {"num_beams": 3, "num_return_sequences": 2}
    tokens = check_same_tokens(model, prompts(find(name), model.config), settings)
    assert len(tokens) == 2 * len(LENGTHS)


def repeating(model):
    """A prompt in which something is found again."""
    torch.manual_seed(2)
    ids = torch.randint(5, model.config.vocab_size, (1, 7)).repeat(1, 3)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


GUESSING = [
    ("llama", "LlamaForCausalLM"),
    ("gpt2", "GPT2LMHeadModel"),
    ("qwen3", "Qwen3ForCausalLM"),
]


@pytest.mark.parametrize("name, head", GUESSING, ids=[name for name, _ in GUESSING])
def test_prompt_lookup_gives_the_tokens_of_eager_attention(name, head):
    model = speaking(name, head)
    inputs = repeating(model)
    settings = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 20}
    check_same_tokens(model, inputs, settings, calls=5)


@pytest.mark.parametrize("both", [False, True], ids=["assistant-eager", "assistant-replaced"])
@pytest.mark.parametrize("name, head", GUESSING, ids=[name for name, _ in GUESSING])
def test_an_assistant_changes_no_token(name, head, both):
    """The assistant is the model itself, somewhat off: some of its guesses are taken, some not."""
    model, assistant = speaking(name, head), speaking(name, head)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02 * float(parameter.std()))
    if both:
        replace_attention(assistant)
    settings = {"assistant_model": assistant, "max_new_tokens": 20}
    check_same_tokens(model, repeating(model), settings, calls=5)
