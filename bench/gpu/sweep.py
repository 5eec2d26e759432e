"""Stage of run.py that looks for better rows of kernels/configs.py: run.py --tune.

The shapes of the CUDA kernels, in csrc/cuda/shapes.h, are compiled in and not swept here.

Candidates are compiled first, in all processes at once; what spills is dropped. The rest runs, is
held against the result of the shipped tile, and is timed on full and causal attention. A row of the
tables serves every mask, so the best candidate is the one with the least geometric mean.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from clinattn.backends.call import Arguments
from clinattn.kernels import backward, configs, forward, launch
from gpu.dense_shapes import WIDTH
from gpu.jobs import in_processes
from gpu.rows import Run
from gpu.tiles import MASKS, Tile, tile_of
from gpu.timing import AGREE, in_turns, relative

Job = tuple[str, int, int, Tile]  # table, bits of the type, head dim, tile

TYPES = {16: torch.bfloat16, 32: torch.float32}
ROUNDS = 3
COMPILING = 0.45  # of the time that is left


def tile_sweep(run: Run) -> None:
    if "triton" not in run.backends:
        run.row(skipped="tiles: they are those of Triton")
        return
    candidates = {key: tiles_for(*key, run) for key in keys(run)}
    if not run.dryrun:
        candidates = without_spills(candidates, run)
    best: dict[tuple[str, int, int], tuple[Tile, float]] = {}
    for (table, bits, dim), tiles in candidates.items():
        if not run.enough_time(30, f"tiles from {table} {bits} bits D {dim} on"):
            break
        best[table, bits, dim] = sweep(table, bits, dim, tiles, run)
    for line in lines_to_paste(best, launch.device_capability(run.device)):
        run.row(paste=line)


def keys(run: Run) -> Iterator[tuple[str, int, int]]:
    """(table, bits, dim), the ones that matter most first."""
    if run.dryrun:
        yield from (("forward", 16, 16), ("dkdv", 16, 16), ("dq", 32, 16))
        return
    for bits in (16, 32):
        for dim in (64, 128, 256):
            for table in configs.TABLES:
                yield table, bits, dim


def tiles_for(table: str, bits: int, dim: int, run: Run) -> list[Tile]:
    """Tiles worth compiling; D 256 and fp32 have no room for large ones."""
    if run.dryrun:
        return [(16, 16, 4, 1)]
    if bits == 32:
        m, n, stages, largest = (16, 32, 64), (16, 32, 64), (2,), 2048
    else:
        m, n = ((32, 64, 128), (32, 64, 128)) if dim == 256 else ((64, 128), (32, 64, 128))
        if table == "dkdv":
            m, n = n, m  # keys are its outer loop
        stages = (2, 3, 4) if table == "forward" else (2, 3)
        largest = 128 * 128
    if dim == 256:
        largest //= 4
    tiles = itertools.product(m, n, (4, 8), stages)
    return [tile for tile in tiles if tile[0] * tile[1] <= largest]


# Compiling


def without_spills(
    candidates: dict[tuple[str, int, int], list[Tile]], run: Run
) -> dict[tuple[str, int, int], list[Tile]]:
    """The candidates that compile and keep to their registers; these are then in Triton's cache."""
    jobs = [(*key, tile) for key, tiles in candidates.items() for tile in tiles]
    kept: dict[tuple[str, int, int], list[Tile]] = {key: [] for key in candidates}
    seconds = COMPILING * run.left()
    for row, left in in_processes("gpu.sweep:compile_job", jobs, run, seconds):
        if row is not None:
            table, bits, dim, tile = row.pop("job")
            if row["ok"] and row["local"] == 0:
                kept[table, bits, dim].append(tuple(tile))
            else:
                why = f"{row['local']} bytes of stack" if row["ok"] else row["error"][:200]
                run.row(table=table, bits=bits, dim=dim, tile=tile, dropped=why)
        if left:
            run.row(skipped=f"{len(left)} tiles that were not compiled in time")
    return kept


def compile_job(job: Job, device: str) -> dict[str, Any]:
    """Bytes of stack a thread of the kernel takes, on this device, with either mask."""
    from clinattn.tools.compiled.kernel_report import (  # not where kernels are interpreted
        kernel_reports,
    )

    table, bits, dim, tile = job
    major, minor = launch.device_capability(torch.device(device))
    local = 0
    try:
        for right in MASKS.values():
            problem = SmallProblem(1, 1, 256, dim, TYPES[bits], right, torch.device("cpu"))
            # Captured launches write nothing: what backward reads need not come from forward.
            call = problem.forward if table == "forward" else problem.backward
            with tile_of(table, tuple(tile)):
                reports = kernel_reports(call, 10 * major + minor)
            local += sum(report.local for report in reports if report.name == table)
        return {"ok": True, "local": local}
    except Exception as error:
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}


