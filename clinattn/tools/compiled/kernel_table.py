"""The table of `clinattn doctor --kernels`: what every shipped configuration compiles to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from clinattn.kernels import configs
from clinattn.tools.compiled.kernel_report import CARDS, KINDS, KernelReport, shipped_reports

COLUMNS = (
    "D", "call", "pass", "tile", "reg", "local", "shared", "blocks", "units", "matrix", "exp",
    "issue", "peak",
)  # fmt: skip
NUMBERS = {"D", "reg", "local", "shared", "blocks", "matrix", "exp", "issue", "peak"}
NOTE = """\
reg, local: registers, and bytes of stack (spills), of a thread. shared: bytes of a block. blocks:
resident on a multiprocessor. matrix, exp, issue: cycles that one full tile keeps the tensor cores
(fp32: the multiply-add lanes), the special function units and the schedulers busy. peak: the share
of the matrix units' peak that the code leaves possible; where warps wait for products, and at
barriers for each other, a block's softmax overlaps with products of other blocks alone. All of it
is counted in the compiled code; nothing was timed."""


def kernel_rows(
    cards: list[int] | None, progress: Callable[[str, int, int], None]
) -> Iterator[dict[str, Any]]:
    """Yields a dict for each kernel, compiled when drawn. cards: of 80, 90, 100; None is all.

    progress is called with what is being compiled, calls done and calls in all.
    """
    cards = cards or sorted(CARDS)
    for card in cards:
        if card not in CARDS:
            raise ValueError(f"card: got {card}, expected one of {', '.join(map(str, CARDS))}")
    calls = sum(len(rows) for card in cards for rows in configs.FORWARD[card].values()) * len(KINDS)
    done = 0
    for card in cards:
        for kind, reports in shipped_reports(card):
            done += 1
            progress(f"compiling for sm_{card}: head dim {reports[0].block_d}", done, calls)
            yield from (row(kind, report) for report in reports)


def row(kind: str, report: KernelReport) -> dict[str, Any]:
    return {
        "card": report.capability,
        "bits": 8 * report.itemsize,
        "head_dim": report.block_d,
        "call": kind,
        "pass": report.name,
        "tile": f"{report.block_m}x{report.block_n}",
        "warps": report.num_warps,
        "stages": report.num_stages,
        "registers": report.registers,
        "local": report.local,
        "shared": report.shared,
        "blocks": report.blocks,
        "units": ", ".join(sorted(report.full_loop.families)) or "FFMA",
        "matrix": round(report.matrix_cycles),
        "exp": round(report.exp_cycles),
        "issue": round(report.issue_cycles),
        "ceiling": round(report.ceiling, 2),
    }


def kernel_tables(rows: list[dict[str, Any]]) -> list[Any]:
    """A table for each card and width of type, and what the columns mean."""
    tables = []
    for (card, bits), group in groupby(rows, lambda row: (row["card"], row["bits"])):
        table = Table(title=f"sm_{card}, {bits} bits", box=SIMPLE_HEAD, pad_edge=False)
        for name in COLUMNS:
            table.add_column(name, justify="right" if name in NUMBERS else "left", no_wrap=True)
        for values in group:
            tile = f"{values['tile']} w{values['warps']} s{values['stages']}"
            shown = values | {"D": values["head_dim"], "tile": tile, "reg": values["registers"]}
            shown["peak"] = f"{values['ceiling']:.0%}"
            table.add_row(*(str(shown[name]) for name in COLUMNS))
        tables.append(table)
    return [*tables, NOTE]
