"""The heads: losses and scores of labelled tokens alone, on any layout; a batch is learnt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from encoders import CONFIGS, LENGTHS, MODERN, cu_seqlens, make_batch, pack, seeded, with_sdpa

from clinattn.encoder import CausalLanguageModel, MaskedLanguageModel, SequenceClassifier
from clinattn.encoder.packed_layout import PackedLayout


@pytest.mark.parametrize("name", ["modernbert", "bert"])
def test_masked_language_model_scores_labelled_tokens_only(name):
    model = seeded(MaskedLanguageModel, CONFIGS[name])
    ids, lengths = make_batch()
    labels = torch.full_like(ids, -100)
    labels[0, 3], labels[2, 7], labels[2, 62], labels[3, 0] = 5, 6, 7, 8
    rows: list[int] = []
    model.decoder.register_forward_hook(lambda _, args, out: rows.append(out.shape[0]))
    out = model(ids, lengths=lengths, labels=labels)
    assert rows == [4]
    everywhere = model(ids, lengths=lengths).logits
    assert everywhere.shape == (*ids.shape, MODERN.vocab_size)
    torch.testing.assert_close(out.logits, everywhere[labels != -100])
    torch.testing.assert_close(out.loss, F.cross_entropy(everywhere.mT, labels))
    for other in (
        model(ids, lengths=lengths, labels=labels, layout="padded"),
        model(pack(ids), cu_seqlens=cu_seqlens(), labels=pack(labels)),
        with_sdpa(model)(ids, lengths=lengths, labels=labels),
    ):
        torch.testing.assert_close(other.logits, out.logits)
        torch.testing.assert_close(other.loss, out.loss)


def test_nothing_labelled_gives_zero_loss_and_gradients():
    model = MaskedLanguageModel(MODERN)
    ids, lengths = make_batch()
    loss = model(ids, lengths=lengths, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_decoder_is_the_embedding():
    model = MaskedLanguageModel(MODERN)
    assert model.decoder.weight is model.encoder.embeddings.tokens.weight
    assert sum(p.shape == (101, 48) for p in model.parameters()) == 1


def test_sequence_classifier():
    model = seeded(SequenceClassifier, MODERN, 4)
    ids, lengths = make_batch()
    classes = torch.tensor([0, 3, 1, 2])
    out = model(ids, lengths=lengths, labels=classes)
    assert out.logits.shape == (4, 4)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, classes))
    for other in (
        model(ids, lengths=lengths, layout="padded"),
        model(pack(ids), cu_seqlens=cu_seqlens()),
        with_sdpa(model)(ids, lengths=lengths),
    ):
        torch.testing.assert_close(other.logits, out.logits)
        assert other.loss is None
    several = torch.rand(4, 4)
    out = model(ids, lengths=lengths, labels=several)
    torch.testing.assert_close(out.loss, F.binary_cross_entropy_with_logits(out.logits, several))
    with pytest.raises(ValueError, match=r"labels has shape \(4,\): expected \(4, 4\)"):
        model(ids, lengths=lengths, labels=several[0])
    with pytest.raises(ValueError, match="num_labels=0"):
        SequenceClassifier(MODERN, num_labels=0)


POOLS = {
    "first": lambda row: row[0],
    "last": lambda row: row[-1],
    "mean": lambda row: row.mean(0),
}


@pytest.mark.parametrize("pooling", POOLS)
@pytest.mark.parametrize("classifier", ["norm", "tanh"])
def test_classifiers_see_real_tokens_only(pooling, classifier):
    config = replace(MODERN, pooling=pooling, classifier=classifier)
    model = seeded(SequenceClassifier, config, 4).double().eval()
    ids, _ = make_batch()
    lengths = torch.tensor([0, 1, 63, 0])
    with torch.no_grad():
        pooled = [
            POOLS[pooling](model.encoder(row[None, :n])[0]) if n else torch.zeros(48).double()
            for row, n in zip(ids, lengths, strict=True)
        ]
        expected = model.classifier(model.head(torch.stack(pooled)))
    ends = torch.tensor([0, 0, 1, 64, 64], dtype=torch.int32)
    for out in (
        model(ids, lengths=lengths),
        model(ids, lengths=lengths, layout="padded"),
        model(torch.cat((ids[1, :1], ids[2])), cu_seqlens=ends),
        with_sdpa(model)(ids, lengths=lengths),
    ):
        torch.testing.assert_close(out.logits, expected)


def test_causal_language_model_never_looks_across_sequences():
    model = seeded(CausalLanguageModel, replace(MODERN, causal=True)).double()
    ids, lengths = make_batch()
    losses = []
    for row, n in zip(ids, LENGTHS, strict=True):
        logits = model(row[None, :n]).logits[0]
        losses.append(F.cross_entropy(logits[:-1], row[1:n], reduction="sum"))
    expected = sum(losses) / sum(n - 1 for n in LENGTHS)
    padded_with_99 = ids.clone()
    padded_with_99[torch.arange(63) >= lengths[:, None]] = 99  # never a target
    for out in (
        model(ids, lengths=lengths, labels=ids),
        model(padded_with_99, lengths=lengths, labels=padded_with_99, layout="padded"),
        model(pack(ids), cu_seqlens=cu_seqlens(), labels=pack(ids)),
        with_sdpa(model)(padded_with_99, lengths=lengths, labels=padded_with_99),
    ):
        assert len(out.logits) == sum(n - 1 for n in LENGTHS)
        torch.testing.assert_close(out.loss, expected)
    some = torch.full_like(ids, -100)
    some[:, 0], some[2, 5] = 7, 8  # the first of a sequence has nothing before it
    out = model(ids, lengths=lengths, labels=some)
    torch.testing.assert_close(out.logits, model(ids, lengths=lengths).logits[2, 4:5])


@pytest.mark.parametrize("ends", [[0, 0, 3, 3, 8, 8], [0, 8], [0, 1, 2, 8]], ids=str)
def test_the_next_token_is_one_of_the_same_sequence(ends):
    layout = PackedLayout(torch.tensor(ends, dtype=torch.int32), 8, 8)
    x = torch.arange(8) + 10
    following = [i + 11 if i + 1 not in ends else -1 for i in range(8)]
    assert layout.following(x, -1).tolist() == following


@pytest.mark.parametrize(
    ("head", "config", "message"),
    [
        (CausalLanguageModel, MODERN, "causal=False: expected an encoder of causal=True"),
        (
            MaskedLanguageModel,
            replace(MODERN, vocab_size=0, channels=6),
            "channels=6: a language model expects a vocabulary",
        ),
        (
            lambda config: SequenceClassifier(config, 2),
            replace(MODERN, causal=True),
            "pooling='first': a causal encoder's first token sees no other",
        ),
    ],
    ids=["not_causal", "signal", "first_of_causal"],
)
def test_heads_that_make_no_sense_are_named(head, config, message):
    with pytest.raises(ValueError, match=message):
        head(config)


@pytest.mark.parametrize("head", [MaskedLanguageModel, CausalLanguageModel])
def test_a_few_steps_learn_a_batch(head):
    model = seeded(head, replace(MODERN, causal=head is CausalLanguageModel))
    ids, lengths = make_batch()
    labels = torch.where(torch.arange(63) < lengths[:, None], ids, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(ids, lengths=lengths, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
