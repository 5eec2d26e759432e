"""bench/models/pretrained.py: a pretrained encoder under eager attention, torch SDPA, clinattn."""

from __future__ import annotations

from clinattn.tools.report.section import (
    Case,
    Record,
    Section,
    Table,
    doubts,
    load_in,
    marked,
    of_environment,
    of_rate,
    percent,
    set_against,
)
from clinattn.tools.ways import pass_name, way_name

WAYS = {way: way_name(way, "padded") for way in ("eager", "sdpa", "clinattn")}
RIVALS = ("eager", "sdpa")


def section(result: Record) -> Section:
    rows = result["rows"]
    ratios = [(" in ".join(reversed(key(row))), ratio(row, "sdpa")) for row in rows]
    error = max(row["largest_difference"] for row in rows)
    header = (
        *("texts", "pass", "padding"),
        *(f"{name}, tokens/s" for name in WAYS.values()),
        *(f"times as fast as {way_name(rival)}" for rival in RIVALS),
    )
    return Section(
        title="A pretrained model with its attention replaced",
        conclusion=set_against(
            f"The model with {WAYS['clinattn']}",
            ratios,
            WAYS["sdpa"],
            f"; its outputs differ by {error:.1g} at most",
        ),
        facts=of_environment(result),
        load=load_in(rows),
        warnings=doubts(rows),
        tables=[Table("By texts and pass", header, [cells(row) for row in rows], labels=2)],
        notes=(
            "all-MiniLM-L6-v2 embeds titles of ICD-10-CM codes, and lists of up to 24 of them. "
            "Embeddings are compared before anything is timed. All ways take turns in one process, "
            "and a rate is the median of rounds.",
        ),
    )


def key(row: Record) -> tuple[str, ...]:
    return row["workload"], pass_name(row["pass"])


def ratio(row: Record, rival: str) -> float:
    return row["tokens_per_s"]["clinattn"]["median"] / row["tokens_per_s"][rival]["median"]


def cells(row: Record) -> tuple[str, ...]:
    rates = [f"{row['tokens_per_s'][way]['median']:,.0f}" for way in WAYS]
    ratios = [marked(f"{ratio(row, rival):.2f}", row) for rival in RIVALS]
    return (*key(row), percent(row["padding"]), *rates, *ratios)


def cases(result: Record) -> list[Case]:
    return [
        of_rate((*key(row), name), row["tokens_per_s"][way], row)
        for row in result["rows"]
        for way, name in WAYS.items()
    ]
