"""bench/cpu/compare.py: the CPU kernels of another revision and of the tree beside it."""

from __future__ import annotations

from statistics import median

from clinattn.tools.report.section import (
    Case,
    Record,
    Section,
    Table,
    doubts,
    facts_in,
    load_in,
    marked,
    set_against,
)
from clinattn.tools.ways import pass_name


def section(result: Record) -> Section:
    rows = result["rows"]
    base = str(result["base"].get("commit") or "the base")
    ratios = [(", ".join(key(row)), row["ratio"]) for row in rows]
    header = ("case", "dtype", "pass", "base, ms", "this tree, ms", "times as fast")
    cells = [
        (
            *key(row),
            f"{1e3 * median(row['base_s']):,.3f}",
            f"{1e3 * median(row['here_s']):,.3f}",
            marked(f"{row['ratio']:.2f}", row),
        )
        for row in rows
    ]
    return Section(
        title=f"Against {base}",
        conclusion=set_against("This tree", ratios, base),
        facts=facts(result),
        load=load_in(rows),
        warnings=doubts(rows, bool(result.get("interrupted"))),
        tables=[Table("By case and pass", header, cells, labels=3)],
        notes=("Each side has a process of its own, and their rounds take turns.",),
    )


def key(row: Record) -> tuple[str, ...]:
    return row["case"], row["dtype"], pass_name(row["passes"])


def facts(result: Record) -> Record:
    return facts_in(result["here"])


def cases(result: Record) -> list[Case]:
    return [
        Case(key(row), "ms", 1e3 * median(row["here_s"]), disturbed=bool(row.get("disturbed")))
        for row in result["rows"]
    ]
