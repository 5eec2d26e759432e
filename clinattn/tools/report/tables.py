"""Sections of a report on results that `clinattn bench` did not write: tables, and lines by length.

Known are the rows of bench/cpu/run.py, bench/cpu/compare.py, bench/models/against_transformers.py
and bench/models/engines/run.py, and pytest-benchmark's JSON of the suites in bench/suites.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from clinattn.tools.other_work import disturbance
from clinattn.tools.report.shapes import kind_of

MEBIBYTE = 1 << 20
WIDTH, HEIGHT = 360, 200  # of a chart; a phone's width
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 22
COLORS = 6  # the page has as many

FACTS = (
    *("date", "clinattn", "commit", "python", "torch", "triton", "transformers", "platform"),
    *("cpu", "gpu", "cpus", "threads", "instruction_set"),
    *("peak_fp32_gflop_per_s", "peak_bf16_gflop_per_s"),
)

Record = dict[str, Any]
Points = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Section:
    """Section on one file of results. facts: hardware, versions, date, commit."""

    title: str
    facts: Record
    tables: list[Table]
    charts: list[Record] = field(default_factory=list)
    interrupted: bool = False
    disturbance: str | None = None


def section(result: Record) -> Section | None:
    """Section on a result; None for a result of no known kind."""
    sections = {
        "suites": suites,
        "compare": compared,
        "against_transformers": encoders,
        "engines": engines,
        "kernels": kernels,
    }
    kind = kind_of(result)
    return sections[kind](result) if kind in sections else None


def kernels(result: Record) -> Section:
    """bench/cpu/run.py: ours and torch, speed-up and share of the roofline."""
    rows = result["rows"]
    table = Table(
        "By case and pass",
        ("case", "dtype", "pass", "ours ms", "torch ms", "speed-up over SDPA", "ours % of peak",
         "torch % of peak", "peak GFLOP/s"),
        [
            (r["case"], r["dtype"], r["passes"], f"{r['ours_ms']:.2f}", f"{r['torch_ms']:.2f}",
             marked(f"{r['ratio']:.2f}", r), percent(r["ours_of_peak"]),
             percent(r["torch_of_peak"]), f"{r['peak'] / 1e9:,.0f} ({r['peak_loop']})")
            for r in rows
        ],
    )  # fmt: skip
    by_case: dict[str, Points] = {}
    for row in rows:
        found = re.fullmatch(r"(\w+) N([1-9]\d{,8}) D(\d+)", row["case"])
        if found is None:
            continue
        mask, length, dim = found[1], int(found[2]), found[3]
        points = by_case.setdefault(f"{mask}, D {dim}, {row['passes']}: tokens/s by length", {})
        for who in ("ours", "torch"):
            seconds = row[f"{who}_ms"] / 1e3
            points.setdefault(f"{who} {row['dtype']}", []).append((length, length / seconds))
    charts = [line_chart(title, points) for title, points in by_case.items()]
    return Section(
        "CPU kernels against torch's SDPA",
        facts_in(rows[0]),
        [table],
        [chart for chart in charts if chart],
        bool(result.get("interrupted")),
        disturbance(rows),
    )


def compared(result: Record) -> Section:
    """bench/cpu/compare.py: a base revision and the tree beside it."""
    rows = [
        (r["case"], r["dtype"], r["passes"], f"{1e3 * median(r['base_s']):.3f}",
         f"{1e3 * median(r['here_s']):.3f}", marked(f"{r['ratio']:.2f}", r))
        for r in result["rows"]
    ]  # fmt: skip
    header = ("case", "dtype", "pass", "base ms", "this tree ms", "base / this tree")
    base = result["base"].get("commit") or "the base"
    return Section(
        f"Against {base}",
        facts_in(result["here"]),
        [Table("By case and pass", header, rows)],
        interrupted=bool(result.get("interrupted")),
        disturbance=disturbance(result["rows"]),
    )


def encoders(result: Record) -> Section:
    """bench/models/against_transformers.py: real tokens/s of both encoders on one batch."""
    rows = [
        (r["preset"], r["dtype"], f"{r['inputs']}, up to {r['longest']:,}", str(r["layers"]),
         percent(r["padding"]), f"{r['tokens_per_s']['transformers']:,.0f}",
         f"{r['tokens_per_s']['clinattn']:,.0f}", marked(f"{r['ratio']:.2f}", r))
        for r in result["rows"]
    ]  # fmt: skip
    header = ("preset", "dtype", "batch", "layers", "padding", "theirs", "ours", "times as fast")
    title = "Encoders against transformers with SDPA"
    return Section(
        title,
        facts_in(result["environment"]),
        [Table("Tokens/s", header, rows)],
        disturbance=disturbance(result["rows"]),
    )


def engines(result: Record) -> Section:
    """bench/models/engines/run.py: a table for each load and class of precision."""
    groups: dict[str, list[Record]] = {}
    for row in result["rows"]:
        layers = f"{row['layers']} of {row['published_layers']} layers"
        title = f"{row['model']}, {layers}, {row['title']}: {row['kind']}"
        groups.setdefault(title, []).append(row)
    header = (
        *("engine", "batching", "tokens/s", "over torch padded", "quartiles", "padding"),
        *("ms a batch", "rms error", "compile s", "start s", "peak MiB", "packages MiB"),
    )
    return Section(
        "Encoders under the engines of a CPU",
        facts_in(result["environment"]),
        [Table(title, header, engine_rows(rows)) for title, rows in groups.items()],
        interrupted=result["interrupted"],
        disturbance=disturbance(result["rows"]),
    )


def engine_rows(rows: list[Record]) -> list[tuple[str, ...]]:
    """Cells of one load and class, the fastest first; what gave NaN comes last, without a rate."""
    rate = lambda row: 0.0 if row["tokens_per_s"] is None else row["tokens_per_s"]["median"]
    torch = [rate(row) for row in rows if (row["engine"], row["batching"]) == ("torch", "padded")]
    cells: list[tuple[str, ...]] = []
    for row in sorted(rows, key=rate, reverse=True):
        speed = row["tokens_per_s"]
        ratio = f"{rate(row) / torch[0]:.2f}" if speed and torch and torch[0] else "-"
        cells.append(
            (
                row["engine"],
                row["batching"],
                "NaN in tokens" if row["not_finite"] else marked(f"{rate(row):,.0f}", row),
                ratio,
                f"{speed['q1']:,.0f} to {speed['q3']:,.0f}" if speed else "-",
                percent(row["padding_share"]),
                number(row["latency_s"], 1e3),
                "-" if row["error"] is None else f"{row['error']:.1e}",
                number(row["compile_seconds"], 1.0, 1),
                number(row["start_seconds"], 1.0, 1),
                number(row["peak_memory_bytes"], 1 / MEBIBYTE),
                number(row["package_bytes"], 1 / MEBIBYTE),
            )
        )
    return cells


def number(value: float | None, scale: float, digits: int = 0) -> str:
    return "-" if value is None else f"{scale * value:,.{digits}f}"


def suites(result: Record) -> Section:
    """pytest-benchmark's JSON: speed by group, and memory by length."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    memory: dict[str, Points] = {}
    speed: dict[str, Points] = {}
    starts: list[tuple[str, ...]] = []
    linear: list[tuple[str, ...]] = []
    for benchmark in result["benchmarks"]:
        extra = benchmark["extra_info"]
        kind, way = extra.get("kind"), extra.get("way", benchmark["name"])
        if kind in ("attention", "encoder"):
            groups.setdefault(benchmark["group"], []).append(speed_row(way, extra))
        if kind == "attention" and extra.get("window") is None:
            title = f"attention {extra['dtype']} {extra['passes']}: tokens/s by longest sequence"
            rate = extra["tokens_per_s"]["median"]
            speed.setdefault(title, {}).setdefault(way, []).append((extra["longest"], rate))
        if kind == "memory":
            title = f"{extra['passes']}: peak MiB by length"
            points = memory.setdefault(title, {}).setdefault(way, [])
            points += [(int(n), peak / MEBIBYTE) for n, peak in extra["peak_bytes"].items()]
        if kind == "linear":
            linear.append(linear_row(extra))
        if kind == "startup":
            parts = extra["seconds"].items()
            starts += [(way, part, f"{1e3 * q['median']:.1f}") for part, q in parts]
    header = ("way", "tokens/s", "over SDPA", "quartiles", "% of peak", "padding")
    tables = [Table(title, header, rows) for title, rows in groups.items()]
    tables += [memory_table(title, points) for title, points in memory.items()]
    if linear:
        columns = ("type, tokens x in x out", "product", "GFLOP/s", "over torch", "% of peak")
        tables.append(Table("Linear layers", columns, linear))
    if starts:
        tables.append(Table("Start of a program", ("program", "part", "ms"), starts))
    charts = [line_chart(title, points) for title, points in (memory | speed).items()]
    facts = result["machine_info"].get("clinattn", {}) | {"date": result["datetime"][:19]}
    return Section(
        "Suites of bench/",
        facts_in(facts),
        tables,
        [c for c in charts if c],
        disturbance=disturbance([benchmark["extra_info"] for benchmark in result["benchmarks"]]),
    )


