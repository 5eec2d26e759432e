"""Draws the encoder's rows of a GPU as `clinattn bench` draws its own.

    python bench/gpu/plot.py bench/results/gpu-nvidia-h200-2026-11-27-second.jsonl docs/gpu.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

from clinattn.tools.benchmark.variants import VARIANTS
from clinattn.tools.report import plots

WAYS = [variant.name for variant in VARIANTS]


def result_of(path: Path) -> dict[str, Any]:
    """The rows of a run in the form of `clinattn bench`."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    (facts,) = (row for row in rows if row["stage"] == "environment")
    of_encoder = [row for row in rows if row["stage"] == "encoder"]
    preset, _, source = of_encoder[0]["case"].partition(", ")
    source, _, longest = source.removesuffix(" tokens").partition(" up to ")
    measured = [
        {
            "mode": row["mode"],
            "variant": row["provider"],
            "tokens_per_s": {
                "median": row["tokens_per_s"],
                "q1": row["tokens_per_s_low"],
                "q3": row["tokens_per_s_high"],
            },
            "preset": preset,
            "dtype": row["dtype"],
            "max_tokens": longest,
            "workload": f"{of_encoder[0]['sequences']} sequences of {source}",
        }
        for row in of_encoder
        if row.get("case") == "tokens/s" and row["provider"] in WAYS
    ]
    measured.sort(key=lambda row: (row["mode"] != "train", WAYS.index(row["variant"])))
    return {"environment": facts, "rows": measured}


def main(rows: str, target: str) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "clinattn"
    draw, _ = plots.PLOTS["throughput"]
    plots.save(draw(result_of(Path(rows))), target, "throughput")


if __name__ == "__main__":
    main(*sys.argv[1:])
