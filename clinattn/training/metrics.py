"""Numbers of a run: a JSONL file of them, and how well scores order two classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor


def auroc(scores: Tensor, positive: Tensor) -> float | None:
    """The chance that a positive scores above a negative, ties counting half; None without both.

    scores (N,), positive (N,) bool. Mann and Whitney (1947), exact, from average ranks.
    """
    _, at, counts = scores.double().unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[at]
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if not ones or not zeros:
        return None
    return (float(ranks[positive].sum()) - ones * (ones + 1) / 2) / (ones * zeros)


class MetricsFile:
    """One JSON object a line; a run that goes on from `step` forgets what came after it."""

    def __init__(self, path: Path, step: int):
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _before(line, step)]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _before(line: str, step: int) -> bool:
    """Training rows up to `step`; its evaluation comes again. A torn last line is dropped."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return False
    return row["step"] < step or (row["step"] == step and row["split"] == "train")
