"""attention_mask in place of lengths: padding on either side gives the bits of lengths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from encoders import BERT, CONFIGS, LENGTHS, MODERN, make_batch, seeded

from clinattn.encoder import (
    CausalLanguageModel,
    Encoder,
    MaskedLanguageModel,
    PretrainingModel,
    SequenceClassifier,
)

N = max(LENGTHS)
STARTS = {"right": (0, 0, 0, 0), "left": tuple(N - n for n in LENGTHS), "both": (46, 20, 0, 7)}
AT = torch.arange(N)


def moved(x: torch.Tensor, side: str) -> torch.Tensor:
    """The rows of a right-padded batch, with the padding on another side."""
    return torch.stack([row.roll(start, 0) for row, start in zip(x, STARTS[side], strict=True)])


def real(side: str) -> torch.Tensor:
    """(B, N) bool, made without moved."""
    starts, lengths = torch.tensor(STARTS[side])[:, None], torch.tensor(LENGTHS)[:, None]
    return (starts <= AT) & (starts + lengths > AT)


def results(model, words, chosen):
    """Returns a model's outputs at the real tokens, and the gradient of every parameter."""
    hidden = model(**words)
    hidden = hidden[chosen]
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (hidden * weight).sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


WAYS = {"packed": {}, "padded": {"layout": "padded"}, "sdpa": {}}


@pytest.mark.parametrize("side", STARTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["bert", "modernbert", "causal", "longformer"])
def test_hidden_states_and_gradients_are_those_of_lengths(name, way, side):
    attention = "sdpa" if way == "sdpa" else "clinattn"
    model = seeded(Encoder, replace(CONFIGS[name], attention=attention))
    ids, lengths = make_batch()
    expected = results(model, {"inputs": ids, "lengths": lengths, **WAYS[way]}, real("right"))
    mask = real(side).long()
    words = {"inputs": moved(ids, side), "attention_mask": mask, **WAYS[way]}
    assert all(map(torch.equal, results(model, words, real(side)), expected))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_events_move_with_their_times_and_values(dtype, layout):
    config = replace(MODERN, numeric_values=True, positions="rotary_time")
    model = seeded(Encoder, config)
    ids, lengths = make_batch()
    words = {"inputs": ids, "values": torch.randn(ids.shape), "positions": torch.rand(4, N)}
    words["positions"] = words["positions"].cumsum(1)
    expected = results(model, words | {"lengths": lengths, "layout": layout}, real("right"))
    left = {name: moved(x, "left") for name, x in words.items()}
    left["values"][~real("left")] = torch.nan
    left |= {"attention_mask": real("left").to(dtype), "layout": layout}
    assert all(map(torch.equal, results(model, left, real("left")), expected))


def labels(ids, every, layout):
    """Labels of every token or some. Nonsense in the padding is not looked at where it is dropped.

    In the layout that keeps it the padding is never labelled.
    """
    marked = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    hidden = 10_000 if layout == "packed" else -100
    return ids.where(marked | torch.tensor(every), -100).masked_fill(~real("right"), hidden)


HEADS = {
    "masked": (MaskedLanguageModel, BERT, ()),
    "causal": (CausalLanguageModel, replace(MODERN, causal=True), ()),
    "first": (SequenceClassifier, replace(BERT, pooling="first"), (3,)),
    "last": (SequenceClassifier, replace(MODERN, causal=True, pooling="last"), (3,)),
    "mean": (SequenceClassifier, replace(MODERN, pooling="mean"), (3,)),
    "pretraining": (PretrainingModel, BERT, ()),
}


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", HEADS)
def test_heads_take_it(name, layout):
    kind, config, args = HEADS[name]
    model = seeded(kind, replace(config, hidden_dropout=0.0), *args)
    ids, lengths = make_batch()
    classes = torch.tensor([0, 1, 1, 0])
    of_rows = {"labels": classes} if kind is SequenceClassifier else {}
    more = {"next_labels": classes} if kind is PretrainingModel else {}
    marked = labels(ids, name == "causal", layout)
    expected = model(ids, lengths=lengths, layout=layout, **{"labels": marked} | of_rows | more)
    actual = model(
        moved(ids, "left"),
        attention_mask=real("left"),
        layout=layout,
        **{"labels": moved(marked, "left")} | of_rows | more,
    )
    assert expected.loss.isfinite() and torch.equal(actual.loss, expected.loss)
    assert torch.equal(actual.logits, expected.logits)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_logits_come_back_where_their_tokens_were(layout):
    model = seeded(MaskedLanguageModel, BERT).eval()
    ids, lengths = make_batch()
    expected = model(ids, lengths=lengths, layout=layout).logits[real("right")]
    words = {"attention_mask": real("left"), "layout": layout}
    assert torch.equal(model(moved(ids, "left"), **words).logits[real("left")], expected)


@pytest.mark.unpoisoned
def test_a_graph_serves_masks_of_either_side():
    torch._dynamo.reset()
    model = seeded(Encoder, BERT).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, _ = make_batch()
    for side in ("left", "right"):
        words = {"inputs": moved(ids, side), "attention_mask": real(side)}
        torch.testing.assert_close(compiled(**words), model(**words))


def test_a_row_of_padding_alone_is_empty():
    model = seeded(SequenceClassifier, BERT, 2).eval()
    ids, mask = make_batch()[0], real("left")
    mask[1] = False
    for layout in ("packed", "padded"):
        assert model(ids, attention_mask=mask, layout=layout).logits.isfinite().all()


IDS = torch.zeros(2, 8, dtype=torch.long)
ONES = torch.ones(2, 8, dtype=torch.long)
HOLE = ONES.clone()
HOLE[1, 3] = 0


@pytest.mark.parametrize(
    ("inputs", "words", "error", "message"),
    [
        (IDS, {"attention_mask": HOLE}, ValueError, "zeros between the tokens of row 1"),
        (IDS, {"attention_mask": -ONES}, ValueError, "values from -1 to -1, expected 0 and 1"),
        (IDS, {"attention_mask": ONES.float()}, TypeError, "dtype torch.float32: expected bool"),
        (IDS, {"attention_mask": ONES[:, 1:]}, ValueError, r"\(2, 7\): expected .* \(2, 8\)"),
        (IDS, {"attention_mask": [1, 1]}, TypeError, "attention_mask"),
        (
            IDS,
            {"attention_mask": ONES, "lengths": torch.tensor([8, 8])},
            ValueError,
            "lengths and attention_mask: got both",
        ),
        (
            IDS[0],
            {"attention_mask": ONES[0], "cu_seqlens": torch.tensor([0, 8])},
            ValueError,
            "no lengths or attention_mask",
        ),
    ],
    ids=["hole", "values", "dtype", "shape", "type", "both", "packed"],
)
def test_bad_masks_are_named(inputs, words, error, message):
    for model in (Encoder(BERT), MaskedLanguageModel(BERT)):
        with pytest.raises(error, match=message):
            model(inputs, **words)
