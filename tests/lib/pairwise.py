"""Few combinations of many parameters in which every pair of values occurs together.

    @pytest.mark.parametrize("n, dtype, window", pairwise(SIZES, DTYPES, WINDOWS))
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


def pairwise(*values: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Greedily, the same list at every run: the combination with most new pairs is next."""
    every = list(itertools.product(*(range(len(x)) for x in values)))
    pairs = lambda row: set(itertools.combinations(enumerate(row), 2))
    missing = set().union(*map(pairs, every))
    chosen = []
    while missing:
        best = max(every, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        chosen.append(tuple(x[i] for x, i in zip(values, best, strict=True)))
    return chosen