def marked(text: str, row: Record) -> str:
    """The text, with a star where other work ran beside the measurement."""
    return text + "*" * bool(row.get("disturbed"))


def linear_row(extra: Record) -> tuple[str, ...]:
    rate, ratio, peak = (extra[x] for x in ("gflop_per_s", "ratio_to_peer", "of_peak"))
    share = "" if peak is None else f"{100 * peak:.0f}"
    return extra["case"], extra["passes"], marked(f"{rate:,.0f}", extra), f"{ratio:.2f}x", share


def speed_row(way: str, extra: Record) -> tuple[str, ...]:
    rate = extra["tokens_per_s"]
    ratio, peak, padding = (
        extra.get(name) for name in ("ratio_to_peer", "of_peak", "padding_share")
    )
    return (
        way,
        marked(f"{rate['median']:,.0f}", extra),
        "1" if ratio is None else f"{ratio:.2f}",
        f"{rate['q1']:,.0f} to {rate['q3']:,.0f}",
        "-" if peak is None else percent(peak),
        "-" if padding is None else percent(padding),
    )


def memory_table(title: str, points: Points) -> Table:
    lengths = sorted({length for own in points.values() for length, _ in own})
    rows = []
    for way, own in points.items():
        at = dict(own)
        cells = [f"{at[n]:,.1f}" if n in at else "-" for n in lengths]
        rows.append((way, *cells))
    return Table(title, ("way", *(f"{n:,.0f}" for n in lengths)), rows)


