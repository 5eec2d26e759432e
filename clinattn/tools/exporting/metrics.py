"""Figures of a run beside its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(checkpoint: Path, step: int) -> dict[str, Any]:
    """Figures of the last evaluation up to this step, of metrics.jsonl beside a checkpoint."""
    path = checkpoint.with_name("metrics.jsonl")
    found: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:  # a torn last line
            continue
        if isinstance(row, dict) and row.get("split") != "train" and row.get("step", 0) <= step:
            found = {k: x for k, x in row.items() if isinstance(x, (int, float, str))}
    return found
