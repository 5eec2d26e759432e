"""The heads: losses and scores of labelled tokens alone, on any layout; a batch is learnt."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from encoders import CONFIGS, MODERN, cu_seqlens, make_batch, pack, seeded, with_sdpa

from clinattn.encoder import MaskedLanguageModel, SequenceClassifier


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


def test_a_few_steps_learn_a_batch():
    model = seeded(MaskedLanguageModel, MODERN)
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
