"""Attributions of one answer: layouts, completeness, groups, and refusals."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from attributed import BERT, CAUSAL, CONFIGS, LENGTHS, MODERN, SMALL, N, batch_of, classifier
from explained import assert_equal
from torch import nn

import clinattn
from clinattn.encoder import Encoder, EncoderConfig, SequenceClassifier
from clinattn.explain import gradients, words_of
from clinattn.explain.attribute import METHODS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_is_padded_is_alone(name, method):
    """The same numbers however a batch is laid out, and 0 in padding. In fp64, but for sums that
    are formed in another order: the layers' products of other numbers of rows."""
    config = CONFIGS[name]
    model, batch = classifier(config, torch.float64), batch_of(config)
    scores = clinattn.attribute(model, {**batch, "lengths": LENGTHS}, 1, method)
    assert scores.shape == (3, N) and scores.dtype == torch.float64
    real = torch.arange(N) < LENGTHS[:, None]
    assert (scores[~real] == 0).all() and (scores[real] != 0).any()
    terms = 100 * N * SMALL["num_layers"]  # products of 24 features, forward and backward
    padded = {**batch, "lengths": LENGTHS, "layout": "padded"}
    assert_equal("padded", clinattn.attribute(model, padded, 1, method), scores, terms)
    ends = F.pad(LENGTHS.cumsum(0), (1, 0)).int()
    packed = {key: x[real] for key, x in batch.items()}
    flat = clinattn.attribute(model, {**packed, "cu_seqlens": ends}, 1, method)
    assert_equal("packed", flat, scores[real], terms)
    for s, n in enumerate(LENGTHS.tolist()):
        alone = {key: x[s : s + 1, :n] for key, x in batch.items()}
        one = clinattn.attribute(model, alone, torch.tensor([1]), method)
        assert_equal("alone", one[0], scores[s, :n], terms)
    if config.positions != "rotary_time":
        rolled = {"inputs": batch["inputs"].roll(2, 1), "attention_mask": real.roll(2, 1)}
        rows = LENGTHS < N - 1  # with room for padding on the left
        rolled = {key: x[rows] for key, x in rolled.items()}
        for layout in ("packed", "padded"):
            left = clinattn.attribute(model, {**rolled, "layout": layout}, 1, method)
            assert_equal("left", left, scores[rows].roll(2, 1), terms)


def test_the_token_is_found():
    """A token that is given is the one found, by pooling: first, last, mean."""
    for config, token in ((BERT, 0), (MODERN, 0), (CAUSAL, "mean"), (CAUSAL, -1)):
        if config is CAUSAL:
            config = EncoderConfig(**{**vars(CAUSAL), "pooling": {-1: "last"}.get(token, token)})
        model, batch = classifier(config), {**batch_of(config), "lengths": LENGTHS}
        for method in ("rollout", "relevance", "attingrad"):
            found = clinattn.attribute(model, batch, 1, method)
            assert torch.equal(found, clinattn.attribute(model, batch, 1, method, token=token))


@pytest.mark.parametrize("baseline", [None, 3, "ids"])
def test_integrated_gradients_are_complete(baseline):
    """The sum tends to the difference of the answers. A norm is steep where its input is near 0, as
    on the way from a baseline of zeros: a large eps makes that a matter of few steps."""
    config = EncoderConfig(**{**vars(MODERN), "norm_eps": 0.1})
    model, batch = classifier(config, torch.float64), {**batch_of(MODERN), "lengths": LENGTHS}
    given = torch.randint(1, 50, (3, N)) if baseline == "ids" else baseline
    with torch.no_grad():
        embedded = gradients.Embedded(model, batch, model.encoder.embeddings)
        if baseline is None:
            start = embedded.run(torch.zeros_like).logits
        else:
            other = torch.full((3, N), 3) if baseline == 3 else given
            start = model(**{**batch, "inputs": other}).logits
        difference = (model(**batch).logits - start)[:, 2]
    errors = []
    for steps in (2, 24, 192):
        scores = clinattn.attribute(
            model, batch, 2, "integrated_gradients", steps=steps, baseline=given
        )
        errors.append(float((scores.sum(1) - difference).abs().max()))
    assert errors[0] > errors[1] > 10 * errors[2]
    assert errors[2] < 1e-3 * float(difference.abs().max())


def test_gauss_legendre_integrates_polynomials():
    for n in (1, 2, 5, 20):
        for degree in range(2 * n):
            integral = sum(w * place**degree for place, w in gradients.gauss_legendre(n))
            assert integral == pytest.approx(1 / (degree + 1), abs=2 * n * 2**-52)


def test_attingrad_is_attention_times_the_length_of_gradient_times_input():
    model, batch = classifier(BERT, torch.float64), {**batch_of(BERT), "lengths": LENGTHS}
    with clinattn.explain(model) as e:
        model(**batch)
    embedded = gradients.Embedded(model, batch, model.encoder.embeddings)
    out, x = embedded.leaf()
    (grad,) = torch.autograd.grad(out.logits[:, 0].sum(), x)
    expected = e.paid(0)[torch.arange(N) < LENGTHS[:, None]] * (x * grad).norm(dim=-1)
    scores = clinattn.attribute(model, batch, 0, "attingrad")
    assert torch.equal(scores[torch.arange(N) < LENGTHS[:, None]], expected)


