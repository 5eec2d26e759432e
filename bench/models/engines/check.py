"""Errors of real tokens against fp32 torch on each sequence alone; NaN is looked for first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Verdict(NamedTuple):
    """not_finite: sequences with NaN or inf in a real token.

    error: root mean square of the difference over that of the truth; None with NaN.
    """

    not_finite: int
    error: float | None


def verdict(found: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> Verdict:
    """found, truth: (length, C) of each sequence. Raises ValueError where shapes differ."""
    shapes = [[x.shape for x in rows] for rows in (found, truth)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"outputs have the shapes {shapes[0]}, expected {shapes[1]}")
    not_finite = sum(not np.isfinite(x).all() for x in found)
    if not_finite:
        return Verdict(not_finite, None)
    pairs = list(zip(found, truth, strict=True))
    difference = sum(float(np.square(x - y, dtype=np.float64).sum()) for x, y in pairs)
    size = sum(float(np.square(y, dtype=np.float64).sum()) for y in truth)
    return Verdict(0, (difference / size) ** 0.5)
