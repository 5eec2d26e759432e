"""Events, signals and times: each kind of input by its definition, packed as padded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from encoders import BERT, LENGTHS, LONGFORMER, MODERN, cu_seqlens, make_batch, pack, seeded
from encoders import with_sdpa as on_sdpa

from clinattn.encoder import (
    CausalLanguageModel,
    Encoder,
    EncoderConfig,
    MaskedLanguageModel,
    SequenceClassifier,
    patches,
)

REAL = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def events() -> dict[str, torch.Tensor]:
    ids, _ = make_batch()
    values = torch.randn(ids.shape, dtype=torch.float64).masked_fill(torch.rand(ids.shape) < 0.4, 0)
    values[values == 0] = torch.nan
    days = torch.rand(ids.shape, dtype=torch.float64).cumsum(1) * 400
    return {"inputs": ids, "values": values, "positions": days}


def without(words: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: x for name, x in words.items() if name not in names}


SIGNAL = {"inputs": torch.randn(4, 63, 6, dtype=torch.float64)}
EVENTS = replace(MODERN, numeric_values=True, positions="rotary_time", norm_kind="rms")
CASES: dict[str, tuple[EncoderConfig, dict[str, torch.Tensor]]] = {
    "events": (EVENTS, events()),
    "causal_events": (replace(EVENTS, causal=True, parallel=True, first_norm=True), events()),
    "sinusoidal_index": (
        replace(BERT, positions="sinusoidal"),
        without(events(), "values", "positions"),
    ),
    "sinusoidal_time": (replace(BERT, positions="sinusoidal"), without(events(), "values")),
    "signal": (replace(MODERN, vocab_size=0, channels=6), SIGNAL),
    "learned_signal": (replace(LONGFORMER, vocab_size=0, channels=6), SIGNAL),
}


def gradients(config, words, **arrangement) -> dict[str, torch.Tensor]:
    """Hidden states of the real tokens, and the gradients of a weighted sum of them."""
    model = seeded(Encoder, config).double()
    hidden = model(**words, **arrangement)
    hidden = pack(hidden) if hidden.dim() == 3 else hidden
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).double()
    (hidden * weight).sum().backward()
    return {"hidden": hidden.detach()} | {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", CASES)
def test_packed_padded_and_sdpa_agree_with_nan_in_the_padding(name):
    config, words = CASES[name]
    lengths = torch.tensor(LENGTHS)
    expected = gradients(config, {n: pack(x) for n, x in words.items()}, cu_seqlens=cu_seqlens())
    assert all(x is not None and x.isfinite().all() for x in expected.values())
    poisoned = {
        n: x.masked_fill(~REAL.view(4, 63, *(1,) * (x.dim() - 2)), torch.nan)
        if x.is_floating_point()
        else x
        for n, x in words.items()
    }
    for arrangement in ({}, {"layout": "padded"}, {"attention": "sdpa"}):
        arranged = replace(config, attention=arrangement.pop("attention", "clinattn"))
        actual = gradients(arranged, poisoned, lengths=lengths, **arrangement)
        for part, x in actual.items():
            torch.testing.assert_close(x, expected[part], msg=lambda m, p=part: f"{p}: {m}")


def test_an_absent_value_adds_nothing_and_a_present_one_its_line():
    config = replace(MODERN, numeric_values=True, embedding_norm=False)
    embeddings = seeded(Encoder, config).double().eval().embeddings
    ids, at = torch.tensor([7, 7, 7, 7]), torch.arange(4)
    values = torch.tensor([torch.nan, 0.0, 1.0, 3.0], dtype=torch.float64)
    absent, zero, one, three = embeddings(ids, at, None, values)
    torch.testing.assert_close(absent, embeddings.tokens.weight[7])
    assert (zero - absent).abs().max() > 1e-3  # a measured 0 is not a missing value
    torch.testing.assert_close(three - zero, 3 * (one - zero))


def test_sinusoids_are_those_of_the_transformer():
    config = replace(
        BERT, positions="sinusoidal", rotary_base=1e4, embedding_norm=False, token_types=0
    )
    embeddings = seeded(Encoder, config).double().eval().embeddings
    ids, at = torch.tensor([3, 3]), torch.tensor([0.0, 1e6 + 0.25], dtype=torch.float64)
    added = (embeddings(ids, at, None) - embeddings.tokens.weight[3]).detach()
    for i in range(0, 48, 2):
        angles = at / 10_000 ** (i / 48)
        torch.testing.assert_close(added[:, i], angles.sin(), rtol=0, atol=1e-9)
        torch.testing.assert_close(added[:, i + 1], angles.cos(), rtol=0, atol=1e-9)


def test_events_are_told_apart_by_time_alone():
    config, words = CASES["events"]
    model = seeded(Encoder, config).double().eval()
    plain = model(**words)
    moved = model(**words | {"positions": words["positions"] + 20_000.0})
    torch.testing.assert_close(moved, plain, rtol=0, atol=1e-8)
    later = words["positions"].clone()
    later[:, 40:] += 9.0
    assert (model(**words | {"positions": later}) - plain).abs().max() > 1e-3


def test_causal_layers_see_nothing_that_comes_later():
    ids, _ = make_batch()
    changed = ids.clone()
    changed[:, 30] = (ids[:, 30] + 1) % 101
    for config in (MODERN, replace(MODERN, windows=(None, 5, 0))):
        model = seeded(Encoder, replace(config, causal=True)).eval()
        for way in (model, on_sdpa(model)):
            difference = (way(ids) - way(changed)).abs().amax((0, 2))
            assert (difference[:30] == 0).all() and difference[30] > 0


def test_global_tokens_see_all_and_are_seen_by_all():
    config = replace(LONGFORMER, num_layers=1, windows=(3,))
    model = seeded(Encoder, config).eval()
    ids, _ = make_batch()
    for at, seen in ((1, torch.ones(63, dtype=torch.bool)), (40, None)):
        changed = ids.clone()
        changed[:, at] = (ids[:, at] + 1) % 101
        difference = (model(ids) - model(changed)).abs().amax((0, 2))
        if seen is None:
            index = torch.arange(63)
            seen = ((index - at).abs() <= 3) | (index < 2)
        assert (difference[seen] > 0).all() and (difference[~seen] == 0).all()


def test_position_offset_names_the_first_row_of_the_table():
    model = seeded(Encoder, LONGFORMER).eval()
    with torch.no_grad():
        model.embeddings.positions.weight[:2] = torch.nan
    ids, _ = make_batch()
    assert model(ids[:, :64]).isfinite().all()
    with pytest.raises(ValueError, match="at most max_positions=66 less position_offset=2"):
        model(torch.zeros(1, 65, dtype=torch.long))


def test_patches_are_whole_and_padding_is_not_read():
    signal = torch.randn(3, 10, 2)
    lengths = torch.tensor([10, 5, 0])
    signal[1, 5:], signal[2] = torch.nan, torch.nan
    cut, in_patches = patches(signal, 4, lengths)
    assert cut.shape == (3, 3, 8) and in_patches.tolist() == [3, 2, 0]
    assert torch.equal(cut[0, :2].reshape(8, 2), signal[0, :8])
    assert torch.equal(cut[0, 2].view(4, 2)[:2], signal[0, 8:]) and not cut[0, 2, 4:].any()
    assert torch.equal(cut[1, 1].view(4, 2)[:1], signal[1, 4:5]) and not cut[1, 1, 2:].any()
    assert not cut[2].any()
    assert patches(signal[:1], 5)[1].tolist() == [2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.randn(3, 10), 4), r"signal has shape \(3, 10\): expected \(B, samples, leads\)"),
        ((torch.randn(3, 10, 2), 0), "size=0: expected at least 1"),
        ((torch.randn(3, 10, 2), 4, torch.tensor([3])), r"lengths has shape \(1,\): expected"),
        ((torch.randn(1, 10, 2), 4, torch.tensor([11])), r"lengths=\[11\]: expected 0 to 10"),
    ],
    ids=["rank", "size", "batch", "range"],
)
def test_bad_signals_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        patches(*given)


IDS = torch.zeros(2, 8, dtype=torch.long)
SIGNALS = replace(MODERN, vocab_size=0, channels=6)


@pytest.mark.parametrize(
    ("config", "inputs", "words", "error", "message"),
    [
        (
            EVENTS,
            IDS,
            {"values": IDS.float()},
            ValueError,
            "positions: got None, expected the time",
        ),
        (EVENTS, IDS, {"positions": IDS}, ValueError, "values: expected a tensor"),
        (EVENTS, IDS, {"positions": IDS, "values": IDS}, TypeError, "values has dtype torch.int64"),
        (MODERN, IDS, {"values": IDS.float()}, ValueError, "values: expected None"),
        (MODERN, IDS, {"token_types": IDS}, ValueError, "token_types: got some, expected None"),
        (MODERN, IDS, {"positions": IDS[0]}, ValueError, r"positions has shape \(8,\): expected"),
        (SIGNALS, IDS, {}, TypeError, "a signal of dtype torch.int64: expected a floating one"),
        (SIGNALS, torch.zeros(2, 8, 5), {}, ValueError, r"expected \(T, 6\) with cu_seqlens"),
        (SIGNALS, torch.zeros(6), {}, ValueError, r"a signal of shape \(6,\)"),
    ],
    ids=[
        "no_time",
        "no_values",
        "int_values",
        "values",
        "types",
        "shape",
        "ids",
        "channels",
        "rank",
    ],
)
def test_bad_inputs_are_named(config, inputs, words, error, message):
    with pytest.raises(error, match=message):
        Encoder(config)(inputs, **words)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0: expected at least 1"),
        ({"channels": 6}, "vocab_size=101: expected 0"),
        (
            {"channels": 6, "vocab_size": 0, "numeric_values": True},
            "numeric_values: expected codes",
        ),
        ({"norm_kind": "rms", "norm_bias": True}, "norm_bias=True: an RMS norm has none"),
        ({"parallel": True, "norm": "post"}, "parallel=True: expected norm='pre'"),
        ({"causal": True, "global_prefix": 1}, "global_prefix=1: its tokens see all"),
        ({"global_projections": True}, "global_projections=True: expected a global_prefix"),
        (
            {"global_projections": True, "global_prefix": 1, "positions": "learned"},
            "a window in every layer",
        ),
        ({"position_offset": 2}, "position_offset=2: expected learned positions"),
        ({"global_prefix": -1}, "global_prefix=-1: expected at least 0"),
        ({"classifier_dropout": 1.0}, "classifier_dropout=1.0: expected 0 <= p < 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_shapes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(MODERN, **change)


SMALL = replace(BERT, vocab_size=20, max_positions=32, token_types=2, num_layers=1, windows=())
OUT_OF_TABLES = {
    "id": ({"inputs": (2, 20)}, "input_ids: got values from 1 to 20, expected 0 to 19"),
    "negative id": ({"inputs": (0, -1)}, "input_ids: got values from -1 to 1"),
    "position": ({"positions": (1, 32)}, "positions: got values from 0 to 32, expected 0 to 31"),
    "token type": ({"token_types": (3, 2)}, r"token_types: got values .* \(token_types=2\)"),
}


@pytest.mark.parametrize("wrong, message", OUT_OF_TABLES.values(), ids=list(OUT_OF_TABLES))
def test_indices_beyond_a_table_are_named_unless_they_are_dropped(wrong, message):
    model = seeded(Encoder, SMALL)
    words = {
        "inputs": torch.ones(2, 4, dtype=torch.long),
        "positions": torch.arange(4).repeat(2, 1),
        "token_types": torch.zeros(2, 4, dtype=torch.long),
    }
    ((name, (column, value)),) = wrong.items()
    words[name][1, column] = value
    with pytest.raises(ValueError, match=message):
        model(**words)
    model(**words, lengths=torch.tensor([4, column]))  # it is padding now


LABELS = {
    "masked": (MaskedLanguageModel, {}, (2, 20), "labels: got 20, expected 0 to 19, or -100"),
    "negative": (MaskedLanguageModel, {}, (2, -1), "labels: got -1, expected 0 to 19"),
    "causal": (CausalLanguageModel, {"causal": True}, (2, 20), "labels: got 20"),
}


@pytest.mark.parametrize("head, changed, wrong, message", LABELS.values(), ids=list(LABELS))
def test_labels_beyond_the_vocabulary_are_named_before_any_work(
    head, changed, wrong, message, monkeypatch
):
    model = seeded(head, replace(SMALL, **changed))
    ids = torch.ones(2, 4, dtype=torch.long)
    labels = ids.clone()
    labels[1, wrong[0]] = wrong[1]
    assert model(ids, labels=labels, lengths=torch.tensor([4, wrong[0]])).loss.isfinite()
    monkeypatch.setattr(Encoder, "encode", None)
    with pytest.raises(ValueError, match=message):
        model(ids, labels=labels)
    with pytest.raises(ValueError, match=r"labels has shape \(2, 3\): expected \(2, 4\)"):
        model(ids, labels=ids[:, 1:])


def test_classes_beyond_those_of_a_classifier_are_named():
    model = seeded(lambda config: SequenceClassifier(config, 3), SMALL)
    ids = torch.ones(2, 4, dtype=torch.long)
    assert model(ids, labels=torch.tensor([2, -100])).loss.isfinite()
    with pytest.raises(ValueError, match="labels: got 3, expected 0 to 2, or -100 for none"):
        model(ids, labels=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="labels: got floating values beyond 0 to 1"):
        model(ids, labels=torch.full((2, 3), 1.5))
