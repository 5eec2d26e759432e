"""Last stage of run.py: whether this run verifies a backend on this card, and what to do then."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from gpu.rows import Run

# Each has to have run, with nothing failed and nothing left out. They fit in one run for a backend:
# run.py --backends cuda build numerics numerics_rest shapes bits race summaries capture sync
# sanitizer verification
NEEDED = (
    *("numerics", "numerics_rest", "shapes", "bits", "race", "summaries", "capture", "sync"),
    "sanitizer",
)


def verification(run: Run) -> None:
    """clinattn.backends() says of the CUDA kernels how far they were verified; a run decides."""
    rows = run.rows()
    for backend in run.asked:
        against = list(reasons_against(backend, rows))
        fields: dict[str, Any] = {"against": against} if against else {}
        if backend == "cuda" and not against and not run.dryrun:
            major, minor = torch.cuda.get_device_capability(run.device)
            fields["next"] = (
                f"commit {run.path.name} and add ({major}, {minor}) to VERIFIED in "
                "clinattn/backends/cuda.py"
            )
        run.row(case="verified by this run", backend=backend, met=not against, **fields)


def reasons_against(backend: str, rows: list[dict[str, Any]]) -> list[str]:
    """Rows without a backend are about all of them."""
    mine = [row for row in rows if row.get("backend", backend) == backend]
    failed = Counter(row["stage"] for row in mine if row.get("ok") is False)
    skipped = Counter(row["stage"] for row in mine if "skipped" in row)
    unseen = Counter[str]()
    for row in mine:
        if row["stage"] == "sanitizer" and row.get("tool") != "none":
            unseen[row.get("tool", "")] += row.get("of", 0) - row.get("problems", 0)
    passed = {row["stage"] for row in mine if row.get("ok") is True or row.get("passed")}
    return [
        *(f"{stage}: {n} failed" for stage, n in failed.items()),
        *(f"{stage}: {skipped[stage]} left out" for stage in NEEDED if skipped[stage]),
        *(f"{stage}: did not run" for stage in NEEDED if stage not in passed),
        *(f"sanitizer: {n} problems out of time for {tool}" for tool, n in unseen.items() if n),
    ]
