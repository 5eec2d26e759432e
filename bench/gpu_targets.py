"""Stage of gpu.py that holds the rows of the run against what is wanted of an H100 or H200."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu import Run

Row = dict[str, Any]

# TFLOP/s by (direction, dim, mask) at N 8192 in bf16.
TFLOPS = {
    ("forward", 64, "full"): 400,
    ("forward", 64, "causal"): 370,
    ("forward", 128, "full"): 470,
    ("forward", 128, "causal"): 400,
    ("backward", 64, "full"): 290,
    ("backward", 128, "full"): 340,
}
# Times as fast as the best SDPA backend, which pads in all of them.
PADDED, PACKED, WINDOWED = 1.0, 1.5, 5.0
LONG = 8192


def targets(run: Run) -> None:
    rows = [row for row in run.rows() if "ms" in row]
    dims = (64, 128) if not run.dryrun else (16,)
    n = LONG if not run.dryrun else 24
    for name, target, measured in (*rates(rows, dims, n), *ratios(rows, dims, n)):
        met = None if measured is None else measured >= target
        run.row(case=name, target=target, measured=measured, met=met)


def rates(rows: list[Row], dims: tuple[int, ...], n: int) -> Iterator[tuple[str, float, Any]]:
    for (direction, dim, mask), target in TFLOPS.items():
        dim = dim if dim in dims else dims[0]
        found = only(
            rows, stage="speed", provider="clinattn", direction=direction, n=n, dim=dim, mask=mask
        )
        name = f"TFLOP/s {direction} D {dim} {mask} N {n}"
        yield name, target, found[0]["tflops"] if found else None


def ratios(rows: list[Row], dims: tuple[int, ...], n: int) -> Iterator[tuple[str, float, Any]]:
    """How many times as fast as the best SDPA backend on the same sequences."""
    notes = dict(stage="clinical", profile="note_discharge")
    dense = dict(stage="speed", mask="window128", n=n)
    for name, provider, place, target in (
        ("padded note_discharge", "clinattn-mask", notes, PADDED),
        ("packed note_discharge", "clinattn-packed", notes, PACKED),
        (f"window 128 at N {n}", "clinattn", dense, WINDOWED),
    ):
        for dim in dims:
            for direction in ("forward", "backward"):
                here = only(rows, direction=direction, dim=dim, **place)
                ours = only(here, provider=provider)
                best = min(
                    (row["ms"] for row in here if row["provider"].startswith("sdpa")), default=None
                )
                ratio = best / ours[0]["ms"] if ours and best else None
                yield f"ratio {name} D {dim} {direction}", target, ratio


def only(rows: list[Row], **fields: Any) -> list[Row]:
    return [row for row in rows if all(row.get(x) == y for x, y in fields.items())]
