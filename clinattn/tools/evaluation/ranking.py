"""Figures of the order of scores, of weighted rows: AUROC and average precision, ties exact.

All arrays of weights are (R, N): R resamples of N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ranking:
    """Rows by falling score. order (N,) and, of each run of equal scores, the start (G,)."""

    order: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray) -> Ranking:
        order = np.argsort(-scores, kind="stable")
        falling = scores[order]
        return cls(order, np.flatnonzero(np.r_[True, falling[1:] != falling[:-1]]))

    def sums(self, rows: np.ndarray) -> np.ndarray:
        """(R, N) in the order of this ranking -> sums of equal scores (R, G)."""
        if len(self.starts) == rows.shape[1]:
            return rows
        return np.add.reduceat(rows, self.starts, axis=1)


def over(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divides; NaN where the denominator is 0."""
    shape = np.broadcast_shapes(numerator.shape, denominator.shape)
    return np.divide(numerator, denominator, out=np.full(shape, np.nan), where=denominator != 0)


def area_under_roc(
    positive: np.ndarray, negative: np.ndarray, at_or_above: np.ndarray
) -> np.ndarray:
    """The chance that a positive scores above a negative, ties counting half; NaN without both.

    positive, negative: (R, G) weights at each score, falling; at_or_above: the running sum of
    positive. Returns (R,). Mann and Whitney (1947); Hanley and McNeil (1982).
    """
    pairs = ((at_or_above - positive / 2) * negative).sum(1)
    return over(pairs, at_or_above[:, -1] * negative.sum(1))


def average_precision(
    positive: np.ndarray, at_or_above: np.ndarray, all_above: np.ndarray
) -> np.ndarray:
    """The mean over positives of the share of positives at or above its score; NaN without one.

    It is scikit-learn's average_precision_score. all_above: the running sum of all weights.
    Returns (R,).
    """
    precision = np.divide(
        at_or_above, all_above, out=np.zeros_like(at_or_above), where=all_above > 0
    )
    return over((positive * precision).sum(1), at_or_above[:, -1])
