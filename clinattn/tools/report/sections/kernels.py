"""bench/cpu/run.py: attention alone, clinattn's CPU kernels and torch SDPA by case and pass."""

from __future__ import annotations

import re

from clinattn.tools.report.charts import Points, line_chart
from clinattn.tools.report.section import (
    Case,
    Record,
    Section,
    Table,
    doubts,
    facts_in,
    load_in,
    marked,
    percent,
    set_against,
)
from clinattn.tools.ways import pass_name, way_name

SIDES = {"ours": way_name("clinattn"), "torch": way_name("sdpa")}


def section(result: Record) -> Section:
    rows = result["rows"]
    ratios = [(", ".join(key(row)), row["ratio"]) for row in rows]
    return Section(
        title="Attention alone, on the CPU",
        conclusion=set_against("Attention of clinattn", ratios, SIDES["torch"]),
        facts=facts(result),
        load=load_in(rows),
        warnings=doubts(rows, bool(result.get("interrupted"))),
        charts=charts(rows),
        tables=[table(rows)],
        notes=(
            "Both sides take turns in one process, and a time is the median of its rounds. A ratio "
            "above 1 means that clinattn is faster.",
            "The peak is that of a loop of multiply-adds in registers, measured beside each case "
            "on the same threads.",
        ),
    )


def key(row: Record) -> tuple[str, ...]:
    return row["case"], row["dtype"], pass_name(row["passes"])


def table(rows: list[Record]) -> Table:
    ours, torch = SIDES.values()
    return Table(
        "By case and pass",
        ("case", "dtype", "pass", f"{ours}, ms", f"{torch}, ms", "times as fast",
         f"{ours}, % of peak", f"{torch}, % of peak", "peak, GFLOP/s"),
        [
            (*key(r), f"{r['ours_ms']:,.2f}", f"{r['torch_ms']:,.2f}",
             marked(f"{r['ratio']:.2f}", r), percent(r["ours_of_peak"]),
             percent(r["torch_of_peak"]), f"{r['peak'] / 1e9:,.0f} ({r['peak_loop']})")
            for r in rows
        ],
        labels=3,
    )  # fmt: skip


def charts(rows: list[Record]) -> list[Record]:
    by_case: dict[str, Points] = {}
    for row in rows:
        found = re.fullmatch(r"(\w+) N([1-9]\d{,8}) D(\d+)", row["case"])
        if found is None:
            continue
        mask, length, dim = found[1], int(found[2]), found[3]
        title = f"{mask}, head dimension {dim}, {pass_name(row['passes'])}"
        points = by_case.setdefault(title, {})
        for side, name in SIDES.items():
            seconds = row[f"{side}_ms"] / 1e3
            points.setdefault(f"{name}, {row['dtype']}", []).append((length, length / seconds))
    drawn = [
        line_chart(title, points, "tokens of a sequence", "tokens a second")
        for title, points in by_case.items()
    ]
    return [chart for chart in drawn if chart]


def facts(result: Record) -> Record:
    return facts_in(result["rows"][0])


def cases(result: Record) -> list[Case]:
    return [
        Case((*key(row), name), "ms", row[f"{side}_ms"], disturbed=bool(row.get("disturbed")))
        for row in result["rows"]
        for side, name in SIDES.items()
    ]
