"""Whole models of transformers: three roads to clinattn, checkpointing, compilation."""

import pytest
import torch
import transformers
from transformers_inputs import BY_POSITION, PADDING, WINDOW

import clinattn
from clinattn.integrations.transformers.masks import attention_mask
from clinattn.integrations.transformers.registry import attention, register


def bert(**words):
    settings = transformers.BertConfig(
        vocab_size=100, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, initializer_range=0.5,
    )  # fmt: skip
    return transformers.BertModel._from_config(settings, add_pooling_layer=False, **words).eval()


def test_function_and_mask_are_registered_together():
    register()
    register()
    assert transformers.AttentionInterface()["clinattn"] is attention
    assert transformers.AttentionMaskInterface()["clinattn"] is attention_mask


def test_three_roads_lead_to_the_same_numbers():
    """A padded batch: with a function but no mask it would silently be attended to."""
    register()
    ids = torch.randint(5, 90, (2, 13))
    model = bert(attn_implementation="eager")
    eager = model(ids, attention_mask=PADDING.long())[0][PADDING]
    unmasked = model(ids)[0][PADDING]
    assert (eager - unmasked).abs().max() > 1e-2
    model.set_attn_implementation("clinattn")
    ours = model(ids, attention_mask=PADDING.long())[0][PADDING]
    torch.testing.assert_close(ours, eager)
    other = bert(attn_implementation="clinattn")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids, attention_mask=PADDING.long())[0][PADDING], ours)
    third = bert(attn_implementation="eager")
    third.load_state_dict(model.state_dict())
    result = clinattn.replace_attention(third)
    names = [x.name for x in result.replaced]
    assert names == [f"encoder.layer.{i}.attention.self" for i in (0, 1)]
    assert result.kept == [] and "2 x BertSelfAttention" in str(result)
    assert torch.equal(third(ids, attention_mask=PADDING.long())[0][PADDING], ours)
    result.undo()
    assert third.config._attn_implementation == "eager"
    assert torch.equal(third(ids, attention_mask=PADDING.long())[0][PADDING], eager)


def test_the_choice_is_not_saved(tmp_path):
    model = bert(attn_implementation="eager")
    clinattn.replace_attention(model)
    model.save_pretrained(tmp_path)
    assert "clinattn" not in (tmp_path / "config.json").read_text()
    again = transformers.BertModel.from_pretrained(tmp_path, attn_implementation="clinattn")
    assert again.config._attn_implementation == "clinattn"


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    settings = transformers.MistralConfig(
        vocab_size=100, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, sliding_window=WINDOW,
    )  # fmt: skip
    model = transformers.MistralForCausalLM._from_config(settings, attn_implementation="eager")
    ids = torch.randint(5, 90, (2, 13))

    def gradients():
        model.zero_grad()
        logits = model(ids, attention_mask=PADDING.long(), use_cache=False)[0]
        logits[PADDING].square().sum().backward()
        return [x.grad.clone() for x in model.parameters()]

    eager = gradients()
    clinattn.replace_attention(model)
    plainly = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    for a, b, c in zip(gradients(), plainly, eager, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-4)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["bert", "modernbert", "mistral"])
def test_one_graph(kind, padded):
    """torch.compile(fullgraph=True) of whole models, with the bits of eager mode.

    transformers 5.0 tells a graph no lengths: its masks are dense there, and sums begin elsewhere.
    """
    sizes = {
        "vocab_size": 100, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "cls_token_id": 1, "sep_token_id": 2,
    }  # fmt: skip
    more = {
        "bert": {},
        "modernbert": {"local_attention": 6},
        "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    }
    settings = transformers.AutoConfig.for_model(kind, **sizes, **more[kind])
    model = transformers.AutoModel.from_config(settings).eval()
    clinattn.replace_attention(model)
    words = {"attention_mask": PADDING.long()} if padded else {}
    if kind == "mistral":
        words["use_cache"] = False
    ids = torch.randint(5, 90, (2, 13))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tolerance = {"rtol": 2e-6, "atol": 2e-6} if BY_POSITION else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(compiled(ids, **words)[0], model(ids, **words)[0], **tolerance)
