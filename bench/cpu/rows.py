"""A row of the CPU benchmark: raw times, what follows from them, the table and the JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Row:
    """Times of one pass of one case; a ratio above 1 means that ours is faster.

    ours_s, torch_s: seconds of each round.
    peak: FLOP/s of the register loop named in peak_loop, on the same threads in the same run.
    environment: what the numbers depend on, as clinattn.tools.environment has it.
    """

    case: str
    dtype: str
    passes: str
    flops: int
    ours_s: list[float]
    torch_s: list[float]
    peak: float
    peak_loop: str
    target: float | None
    environment: dict[str, Any]

    @property
    def ours_ms(self) -> float:
        return 1e3 * statistics.median(self.ours_s)

    @property
    def torch_ms(self) -> float:
        return 1e3 * statistics.median(self.torch_s)

    @property
    def ratio(self) -> float:
        return self.torch_ms / self.ours_ms

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.ratio >= self.target

    @property
    def ours_gflops(self) -> float:
        return self.flops / self.ours_ms / 1e6

    @property
    def torch_gflops(self) -> float:
        return self.flops / self.torch_ms / 1e6

    @property
    def ours_of_peak(self) -> float:
        return 1e9 * self.ours_gflops / self.peak

    @property
    def torch_of_peak(self) -> float:
        return 1e9 * self.torch_gflops / self.peak

    def record(self) -> dict[str, Any]:
        """Flat dict of the environment, the measurement, and what follows from the measurement."""
        measured = asdict(self)
        return {
            **measured.pop("environment"),
            **measured,
            **{name: getattr(self, name) for name in DERIVED},
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Row:
        own = [field.name for field in fields(cls) if field.name != "environment"]
        rest = {k: v for k, v in record.items() if k not in own and k not in DERIVED}
        return cls(**{name: record[name] for name in own}, environment=rest)


DERIVED = tuple(name for name, value in vars(Row).items() if isinstance(value, property))


def content(rows: Sequence[Row], interrupted: bool) -> dict[str, Any]:
    """The content of the JSON file: the facts and the rows."""
    return {"interrupted": interrupted, "rows": [row.record() for row in rows]}


def read_json(path: Path) -> list[Row]:
    return [Row.from_record(record) for record in json.loads(path.read_text())["rows"]]


def verdict(row: Row) -> str:
    return {None: "", True: "met", False: "[red]missed[/red]"}[row.met]


def marked(row: Row) -> str:
    """The ratio, with a star where other work ran beside the measurement."""
    return f"{row.ratio:.2f}" + "*" * bool(row.environment.get("disturbed"))


def table(rows: Sequence[Row]) -> Table:
    result = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("\ncase", "\ndtype", "\npass"):
        result.add_column(name, no_wrap=True)
    from clinattn.tools.ways import way_name  # another tree's clinattn may lack it

    ours, torch = way_name("clinattn"), way_name("sdpa")
    for name in (f"{ours}\nms", f"{torch}\nms", "\nratio", "\ntarget"):
        result.add_column(name, justify="right")
    result.add_column("")
    for unit in ("GF/s", "% of peak"):
        for name in (ours, torch):
            result.add_column(f"{name}\n{unit}", justify="right")
    result.add_column("peak\nGF/s", no_wrap=True)
    for row in rows:
        result.add_row(
            *(row.case, row.dtype, row.passes),
            *(f"{row.ours_ms:.2f}", f"{row.torch_ms:.2f}", marked(row)),
            *("" if row.target is None else f"{row.target:g}", verdict(row)),
            *(f"{row.ours_gflops:.0f}", f"{row.torch_gflops:.0f}"),
            *(f"{100 * row.ours_of_peak:.1f}", f"{100 * row.torch_of_peak:.1f}"),
            f"{row.peak / 1e9:.0f} {row.peak_loop}",
        )
    return result


def summary(rows: Sequence[Row]) -> str:
    aimed = [row for row in rows if row.met is not None]
    return f"{sum(bool(row.met) for row in aimed)} of {len(aimed)} targets met"