def test_scores_are_summed_by_groups():
    model, batch = classifier(BERT), {**batch_of(BERT), "lengths": LENGTHS}
    scores = clinattn.attribute(model, batch, 1)
    by = torch.randint(-1, 3, (3, N))
    by[0, 0] = 3
    expected = torch.stack([scores.where(by == g, 0).sum(1) for g in range(4)], 1)
    torch.testing.assert_close(clinattn.attribute(model, batch, 1, by=by), expected)
    lists = [[None if x < 0 else x for x in row] for row in by.tolist()]
    torch.testing.assert_close(clinattn.attribute(model, batch, 1, by=lists), expected)
    real = torch.arange(N) < LENGTHS[:, None]
    ends = F.pad(LENGTHS.cumsum(0), (1, 0)).int()
    packed = {"inputs": batch["inputs"][real], "cu_seqlens": ends}
    torch.testing.assert_close(clinattn.attribute(model, packed, 1, by=by[real]), expected)
    ragged = [row[:n] for row, n in zip(lists, LENGTHS.tolist(), strict=True)]
    torch.testing.assert_close(clinattn.attribute(model, packed, 1, by=ragged), expected)


def test_words_of_encodings():
    rows = [[None, 0, 0, 1, None], [None, 0, None, None, None]]
    encodings = [SimpleNamespace(word_ids=row) for row in rows]
    expected = [[-1, 0, 0, 1, -1], [-1, 0, -1, -1, -1]]
    assert words_of(encodings).tolist() == expected
    for ids in (torch.zeros(2, 5), [[0] * 5, [0] * 5]):

        class Batch(dict):
            def word_ids(self, at):
                return rows[at]

        assert words_of(Batch(input_ids=ids)).tolist() == expected
    assert words_of(Batch(input_ids=[0] * 5)).tolist() == expected[:1]
    with pytest.raises(TypeError, match="encoding: got int"):
        words_of(3)



@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"model": 3}, TypeError, "model: got int"),
        ({"inputs": torch.zeros(1)}, TypeError, "inputs: got Tensor"),
        ({"method": "lrp"}, ValueError, "method: got 'lrp', expected one of attnlrp"),
        ({"steps": 0}, ValueError, "steps: got 0"),
        ({"token": 0}, ValueError, "token: got one, expected none with method='attnlrp'"),
        ({"heads": [0]}, ValueError, "heads: got one, expected none"),
        ({"baseline": 0}, ValueError, "baseline: got one, expected none"),
        ({"target": 3}, ValueError, r"target: got \[3, 3, 3\], expected 0 to 2"),
        ({"target": "a"}, TypeError, "target: got str"),
        ({"target": torch.zeros(2).long()}, ValueError, r"expected integers \(3,\)"),
        ({"target": lambda out: out.logits}, ValueError, r"its function returned \(3, 3\)"),
        ({"target": lambda out: 1.0}, ValueError, "its function returned float"),
        ({"target": lambda out: torch.ones(3)}, ValueError, "does not depend on the embeddings"),
        ({"embeddings": nn.Linear(1, 1)}, ValueError, "embeddings: Linear was not called"),
        ({"by": torch.zeros(2, 2).long()}, ValueError, r"by: got shape \(2, 2\)"),
        ({"by": torch.zeros(3, N)}, TypeError, "by: got torch.float32"),
        ({"by": [[0], [0, 1], [2]]}, ValueError, "by: got rows of several lengths"),
        ({"by": 3}, TypeError, "by: got int"),
        (
            {"method": "integrated_gradients", "baseline": torch.zeros(2, 2).long()},
            ValueError, r"baseline: got shape \(2, 2\), expected \(3, 9\)",
        ),
        (
            {"method": "integrated_gradients", "baseline": {"ids": 3}},
            ValueError, r"baseline: got \['ids'\], expected some of \['inputs', 'lengths'\]",
        ),
        (
            {"method": "rollout", "model": SequenceClassifier(
                EncoderConfig(**{**vars(BERT), "attention": "sdpa"}), 3).eval()},
            RuntimeError, "no attention of SequenceClassifier was recorded",
        ),
    ],
)  # fmt: skip
def test_refusals(given, error, message):
    arguments = {
        "model": classifier(BERT), "inputs": {**batch_of(BERT), "lengths": LENGTHS}, "target": 1,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        clinattn.attribute(**{**arguments, **given})


def test_a_model_in_training_and_one_without_embeddings_are_refused():
    with pytest.raises(ValueError, match="model: got one in training mode"):
        clinattn.attribute(SequenceClassifier(BERT, 3), {}, 1)
    with pytest.raises(ValueError, match="embeddings: got None, and Linear does not tell"):
        clinattn.attribute(nn.Linear(2, 2).eval(), {}, 1)
    with pytest.raises(ValueError, match="target: got an index, and the model returned"):
        clinattn.attribute(Encoder(BERT).eval(), batch_of(BERT), 1)
