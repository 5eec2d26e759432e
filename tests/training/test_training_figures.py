"""The figures of training beside the model: decay, learning rate and AUROC."""

from __future__ import annotations

import pytest
import torch

from clinattn.training.metrics import auroc
from clinattn.training.optimiser import FLOOR, adamw, learning_rate


def test_norms_and_biases_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    matrices, vectors = adamw(model, 0.25).param_groups
    assert [p.shape for p in matrices["params"]] == [(4, 3)] and matrices["weight_decay"] == 0.25
    assert len(vectors["params"]) == 3 and vectors["weight_decay"] == 0


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine():
    rates = [learning_rate(step, 101, 0.2, 2.0) for step in range(101)]
    assert rates[:20] == pytest.approx([2.0 * (i + 1) / 20 for i in range(20)])
    assert rates[20] == pytest.approx(2.0) and rates[100] == pytest.approx(2.0 * FLOOR)
    assert rates[60] == pytest.approx(2.0 * (1 + FLOOR) / 2)
    assert all(a > b for a, b in zip(rates[20:], rates[21:], strict=False))
    assert learning_rate(0, 1, 0.0, 2.0) == 2.0 and learning_rate(0, 1, 1.0, 2.0) == 2.0


def test_auroc_is_the_share_of_pairs_in_order():
    scores = torch.randint(0, 6, (200,)).float()
    positive = torch.rand(200) < 0.3
    above = (scores[positive][:, None] > scores[~positive]).double()
    ties = (scores[positive][:, None] == scores[~positive]).double()
    assert auroc(scores, positive) == pytest.approx(float((above + ties / 2).mean()), rel=1e-12)
    assert auroc(scores, scores > 2) == 1 and auroc(-scores, scores > 2) == 0
    assert auroc(torch.zeros(4), torch.tensor([True, False, True, False])) == 0.5
    assert auroc(scores, scores > 9) is None