def facts_in(record: Record) -> Record:
    """The facts of a row that say where a number comes from."""
    return {name: record[name] for name in FACTS if record.get(name) is not None}


def line_chart(title: str, series: Points) -> Record | None:
    """Lines over logarithmic axes, in pixels; None where no line has two points or more."""
    lines = {name: sorted(set(points)) for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if len({x for x, _ in points}) > 1}
    positive = [y for points in lines.values() for _, y in points if y > 0]
    if not positive:
        return None
    xs = sorted({x for points in lines.values() for x, _ in points})
    low, high = decades(min(positive), max(positive))

    def at(x: float, y: float) -> tuple[float, float]:
        right = math.log(x / xs[0]) / math.log(xs[-1] / xs[0])
        up = math.log(max(y, low) / low) / math.log(high / low)
        return (
            round(LEFT + right * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    drawn = []
    for i, (name, points) in enumerate(lines.items()):
        placed = [at(x, y) for x, y in points]
        drawn.append(
            {
                "name": name,
                "color": i % COLORS,
                "dashed": i >= COLORS,
                "points": placed,
                "path": "M" + "L".join(f"{x} {y}" for x, y in placed),
                "texts": [f"{name}: {y:,.4g} at {x:,.0f}" for x, y in points],
            }
        )
    return {
        "title": title,
        "lines": drawn,
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "bottom": HEIGHT - BOTTOM,
        "x_ticks": [(at(x, low)[0], f"{x:,.0f}") for x in spread(xs)],
        "y_ticks": [(at(xs[0], y)[1], tick(y)) for y in steps(low, high)],
    }


def decades(low: float, high: float) -> tuple[float, float]:
    """The powers of ten around an interval, at least one apart."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return 10.0**first, 10.0 ** max(last, first + 1)


def steps(low: float, high: float) -> list[float]:
    return [10.0**i for i in range(round(math.log10(low)), round(math.log10(high)) + 1)]


def spread(values: Sequence[float], most: int = 5) -> list[float]:
    """At most `most` of the values, with the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def tick(value: float) -> str:
    """1,000,000 as 1M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"
