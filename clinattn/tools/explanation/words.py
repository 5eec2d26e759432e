"""Sentences and numbers of an explanation, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clinattn.tools.explanation.deletion import probability, verdict
from clinattn.tools.explanation.scores import in_favour, ranked
from clinattn.tools.explanation.settings import METHODS

Record = dict[str, Any]
SPACE, MINUS = "\u00a0", "\u2212"  # a space without a line break
NAMED = 3  # units in the conclusion
LEAST = 0.0005  # a share that is shown as more than 0.0 %


def label(unit: Record) -> str:
    """Returns the name of an event or word: the meaning of its code, where known, and its value."""
    name = unit["description"] or unit["name"]
    return f"{name} = {unit['value']}" if unit["value"] else str(name)


def percent(share: float, method: str) -> str:
    """A share in percent, with its sign where the method has one."""
    if abs(share) < LEAST:
        return f"0.0{SPACE}%"
    text = f"{100 * share:{'+' if METHODS[method].signed else ''}.1f}{SPACE}%"
    return text.replace("-", MINUS)


def shown_shares(scores: Sequence[float], record: Record) -> list[str]:
    """The shares that the methods of a record give to an event, word or visit."""
    return [percent(x, method) for x, method in zip(scores, record["methods"], strict=True)]


def several(count: int, unit: str) -> str:
    return f"{count:,} {unit}{'' if count == 1 else 's'}"


def scores_of(record: Record, column: int) -> list[float]:
    return [unit["scores"][column] for unit in record["units"]]


def conclusion(record: Record) -> str:
    """The prediction, what speaks most for and against it, and whether removals bear that out."""
    method, scores = record["methods"][0], scores_of(record, 0)

    def named(order: Sequence[int], sign: int) -> str:
        chosen = [i for i in order if sign * scores[i] >= LEAST][:NAMED]
        texts = [f"{label(record['units'][i])} ({percent(scores[i], method)})" for i in chosen]
        return ", ".join(texts) or "nothing"

    said = f"Probability of {record['target']}: {probability(record['probability'])}."
    if METHODS[method].signed:
        order = in_favour(scores)
        said += f" Most in favour: {named(order, 1)}. Most against: {named(order[::-1], -1)}."
    else:
        said += f" Strongest: {named(ranked(scores), 1)}."
    title, true = METHODS[method].title, verdict(record["deletion"], method, record["probability"])
    if true.true is None:
        return f"{said} Removing {record['unit']}s hardly changes the prediction: no few decide it."
    if true.true:
        return f"{said} Removing what {title} names changes the prediction more than chance does."
    return f"{said} Removing what {title} names does no more than chance: do not rely on it."


def agreement(record: Record) -> str:
    """Returns a sentence on how far the two methods agree."""
    one, other = (METHODS[method].title for method in record["methods"])
    found = record["agreement"]
    correlation = found["rank_correlation"]
    ranks = "not defined" if correlation is None else f"{correlation:.2f}".replace("-", MINUS)
    return (
        f"{one} and {other}: {found['shared']} of the {found['top']} strongest "
        f"{record['unit']}s are the same; rank correlation over all {ranks}."
    )


def ranks(scores: Sequence[float]) -> dict[int, int]:
    return {unit: rank for rank, unit in enumerate(ranked(scores), 1)}
