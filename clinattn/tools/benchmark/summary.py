"""Parts of a run's JSON: facts about the sequences, and the ratios that matter."""

from __future__ import annotations

from typing import Any

import numpy as np

from clinattn.tools.gains import gains
from clinattn.tools.ways import way_name

from .workload import Workload

HISTOGRAM_BINS = 24


def describe(workload: Workload, lengths: list[int], max_tokens: int) -> dict[str, Any]:
    """Aggregate facts about the sequences: no single length, and no token, leaves the program."""
    edges = np.linspace(0, max_tokens, HISTOGRAM_BINS + 1)
    percent = (10, 25, 50, 75, 90)
    quantiles = np.percentile(workload.lengths, percent).tolist()
    return {
        "name": workload.source.name,
        "source": workload.source.description,
        "sequences": len(lengths),
        "available": len(workload.lengths),
        "real_tokens": sum(lengths),
        "vocab_size": len(workload.source.vocabulary),
        "unknown_share": workload.source.unknown_share(),
        "mean_length": float(workload.lengths.mean()),
        "quantiles": {f"p{p}": value for p, value in zip(percent, quantiles, strict=True)},
        "histogram": {
            "edges": edges.tolist(),
            "counts": np.histogram(workload.lengths, edges)[0].tolist(),
        },
    }


def speedups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median tokens/s of the packed run over each SDPA run, by mode."""
    return [
        {"mode": x.mode, "over": x.over, "label": way_name(x.over), "ratio": x.ratio}
        for x in gains(rows)
        if x.way == "clinattn_packed" and x.over.startswith("sdpa")
    ]
