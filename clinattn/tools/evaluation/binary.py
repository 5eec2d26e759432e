"""Figures of predictions of a yes or no, of weighted rows."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from clinattn.tools.evaluation.ranking import Ranking, area_under_roc, average_precision, over
from clinattn.tools.evaluation.recalibration import log_odds, recalibrate

DECISIONS = ("sensitivity", "specificity", "precision", "negative_precision", "accuracy")


class Binary:
    """Measures rows under weights.

    truth: (N,) bool. scores: (N,) fp64, or None where there are decisions alone. decided: (N,)
    bool. calibrated: the scores are probabilities. bins: groups of about equal size, by score.
    """

    def __init__(
        self,
        truth: np.ndarray,
        scores: np.ndarray | None,
        decided: np.ndarray,
        calibrated: bool,
        bins: int,
    ):
        self.truth, self.scores, self.decided = truth, scores, decided
        self.calibrated = calibrated and scores is not None
        self.bins = bins
        self.ranking = Ranking.of(decided.astype(float) if scores is None else scores)
        order = self.ranking.order
        self.yes = truth[order].astype(float)
        counted = [truth & decided, ~truth & decided, ~truth & ~decided, truth & ~decided]
        self.counted = np.stack([x[order] for x in counted], 1).astype(float)
        self.start: tuple[float, float] | None = None

    @cached_property
    def levels(self) -> np.ndarray:
        """(G,) the different scores, falling."""
        assert self.scores is not None
        return self.scores[self.ranking.order][self.ranking.starts]

    @cached_property
    def edges(self) -> np.ndarray:
        """(B,) for each bin the index of its first level; equal scores share a bin."""
        rows, starts = len(self.truth), self.ranking.starts
        wanted = np.arange(self.bins) * rows / self.bins
        return np.unique(np.searchsorted(starts, wanted).clip(max=len(starts) - 1))

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """weights: (R, N). Returns figures (R,), and of the bins `observed` (R, bins)."""
        weights = weights[:, self.ranking.order]
        found = _decisions(weights @ self.counted)
        if self.scores is None:
            return found
        positive = self.ranking.sums(weights * self.yes)
        total = self.ranking.sums(weights)
        negative = total - positive
        above, all_above = positive.cumsum(1), total.cumsum(1)
        found["auroc"] = area_under_roc(positive, negative, above)
        found["auprc"] = average_precision(positive, above, all_above)
        if self.calibrated:
            found |= self._calibration(positive, negative, total)
        return found

    def _calibration(
        self, positive: np.ndarray, negative: np.ndarray, total: np.ndarray
    ) -> dict[str, np.ndarray]:
        p, rows = self.levels, total.sum(1)
        expected = np.add.reduceat(total * p, self.edges, axis=1)
        observed = np.add.reduceat(positive, self.edges, axis=1)
        intercept, slope = recalibrate(log_odds(p), positive, negative, self.start)
        if self.start is None and np.isfinite(slope[0]):
            self.start = float(intercept[0]), float(slope[0])
        squares = positive @ (1 - p) ** 2 + negative @ p**2
        return {
            "brier": over(squares, rows),
            "calibration_error": over(np.abs(observed - expected).sum(1), rows),
            "observed_over_expected": over(observed.sum(1), expected.sum(1)),
            "intercept": intercept,
            "slope": slope,
            "observed": over(observed, np.add.reduceat(total, self.edges, axis=1)),
        }

    def reliability(self) -> list[dict[str, float]]:
        """The bins by rising probability: from, to, rows, mean prediction, share observed."""
        order, ends = self.ranking.order, np.r_[self.ranking.starts, len(self.truth)]
        assert self.scores is not None
        bounds = np.r_[ends[self.edges], len(self.truth)]
        found = []
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            p, yes = self.scores[order[start:end]], self.truth[order[start:end]]
            found.append(
                {
                    "from": float(p[-1]),
                    "to": float(p[0]),
                    "rows": int(end - start),
                    "predicted": float(p.mean()),
                    "observed": float(yes.mean()),
                }
            )
        return found[::-1]

    def roc(self, most: int = 100) -> list[list[float]]:
        """Points (1 - specificity, sensitivity) from 0 0 to 1 1, at most so many and the ends."""
        positive = self.ranking.sums(self.yes[None])[0].cumsum()
        negative = self.ranking.sums(1 - self.yes[None])[0].cumsum()
        if not positive[-1] or not negative[-1]:
            return []
        x, y = np.r_[0, negative / negative[-1]], np.r_[0, positive / positive[-1]]
        kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), most)).round().astype(int))
        return [[float(x[i]), float(y[i])] for i in kept]


def _decisions(counts: np.ndarray) -> dict[str, np.ndarray]:
    """counts: (R, 4) true yes, false yes, true no, false no."""
    true_yes, false_yes, true_no, false_no = counts.T
    found = (
        over(true_yes, true_yes + false_no),
        over(true_no, true_no + false_yes),
        over(true_yes, true_yes + false_yes),
        over(true_no, true_no + false_no),
        over(true_yes + true_no, counts.sum(1)),
    )
    return dict(zip(DECISIONS, found, strict=True))


def of_prevalence(prevalence: float) -> dict[str, float]:
    """Figures of a model that always says the prevalence."""
    return {"auroc": 0.5, "auprc": prevalence, "brier": prevalence * (1 - prevalence)}
