"""Logistic recalibration of weighted rows: the line that turns their log odds into the right ones.

The outcome's log odds are intercept + slope * log odds of the prediction (Cox, 1958): 0 and 1 for
a calibrated model; a slope below 1 is one of predictions that are too extreme.
"""

from __future__ import annotations

import numpy as np

NEAREST = 2.0**-24  # to 0 and 1: the rounding of fp32, in which probabilities are kept
STEPS = 40  # of Newton's method
SMALL = 1e-10  # step at which it ends


def log_odds(probability: np.ndarray) -> np.ndarray:
    """Finite: probabilities of 0 and 1 are taken as NEAREST to them."""
    inside = probability.clip(NEAREST, 1 - NEAREST)
    return np.log(inside) - np.log1p(-inside)


def recalibrate(
    x: np.ndarray, positive: np.ndarray, negative: np.ndarray, start: tuple[float, float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Intercepts and slopes (R,) of the largest likelihood; NaN where none is finite.

    x: (G,) log odds, falling. positive, negative: (R, G) weights there. start: of the search, or
    None for the line of the weights' own prevalence.
    """
    found = np.full((len(positive), 2), np.nan)
    todo = np.flatnonzero(~separated(positive, negative))
    total = positive + negative
    if start is None:
        with np.errstate(divide="ignore"):
            prevalence = np.log(positive.sum(1)) - np.log(negative.sum(1))
        line = np.stack((prevalence, np.zeros(len(positive))), 1)
    else:
        line = np.tile(start, (len(positive), 1))
    for _ in range(STEPS):
        if not len(todo):
            break
        chosen = slice(None) if len(todo) == len(positive) else todo
        step = _step(x, positive[chosen], total[chosen], line[chosen])
        line[todo] += step
        size = np.abs(step).max(1)
        ended = size <= SMALL * (1 + np.abs(line[todo]).max(1))
        found[todo[ended]] = line[todo[ended]]
        todo = todo[~ended & np.isfinite(size)]
    return found[:, 0], found[:, 1]


def _step(x: np.ndarray, positive: np.ndarray, total: np.ndarray, line: np.ndarray) -> np.ndarray:
    """Newton's step (R, 2) from lines (R, 2), at most 4 of log odds long at any x."""
    with np.errstate(over="ignore"):
        share = 1 / (1 + np.exp(-(line[:, :1] + line[:, 1:] * x)))
    rest = positive - total * share
    spread = total * share
    spread *= 1 - share
    first, second = rest.sum(1), rest @ x
    a, b, c = spread.sum(1), spread @ x, spread @ (x * x)
    with np.errstate(all="ignore"):
        step = np.stack((c * first - b * second, a * second - b * first), 1)
        step /= (a * c - b * b)[:, None]
        reach = np.maximum(np.abs(step[:, 0] + step[:, 1] * x[0]), np.abs(step @ (1, x[-1])))
        return step * np.minimum(1, 4 / np.maximum(reach, 4))[:, None]


def separated(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """(R,) bool: a score parts the classes, or one is absent, so that no finite line is best."""

    def first(weights: np.ndarray) -> np.ndarray:
        return (weights > 0).argmax(1)

    def last(weights: np.ndarray) -> np.ndarray:
        return weights.shape[1] - 1 - first(weights[:, ::-1])

    one_class = ~((positive > 0).any(1) & (negative > 0).any(1))
    in_order = last(positive) <= first(negative)
    in_reverse = last(negative) <= first(positive)
    return one_class | in_order | in_reverse
