"""Attention that is not replaced is named, with its reason, and none is passed over."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from adapted import adapt_all
from torch import nn

transformers = pytest.importorskip("transformers")

from clinattn.integrations import unsupported  # noqa: E402
from clinattn.integrations.replace import replace_attention  # noqa: E402
from clinattn.integrations.transformers import bert_shaped, big_bird, longformer, xlm  # noqa: E402

REPLACED = {
    (x.__module__.split(".")[2], x.__name__)
    for replacements in (
        bert_shaped.REPLACEMENTS,
        big_bird.REPLACEMENTS,
        longformer.REPLACEMENTS,
        xlm.REPLACEMENTS,
    )
    for x in replacements
} | {("big_bird", "BigBirdBlockSparseAttention")}  # big_bird says why not

CLASS = re.compile(
    r"^class (\w*(?:Attention|AttentionMap|AttnBlock))\(([^)]*)\):\n(.*?)(?=^\S)", re.M | re.S
)


def own_attention() -> set[tuple[str, str]]:
    """(model, class) of transformers with a softmax of its own, and not through the registry."""
    found = set()
    models = Path(transformers.__file__).parent / "models"
    for path in models.glob("*/modeling_*.py"):
        for name, _, body in CLASS.findall(path.read_text() + "\n#"):
            if "softmax" in body.lower() and "ALL_ATTENTION_FUNCTIONS" not in body:
                found.add((path.parent.name, name))
    return found


OF_RELEASE = pytest.mark.skipif(
    not transformers.__version__.startswith(unsupported.RELEASE + "."),
    reason=f"the table is of transformers {unsupported.RELEASE}",
)


@OF_RELEASE
def test_every_class_is_replaced_or_listed():
    """A scan of the installed transformers: what it finds is known."""
    found = own_attention()
    assert len(found) > 100
    ignored = {("patchtsmixer", "PatchTSMixerGatedAttention")}  # a gate of one projection
    assert found - REPLACED - set(unsupported.REASONS) - ignored == set()


def test_no_class_is_replaced_and_listed():
    assert not REPLACED & set(unsupported.REASONS)


@OF_RELEASE
def test_what_is_listed_exists():
    models = Path(transformers.__file__).parent / "models"
    for model, name in unsupported.REASONS:
        text = "".join(x.read_text() for x in (models / model).glob("modeling_*.py"))
        assert f"class {name}(" in text, f"{model} has no {name}"


def make(prefix: str, **more) -> nn.Module:
    small = {"vocab_size": 50, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1}
    config = getattr(transformers, prefix + "Config")(**small, intermediate_size=20, **more)
    return getattr(transformers, prefix + "Model")(config)


@pytest.mark.parametrize(
    "prefix, more, words",
    [
        ("DebertaV2", {}, "content with position"),
        ("Deberta", {}, "content with position"),
        ("ConvBert", {"embedding_size": 24}, "convolution"),
        ("Nystromformer", {}, "approximates"),
        ("Yoso", {}, "approximates"),
        ("Luke", {"entity_vocab_size": 9, "entity_emb_size": 8}, "entities"),
        ("Canine", {}, "no replacement is written"),
    ],
    ids=lambda x: x if isinstance(x, str) and " " not in x else "",
)
def test_models_are_named(prefix, more, words):
    model = make(prefix, **more)
    before = [type(m) for m in model.modules()]
    outcomes = adapt_all(model, unsupported.adapt)
    assert outcomes and not any(x.replaced for x in outcomes)
    assert all(words in x.detail for x in outcomes)
    assert [type(m) for m in model.modules()] == before
    # each is also one that its form gives away
    named = [m for m in model.modules() if unsupported.adapt(m) is not None]
    assert all(unsupported.looks_like_attention(m) for m in named)
    assert not any(unsupported.uses_registry(m) for m in named)


def test_subclasses_have_the_reason():
    original = next(m for m in make("DebertaV2").modules() if unsupported.adapt(m) is not None)
    changed = type("Mine", (type(original),), {})
    original.__class__ = changed
    assert "content with position" in unsupported.adapt(original).detail


def test_subclasses_that_use_the_registry_have_none():
    def forward(self, hidden_states):
        """Names ALL_ATTENTION_FUNCTIONS in its source."""

    original = next(m for m in make("DebertaV2").modules() if unsupported.adapt(m) is not None)
    original.__class__ = type("Mine", (type(original),), {"forward": forward})
    assert unsupported.adapt(original) is None


def test_the_registry_is_seen():
    attention = [m for m in make("Bert").modules() if unsupported.looks_like_attention(m)]
    assert [type(m).__name__ for m in attention] == ["BertSelfAttention"]
    assert unsupported.uses_registry(attention[0])
    assert unsupported.adapt(attention[0]) is None


class SomeAttention(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = parts
        for i, part in enumerate(parts):
            setattr(self, f"part{i}", part)


class Other(SomeAttention):
    pass


class OwnAttn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = (nn.Parameter(torch.zeros(3, 4)) for _ in range(2))


CASES = {
    "two-linears": (SomeAttention(nn.Linear(2, 6), nn.Linear(2, 2)), True),
    "convolutions": (SomeAttention(nn.Conv1d(2, 6, 1), nn.Conv1d(2, 2, 1)), True),
    "parameters": (OwnAttn(), True),
    "torch": (nn.MultiheadAttention(4, 2), True),
    "other-name": (Other(nn.Linear(2, 6), nn.Linear(2, 2)), False),
    "fused-alone": (SomeAttention(nn.Linear(2, 6), nn.LayerNorm(2)), True),
    "one-linear-and-norm": (SomeAttention(nn.Linear(2, 2), nn.LayerNorm(2)), False),
    "embedding": (SomeAttention(nn.Linear(2, 2), nn.Embedding(3, 2)), False),
    "holds-others": (SomeAttention(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), False),
    "linear": (nn.Linear(2, 2), False),
}


@pytest.mark.parametrize("module, expected", CASES.values(), ids=CASES.keys())
def test_looks_like_attention(module, expected):
    assert unsupported.looks_like_attention(module) is expected
    assert unsupported.adapt(module) is None and not unsupported.uses_registry(module)


def test_replaced_ones_do_not_look_like_attention():
    model = make("Longformer", attention_window=4)

    def left() -> list[str]:
        return [type(m).__name__ for m in model.modules() if unsupported.looks_like_attention(m)]

    assert left() == ["LongformerSelfAttention"]
    adapt_all(model, longformer.adapt)
    assert left() == []


def test_masks_that_a_model_would_misread_are_not_made_for_it():
    """The encoder of BigBird-Pegasus adds what the registered mask function gives to its scores."""
    from clinattn.integrations.transformers.registry import register

    config = transformers.BigBirdPegasusConfig(
        vocab_size=103, d_model=48, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=56, decoder_ffn_dim=56, pad_token_id=0,
        max_position_embeddings=128, attention_type="original_full",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BigBirdPegasusModel._from_config(config, attn_implementation="eager")
    ids = torch.randint(5, 103, (2, 13))
    inputs = {"input_ids": ids, "attention_mask": torch.arange(13) < torch.tensor([[13], [6]])}
    inputs |= {"decoder_input_ids": ids[:, :7]}
    before = model.eval()(**inputs).last_hidden_state
    with pytest.warns(UserWarning, match="no attention was replaced"):
        report = replace_attention(model)
    assert any("its encoder adds the masks" in x.reason for x in report.kept)
    assert torch.equal(model(**inputs).last_hidden_state, before)

    register()
    model.set_attn_implementation("clinattn")
    with pytest.raises(NotImplementedError, match="bigbird_pegasus: .* expected attn_impl"):
        model(**inputs)
