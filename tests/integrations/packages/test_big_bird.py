"""BigBird with its full attention replaced, against its own code in fp64."""

from __future__ import annotations

import pytest
import torch
from adapted import adapt_all, assert_parity, assert_same_module, randomized
from support import dtype_id

pytest.importorskip("transformers")

from transformers import BigBirdConfig, BigBirdForMaskedLM, BigBirdModel  # noqa: E402
from transformers.models.big_bird import modeling_big_bird  # noqa: E402

from clinattn.integrations import swap  # noqa: E402
from clinattn.integrations.transformers import big_bird  # noqa: E402

ORIGINAL = modeling_big_bird.BigBirdSelfAttention
SHORT, LONG = 29, 64  # a sequence is sparse from 57 tokens on


def config(attention_type="original_full", **changed) -> BigBirdConfig:
    values = {
        "vocab_size": 50, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2,
        "intermediate_size": 20, "max_position_embeddings": 80, "block_size": 8,
        "num_random_blocks": 1, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
        "attention_type": attention_type,
    } | changed  # fmt: skip
    return BigBirdConfig(**values)


def make_model(attention_type="original_full", **changed) -> BigBirdModel:
    model = BigBirdModel(config(attention_type, **changed), add_pooling_layer=False)
    return randomized(model)


def make_inputs(n: int, padding: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    valid = torch.ones(3, n, dtype=torch.bool)
    if padding == "right":
        valid[1, n // 2 :] = valid[2, -1:] = False
    if padding == "left":
        valid[1, : n // 2] = valid[2, :1] = False
    return {"input_ids": torch.randint(3, 50, (3, n)), "attention_mask": valid.long()}, valid


def attentions(model) -> list[type]:
    return [type(layer.attention.self) for layer in model.encoder.layer]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_full_attention(dtype, padding, train):
    inputs, valid = make_inputs(SHORT, padding)
    assert_parity(make_model().train(train), big_bird.adapt, inputs, valid, dtype)


def test_dropout_is_drawn_in_training_alone():
    model = make_model(attention_probs_dropout_prob=0.5)
    adapt_all(model, big_bird.adapt)
    inputs, _ = make_inputs(SHORT, "right")
    draws = [model.train(train)(**inputs)[0] for train in (True, True, False, False)]
    assert not torch.equal(draws[0], draws[1]) and torch.equal(draws[2], draws[3])


def test_block_sparse_is_left_and_said():
    model = make_model("block_sparse").eval()
    inputs, _ = make_inputs(LONG, "right")
    expected = model(**inputs)[0]
    outcomes = adapt_all(model, big_bird.adapt)
    assert len(outcomes) == 2 and not any(x.replaced for x in outcomes)
    assert all("random blocks" in x.detail for x in outcomes)
    assert torch.equal(model(**inputs)[0], expected)


def test_short_sequence_turns_sparse_to_replaced_full():
    """The switch that BigBird makes itself: with the same weights, and not back to its own code."""
    model, plain = make_model("block_sparse").eval(), make_model("block_sparse").eval()
    plain.load_state_dict(model.state_dict())
    adapt_all(model, big_bird.adapt)
    projections = [layer.attention.self.query for layer in model.encoder.layer]
    inputs, _ = make_inputs(SHORT, "right")
    torch.testing.assert_close(model(**inputs)[0], plain(**inputs)[0])
    assert attentions(model) == [big_bird.BigBirdSelfAttention] * 2
    assert attentions(plain) == [ORIGINAL] * 2
    for layer, projection in zip(model.encoder.layer, projections, strict=True):
        assert layer.attention.self.query is projection
        assert not layer.attention.self.training


def test_switching_back_and_forth():
    model = make_model().eval()
    adapt_all(model, big_bird.adapt)
    inputs, _ = make_inputs(SHORT, "right")
    expected = model(**inputs)[0]
    model.set_attention_type("block_sparse")
    assert attentions(model) == [modeling_big_bird.BigBirdBlockSparseAttention] * 2
    model.set_attention_type("original_full")
    assert attentions(model) == [big_bird.BigBirdSelfAttention] * 2
    assert torch.equal(model(**inputs)[0], expected)
    for module in model.modules():
        big_bird.restore(module)
    model.set_attention_type("block_sparse")
    model.set_attention_type("original_full")
    assert attentions(model) == [ORIGINAL] * 2


@pytest.mark.parametrize("by", ["call", "config"])
def test_attentions_come_from_the_original(by, monkeypatch):
    monkeypatch.setattr(swap, "_warned", set())
    model = make_model(output_attentions=by == "config").eval()
    wanted = {"output_attentions": True} if by == "call" else {}
    inputs, _ = make_inputs(SHORT, "right")
    expected = model(**inputs, **wanted)
    adapt_all(model, big_bird.adapt)
    with pytest.warns(RuntimeWarning, match="attention probabilities"):
        actual = model(**inputs, **wanted)
    assert len(actual.attentions) == 2
    for a, b in zip(actual.attentions, expected.attentions, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(actual[0], expected[0])


def test_decoders_are_left():
    model = make_model(is_decoder=True, add_cross_attention=True)
    outcomes = adapt_all(model, big_bird.adapt)
    assert len(outcomes) == 4 and all("decoder" in x.detail for x in outcomes)
    assert attentions(model) == [ORIGINAL] * 2


def test_the_module_stays_itself():
    inputs, _ = make_inputs(SHORT, "none")
    assert_same_module(
        randomized(BigBirdForMaskedLM(config())).eval(),
        big_bird.adapt,
        big_bird.restore,
        lambda model: model(**inputs).logits.detach(),
    )


def test_others_are_none_of_its_business():
    assert big_bird.adapt(torch.nn.Linear(2, 2)) is None
    assert big_bird.restore(torch.nn.Linear(2, 2)) is False
