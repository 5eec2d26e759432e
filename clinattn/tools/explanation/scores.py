"""Scores of a case's units by a method, and how far two methods agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from clinattn.explain import attribute
from clinattn.tools.explanation.case import Case

Numbers = Sequence[float]


def contrast(case: Case, target: int) -> Callable[[Any], Tensor]:
    """The number that is explained: the class's logit, less the mean of the other classes'.

    Softmax does not depend on what all logits have in common. The logit alone, where each class
    has a probability for itself.
    """
    others = [i for i in range(len(case.model.classes)) if i != target]

    def of(out: Any) -> Tensor:
        logits = out.logits
        if case.model.independent:
            return logits[:, target]
        return logits[:, target] - logits[:, others].mean(-1)

    return of


def shares(case: Case, target: int, method: str) -> list[float]:
    """The score of each unit, as a share of the sum of their absolute values.

    Sub-words are summed to words. What [CLS] and its like have is left out.
    """
    model = case.model
    extra = {"baseline": model.baseline} if method == "integrated_gradients" else {}
    by = case.of_token[None]
    scores = attribute(model.module, model.inputs, contrast(case, target), method, by=by, **extra)
    found = scores[0].double().cpu()
    total = float(found.abs().sum())
    return [x / total if total else 0.0 for x in found.tolist()]


def ranked(scores: Numbers) -> list[int]:
    """Units from the strongest to the weakest, whichever way it speaks; ties in their order."""
    return sorted(range(len(scores)), key=lambda i: (-abs(scores[i]), i))


def in_favour(scores: Numbers) -> list[int]:
    """Units from what speaks most for the class to what speaks most against it."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def overlap(one: Numbers, other: Numbers, top: int) -> int:
    """Returns the number of units that are among the `top` strongest by both scores."""
    return len({*ranked(one)[:top]} & {*ranked(other)[:top]})


def rank_correlation(one: Numbers, other: Numbers) -> float | None:
    """Spearman's: the correlation of ranks, equal scores sharing theirs; None for a constant."""
    a, b = (_ranks(x) for x in (one, other))
    spread = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / spread if spread else None


def _ranks(scores: Numbers) -> np.ndarray:
    """Ranks less their mean, fp64."""
    _, number, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = count.cumsum() - (count + 1) / 2
    return rank[number] - rank[number].mean()
