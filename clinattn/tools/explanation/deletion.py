"""Deletion curves: the probability of the class when the strongest units are taken away.

An explanation that is true of the model makes it fall more than random removals do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from clinattn.tools.explanation.case import Case, Progress
from clinattn.tools.explanation.scores import Numbers, in_favour
from clinattn.tools.explanation.settings import METHODS

SHARES = (1, 2, 5, 10, 20, 50)  # percent of the units
SAID = 5  # of these, what the conclusion is about
AT_ONCE = 16  # removals between two signs of progress


def counts(units: int) -> list[int]:
    """How many units each of SHARES is, at least one."""
    return [max(1, round(units * share / 100)) for share in SHARES]


def deletion(
    case: Case,
    target: int,
    scores: dict[str, Numbers],
    draws: int,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """The probabilities of the target class with units removed, by method and at random.

    What speaks most for the class goes first. random: (draws, shares); a draw is one order of the
    units, of which more and more go.
    """
    units = len(case.units)
    orders = [in_favour(x) for x in scores.values()]
    generator = torch.Generator().manual_seed(seed)
    orders += [torch.randperm(units, generator=generator).tolist() for _ in range(draws)]
    kept = [
        case.without(torch.tensor(order[:count])) for order in orders for count in counts(units)
    ]
    found: list[float] = []
    for start in range(0, len(kept), AT_ONCE):
        progress(f"remove: {start} of {len(kept)}", start, len(kept))
        logits = case.model.logits(kept[start : start + AT_ONCE])
        found += case.probabilities(logits)[:, target].tolist()
    rows = [found[i : i + len(SHARES)] for i in range(0, len(found), len(SHARES))]
    return {
        "shares": list(SHARES),
        "counts": counts(units),
        "methods": dict(zip(scores, rows, strict=False)),
        "random": rows[len(scores) :],
        "seed": seed,
    }


def better_than_random(curve: dict[str, Any], method: str) -> bool:
    """The mean of the method's curve is below that of every random draw."""
    return sum(curve["methods"][method]) < min(sum(draw) for draw in curve["random"])


def conclusions(curve: dict[str, Any], whole: float, target: str, unit: str) -> list[str]:
    """A sentence on each method, and what to think of it."""
    at = curve["shares"].index(SAID)
    count = curve["counts"][at]
    random = [draw[at] for draw in curve["random"]]
    what = f"{SAID} % ({count:,} {unit}{'s' if count != 1 else ''})"
    found = []
    for method, row in curve["methods"].items():
        before, after = probability(whole), probability(row[at])
        moves = "lowers" if row[at] < whole else "raises"
        change = f"{moves} its probability from {before} to {after}"
        if before == after:
            change = f"leaves its probability at {after}"
        verdict = (
            "Over all shares it lowers it more than each of the random draws: it is true of the "
            "model for this prediction."
            if better_than_random(curve, method)
            else "Over all shares that is not better than random: do not rely on this explanation."
        )
        found.append(
            f"{METHODS[method].title}: removing the {what} that speak most for {target} {change}; "
            f"random {SAID} %: {probability(mean(random))} ({probability(min(random))} to "
            f"{probability(max(random))}). {verdict}"
        )
    return found


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def probability(x: float) -> str:
    """Three digits after the point; what rounds to 0 or 1 and is neither says so."""
    if 0 < x < 0.0005:
        return "< 0.001"
    return "> 0.999" if 0.9995 <= x < 1 else f"{x:.3f}"
