"""Deletion curves: the probability of the class when the strongest units are taken away.

An explanation that is true of the model makes it fall more than random removals do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from clinattn.tools.explanation.case import Case, Progress
from clinattn.tools.explanation.scores import Numbers, in_favour
from clinattn.tools.explanation.settings import METHODS

SHARES = (1, 2, 5, 10, 20, 50)  # percent of the units
SAID = 5  # of these, what the conclusion is about
VISIBLE = 0.01  # a mean change of the probability that says something
AT_ONCE = 16  # removals between two signs of progress


def counts(units: int) -> list[int]:
    """Returns the number of units that each of SHARES is, at least one."""
    return [max(1, round(units * share / 100)) for share in SHARES]


def deletion(
    case: Case,
    target: int,
    scores: Mapping[str, Numbers],
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


class Verdict(NamedTuple):
    """The judgement of removals on a method, and a sentence.

    true: None where removals say nothing.
    """

    true: bool | None
    text: str


def verdict(curve: dict[str, Any], method: str, whole: float) -> Verdict:
    """Compares the mean of a method's curve with those of the random draws.

    whole: the probability with nothing removed.
    """
    drawn = [mean(draw) for draw in curve["random"]]
    found = mean(curve["methods"][method])
    if max(abs(x - whole) for x in (found, *drawn)) < VISIBLE:
        return Verdict(
            None,
            "Whatever is removed hardly changes it: the test cannot say whether the explanation is "
            "true, and no few decide the prediction.",
        )
    if found < min(drawn):
        return Verdict(
            True,
            "Over all shares that is lower than every random draw: here the explanation is true of "
            "the model.",
        )
    return Verdict(
        False,
        "Over all shares that is not better than random: do not rely on this explanation.",
    )


def conclusions(curve: dict[str, Any], whole: float, target: str, unit: str) -> list[str]:
    """A sentence on each method, and what to think of it."""
    at = curve["shares"].index(SAID)
    count = curve["counts"][at]
    random = [draw[at] for draw in curve["random"]]
    what = f"{SAID} % ({count:,} {unit}{'s' if count != 1 else ''})"
    before = probability(whole)
    low, middle, high = (probability(x) for x in (min(random), mean(random), max(random)))
    found = []
    for method, row in curve["methods"].items():
        speak, are = ("speaks", "is") if count == 1 else ("speak", "are")
        kind = f"that {speak} most for {target}"
        if not METHODS[method].signed:
            kind = f"that {are} strongest"
        after = probability(row[at])
        moves = "lowers" if row[at] < whole else "raises"
        change = f"{moves} the probability of {target} from {before} to {after}"
        if before == after:
            change = f"leaves the probability of {target} at {after}"
        found.append(
            f"{METHODS[method].title}: removing the {what} {kind} {change}; random {SAID} %: "
            f"{middle} ({low} to {high}). {verdict(curve, method, whole).text}"
        )
    return found


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def probability(x: float) -> str:
    """Three digits after the point; what rounds to 0 or 1 and is neither says so."""
    if 0 < x < 0.0005:
        return "<\u00a00.001"
    return ">\u00a00.999" if 0.9995 <= x < 1 else f"{x:.3f}"
