"""bench/models/engines/run.py: a table for each load and class of precision."""

from __future__ import annotations

from collections import Counter

from clinattn.tools.report.section import (
    MEBIBYTE,
    Case,
    Record,
    Section,
    Table,
    closed,
    doubts,
    load_in,
    marked,
    of_environment,
    of_rate,
    percent,
    quartiles,
    scaled,
)
from clinattn.tools.ways import way_name

RIVAL = way_name("torch", "padded")
HEADER = (
    *("way", "tokens/s", "times as fast", "quartiles", "padding"),
    *("a batch, ms", "rms error", "compile, s", "start, s", "peak MiB", "packages, MiB"),
)


def section(result: Record) -> Section:
    rows = result["rows"]
    return Section(
        title="Models of transformers under the engines of a CPU",
        conclusion=conclusion(rows),
        facts=of_environment(result),
        load=load_in(rows),
        warnings=doubts(rows, result["interrupted"]),
        tables=tables(rows),
        notes=(
            "Every engine computes each load by the best batches that it can take. Outputs are "
            "compared with fp32 torch on each sequence alone first; one with NaN in a real token "
            "is not timed.",
            "Within a class of precision the engines take turns, and a rate is the median of "
            "rounds. Start and memory are of a process of its own. Everything is inference.",
            *(f"Left out: {line}" for line in result["absent"]),
        ),
    )


def way(row: Record) -> str:
    return way_name(row["engine"], row["batching"])


def group(row: Record) -> str:
    layers = f"{row['layers']} of {row['published_layers']} layers"
    return f"{row['model']}, {layers}, {row['title']}: {row['kind']}"


def rate(row: Record) -> float:
    return 0.0 if row["tokens_per_s"] is None else row["tokens_per_s"]["median"]


def groups(rows: list[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for row in rows:
        found.setdefault(group(row), []).append(row)
    return found


def conclusion(rows: list[Record]) -> str:
    """Says which ways are the fastest, and in how many loads."""
    found = groups([row for row in rows if rate(row)])
    if not found:
        return "No engine was timed."
    first = Counter(way(max(own, key=rate)) for own in found.values())
    text = "; ".join(f"{closed(name)} in {count}" for name, count in first.most_common())
    loads = "1 load" if len(found) == 1 else f"{len(found)} loads"
    return f"Of {loads}, each in one precision, the fastest is {text}."


def tables(rows: list[Record]) -> list[Table]:
    note = f"Times as fast: as {RIVAL}."
    return [Table(title, HEADER, cells(own), note=note) for title, own in groups(rows).items()]


def cells(rows: list[Record]) -> list[tuple[str, ...]]:
    """Cells of one load and class, the fastest first; what gave NaN comes last, without a rate."""
    torch = [rate(row) for row in rows if way(row) == RIVAL]
    found: list[tuple[str, ...]] = []
    for row in sorted(rows, key=rate, reverse=True):
        speed = row["tokens_per_s"]
        found.append(
            (
                way(row),
                "NaN in tokens" if row["not_finite"] else marked(f"{rate(row):,.0f}", row),
                f"{rate(row) / torch[0]:.2f}" if speed and torch and torch[0] else "-",
                quartiles(speed) if speed else "-",
                percent(row["padding_share"]),
                scaled(row["latency_s"], 1e3),
                "-" if row["error"] is None else f"{row['error']:.1e}",
                scaled(row["compile_seconds"], 1.0, 1),
                scaled(row["start_seconds"], 1.0, 1),
                scaled(row["peak_memory_bytes"], 1 / MEBIBYTE),
                scaled(row["package_bytes"], 1 / MEBIBYTE),
            )
        )
    return found


def cases(result: Record) -> list[Case]:
    return [
        of_rate((group(row), way(row)), row["tokens_per_s"], row)
        for row in result["rows"]
        if row["tokens_per_s"] and not row["not_finite"]
    ]