class SmallProblem:
    """Inputs of the two launchers, which are called without anything around them."""

    def __init__(
        self,
        batch: int,
        heads: int,
        n: int,
        dim: int,
        dtype: torch.dtype,
        right: int,
        device: torch.device,
    ) -> None:
        shape = (batch, heads, n, dim)
        self.q, self.k, self.v, self.do = (
            torch.randn(shape, device=device).to(dtype) for _ in range(4)
        )
        self.outputs: tuple[Tensor, ...] = (self.q, torch.zeros(shape[:3], device=device))
        self.call = Arguments(self.q, self.k, self.v, scale=dim**-0.5, window_right=right)

    def forward(self) -> tuple[Tensor, ...]:
        self.outputs = forward.attention_forward(self.call)[:2]
        return self.outputs

    def backward(self) -> tuple[Tensor, ...]:
        return backward.attention_backward(self.do, None, *self.outputs, None, self.call)[:3]


# Timing


def sweep(table: str, bits: int, dim: int, tiles: list[Tile], run: Run) -> tuple[Tile, float]:
    """The best tile and how many times as fast as the shipped one it is."""
    capability = launch.device_capability(run.device)
    shipped = configs.tile_config(table, capability, dim, TYPES[bits])
    shipped_tile = (shipped.block_m, shipped.block_n, shipped.num_warps, shipped.num_stages)
    times: dict[Tile, list[float]] = {}
    for mask, right in MASKS.items():
        # fp32 has a tenth of the speed.
        shape = (4 if bits == 16 else 1, WIDTH // dim, 4096) if not run.dryrun else (1, 1, 20)
        problem = SmallProblem(*shape, dim, TYPES[bits], right, run.device)
        expected = [x.float() for x in problem.forward()]
        call = problem.forward if table == "forward" else problem.backward
        if table != "forward":
            expected = [x.float() for x in call()]
        for tile in (shipped_tile, *(x for x in tiles if x != shipped_tile)):
            if mask != "full" and tile not in times:
                continue  # it failed without one
            fields = dict(table=table, bits=bits, dim=dim, mask=mask, tile=tile)
            if not run.enough_time(10, f"tile {fields}"):
                break
            ms = time_of(call, table, tile, expected, run, fields)
            if ms is not None:
                times.setdefault(tile, []).append(ms)
    complete = {
        tile: statistics.geometric_mean(ms) for tile, ms in times.items() if len(ms) == len(MASKS)
    }
    if shipped_tile not in complete:
        return shipped_tile, math.nan
    best = min(complete, key=lambda tile: complete[tile])
    gain = complete[shipped_tile] / complete[best]
    run.row(table=table, bits=bits, dim=dim, best=best, shipped=shipped_tile, times_as_fast=gain)
    return best, gain


def time_of(
    call: Callable[[], tuple[Tensor, ...]],
    table: str,
    tile: Tile,
    expected: list[Tensor],
    run: Run,
    fields: dict[str, Any],
) -> float | None:
    """Milliseconds of the pass with this tile; None where it does not run or is wrong.

    A tile of the backward pass is timed with the other kernel of that pass as shipped.
    """
    try:
        with tile_of(table, tile):
            results = [x.float() for x in call()]
            far = max(relative(x, y) for x, y in zip(results, expected, strict=True))
            if not far < AGREE:
                run.row(**fields, wrong=far)
                return None
            result = in_turns({"": call}, run, ROUNDS)[""]
    except Exception as error:
        run.row(**fields, not_supported=str(error)[:100])
        return None
    run.row(**fields, **result)
    return result["ms"]


def lines_to_paste(
    best: dict[tuple[str, int, int], tuple[Tile, float]], capability: tuple[int, int]
) -> list[str]:
    """Plain rows for kernels/configs.py, each with what it gains over the one it replaces."""
    lines = []
    for table, bits in dict.fromkeys((table, bits) for table, bits, _ in best):
        found = {dim: x for (a, b, dim), x in best.items() if (a, b) == (table, bits)}
        row = ", ".join(f"{dim}: Rows({tile})" for dim, (tile, _) in found.items())
        gains = ", ".join(f"{gain:.2f}" for _, gain in found.values())
        card = ".".join(map(str, capability))
        lines.append(f"{table.upper()} of {card}: {bits}: {{{row}}},  # {gains} times as fast")
    return lines
