"""Percentile intervals of the bootstrap (Efron, 1979), which draws patients and not rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
CHUNK = 1 << 19  # weights at once
# An interval of which fewer resamples have the figure is none.
LEAST_DEFINED = 0.5

Measure = Callable[[np.ndarray], dict[str, np.ndarray]]


class Interval(NamedTuple):
    """value: of the rows themselves. undefined: the resamples in which the figure has none.

    All but `undefined` are NaN where there is none; arrays where the figure is one.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    undefined: np.ndarray


def intervals(
    measure: Measure, patient: np.ndarray, resamples: int, seed: int, tick: Callable[[float], None]
) -> dict[str, Interval]:
    """Each figure of `measure` with its interval.

    patient: (N,) numbers from 0 of the patients, whose rows are drawn together. tick: gets the
    share that is done.
    """
    measured = {name: x[0] for name, x in measure(np.ones((1, len(patient)))).items()}
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in measured}
    done = 0
    for weights in weights_of(patient, resamples, seed):
        for name, x in measure(weights).items():
            drawn[name].append(x)
        done += len(weights)
        tick(done / resamples)
    return {name: _interval(x, np.concatenate(drawn[name])) for name, x in measured.items()}


def weights_of(patient: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields weights (R, N), how often each row's patient was drawn, of all resamples."""
    rng = np.random.default_rng(seed)
    patients, size = int(patient.max()) + 1, max(1, CHUNK // len(patient))
    for first in range(0, resamples, size):
        counts = [
            np.bincount(rng.integers(0, patients, patients), minlength=patients)
            for _ in range(first, min(first + size, resamples))
        ]
        yield np.stack(counts).astype(float)[:, patient]


def _interval(value: np.ndarray, drawn: np.ndarray) -> Interval:
    """drawn: (R,) or (R, K)."""
    missing = np.isnan(drawn)
    undefined = missing.sum(0)
    bounds = np.full((2, *value.shape), np.nan)
    enough = ~np.isnan(value) & (undefined <= (1 - LEAST_DEFINED) * len(drawn))
    tails = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    if value.ndim == 0:
        if enough:
            bounds[:] = np.quantile(drawn[~missing], tails)
    else:
        for k in np.flatnonzero(enough):
            bounds[:, k] = np.quantile(drawn[~missing[:, k], k], tails)
    return Interval(value, bounds[0], bounds[1], undefined)
