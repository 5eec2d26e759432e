"""Figures of predictions of one of several classes, and of numbers, of weighted rows."""

from __future__ import annotations

import numpy as np

from clinattn.tools.evaluation.ranking import Ranking, area_under_roc, over
from clinattn.tools.evaluation.recalibration import NEAREST


class Classes:
    """Measures rows of several classes under weights.

    truth, decided: (N,) class numbers. scores: (N, C) probabilities. Only classes that occur among
    the rows count in the mean of areas, and those without which nothing is ranked do not.
    """

    def __init__(self, truth: np.ndarray, scores: np.ndarray, decided: np.ndarray):
        self.truth, self.scores = truth, scores
        own = scores[np.arange(len(truth)), truth].clip(NEAREST, 1)
        self.counted = np.stack((truth == decided, -np.log(own)), 1).astype(float)
        self.present = [c for c in range(scores.shape[1]) if 0 < (truth == c).sum() < len(truth)]
        self.rankings = {c: Ranking.of(scores[:, c]) for c in self.present}

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """weights: (R, N). Returns figures (R,), and `auroc_of` (R, classes), NaN for none."""
        rows = weights.sum(1)
        right, loss = (weights @ self.counted).T
        areas = np.full((len(weights), self.scores.shape[1]), np.nan)
        for c, ranking in self.rankings.items():
            ranked = weights[:, ranking.order]
            positive = ranking.sums(ranked * (self.truth[ranking.order] == c))
            negative = ranking.sums(ranked) - positive
            areas[:, c] = area_under_roc(positive, negative, positive.cumsum(1))
        none = np.full(len(weights), np.nan)
        return {
            "auroc": areas[:, self.present].mean(1) if self.present else none,
            "accuracy": over(right, rows),
            "log_loss": over(loss, rows),
            "auroc_of": areas,
        }


def of_frequencies(truth: np.ndarray) -> dict[str, float]:
    """Figures of a model that always says how frequent each class is."""
    share = np.bincount(truth) / len(truth)
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    return {"auroc": 0.5, "accuracy": float(share.max()), "log_loss": float(entropy)}


class Numbers:
    """Measures predicted numbers under weights. truth, predicted: (N,) fp64."""

    def __init__(self, truth: np.ndarray, predicted: np.ndarray):
        error, centred = predicted - truth, truth - truth.mean()
        self.counted = np.stack((np.abs(error), error**2, centred, centred**2), 1)

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """weights: (R, N). Returns figures (R,)."""
        rows = weights.sum(1)
        off, squares, first, second = (weights @ self.counted).T / rows
        spread = np.maximum(second - first**2, 0)
        return {"mae": off, "rmse": np.sqrt(squares), "r2": 1 - over(squares, spread)}


def of_mean(truth: np.ndarray) -> dict[str, float]:
    """Figures of a model that always says the mean."""
    off = truth - truth.mean()
    return {
        "mae": float(np.abs(off).mean()),
        "rmse": float(np.sqrt((off**2).mean())),
        "r2": 0.0,
    }
