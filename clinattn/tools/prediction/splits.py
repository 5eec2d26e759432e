"""Splits, until workloads has them."""

from __future__ import annotations

import numpy as np

from clinattn.workloads.source import Source

TRAIN, HELD_OUT, ALL = "train", "held_out", "all"


def chosen_split(source: Source, split: str, share: float) -> np.ndarray:
    """(S,) bool: the sequences of a split."""
    held_out = source.held_out(share)
    known = {TRAIN: ~held_out, HELD_OUT: held_out, ALL: np.ones(len(source), dtype=bool)}
    if split not in known:
        raise ValueError(f"split={split!r}: expected one of {sorted(known)}")
    if not known[split].any():
        raise ValueError(f"split={split!r}: {source.where} has no sequence in it")
    return known[split]
