"""Numbers of a run: a JSONL file of them, and how well scores order two classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from clinattn.files.disk import naming, parse_json, written_whole
from clinattn.files.shapes import COUNT, TEXT, Named, require

ROW = Named({"step": COUNT, "split": TEXT})


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
    """Metrics as JSON, an object a line; a run resumed from `step` drops the lines of later steps.

    Raises ValueError for a file of something else.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        lines = path.read_bytes().splitlines() if path.exists() else []
        kept = [line for i, line in enumerate(lines) if self._before(step, i, len(lines), line)]
        with written_whole(path) as partial:
            partial.write_bytes(b"".join(line + b"\n" for line in kept))

    def write(self, row: dict[str, Any]) -> None:
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _before(self, step: int, number: int, lines: int, line: bytes) -> bool:
        """Training rows up to `step`; its evaluation comes again. A torn last line is dropped."""
        try:
            row = parse_json(line)
            require(row, ROW)
        except ValueError as error:
            if number + 1 == lines:
                return False
            raise ValueError(f"{self.path} line {number + 1}: {error}") from None
        return row["step"] < step or (row["step"] == step and row["split"] == "train")
