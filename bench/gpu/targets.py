"""Stage of run.py that holds the rows of the run against what is wanted of an H100 or H200.

A target is a floor, and a goal what is reached for beyond it. The CUDA kernels take the path of
sm_80 there; FlashAttention-2 on it reaches 322 and 370 forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu.rows import Run

Row = dict[str, Any]
# Backend, name, target, measured value, and perhaps a goal
Target = tuple[str, str, float, Any, dict[str, float]]

# TFLOP/s by (direction, dim, mask) at N 8192 in bf16: the target, and the goal where there is one.
TFLOPS: dict[str, dict[tuple[str, int, str], tuple[float, ...]]] = {
    "triton": {
        ("forward", 64, "full"): (390, 440),
        ("forward", 64, "causal"): (340,),
        ("forward", 128, "full"): (450, 540),
        ("forward", 128, "causal"): (370, 460),
        ("backward", 64, "full"): (250, 300),
        ("backward", 128, "full"): (290, 380),
    },
    "cuda": {
        ("forward", 64, "full"): (300,),
        ("forward", 128, "full"): (330,),
        ("backward", 64, "full"): (200,),
        ("backward", 128, "full"): (230,),
    },
}
# Targets of Triton's: times as fast as the best SDPA backend, which pads in all three.
PADDED, PACKED, WINDOWED = 1.0, 1.5, 5.0
LONG = 8192


def targets(run: Run) -> None:
    rows = [row for row in run.rows() if "ms" in row]
    dims = (64, 128) if not run.dryrun else (16,)
    n = LONG if not run.dryrun else 24
    for backend, name, target, measured, goal in (*rates(rows, dims, n), *ratios(rows, dims, n)):
        if backend in run.asked:
            met = None if measured is None else measured >= target
            run.row(backend=backend, case=name, target=target, measured=measured, met=met, **goal)


def rates(rows: list[Row], dims: tuple[int, ...], n: int) -> Iterator[Target]:
    speeds = only(rows, stage="speed", n=n)
    for backend, targets in TFLOPS.items():
        for (direction, dim, mask), (target, *goal) in targets.items():
            dim = dim if dim in dims else dims[0]
            found = only(speeds, backend=backend, direction=direction, dim=dim, mask=mask)
            name = f"TFLOP/s {direction} D {dim} {mask} N {n}"
            measured = found[0]["tflops"] if found else None
            yield backend, name, target, measured, dict(zip(("goal",), goal, strict=False))


def ratios(rows: list[Row], dims: tuple[int, ...], n: int) -> Iterator[Target]:
    """Yields targets on times as fast as the best SDPA backend on the same sequences."""
    notes = dict(stage="clinical", profile="note_discharge")
    dense = dict(stage="speed", mask="window128", n=n)
    for name, provider, place, target in (
        ("padded note_discharge", "clinattn-triton-mask", notes, PADDED),
        ("packed note_discharge", "clinattn-triton-packed", notes, PACKED),
        (f"window 128 at N {n}", "clinattn-triton", dense, WINDOWED),
    ):
        for dim in dims:
            for direction in ("forward", "backward"):
                here = only(rows, direction=direction, dim=dim, **place)
                ours = only(here, provider=provider)
                best = min(
                    (row["ms"] for row in here if row["provider"].startswith("sdpa")), default=None
                )
                ratio = best / ours[0]["ms"] if ours and best else None
                yield "triton", f"ratio {name} D {dim} {direction}", target, ratio, {}


def only(rows: list[Row], **fields: Any) -> list[Row]:
    return [row for row in rows if all(row.get(x) == y for x, y in fields.items())]
