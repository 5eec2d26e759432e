"""bench/models/against_transformers.py: real tokens/s of both encoders on one batch."""

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
    percent,
    set_against,
)
from clinattn.tools.ways import way_name

SIDES = {
    "transformers": way_name("transformers", "padded"),
    "clinattn": way_name("clinattn", "packed"),
}


def section(result: Record) -> Section:
    rows = result["rows"]
    ratios = [(", ".join(key(row)), row["ratio"]) for row in rows]
    cells = [
        (
            *key(row),
            percent(row["padding"]),
            *(f"{row['tokens_per_s'][side]:,.0f}" for side in SIDES),
            marked(f"{row['ratio']:.2f}", row),
        )
        for row in rows
    ]
    rates = [f"{name}, tokens/s" for name in SIDES.values()]
    header = ("preset", "dtype", "batch", "layers", "padding", *rates, "times as fast")
    return Section(
        title="Encoders against those of transformers",
        conclusion=set_against(
            SIDES["clinattn"],
            ratios,
            SIDES["transformers"],
            ", with the same weights on the same batch",
        ),
        facts=of_environment(result),
        load=load_in(rows),
        warnings=doubts(rows),
        tables=[Table("Inference", header, cells, labels=3)],
    )


def key(row: Record) -> tuple[str, ...]:
    batch = f"{row['inputs']}, up to {row['longest']:,}"
    return row["preset"], row["dtype"], batch, f"{row['layers']} layers"


def cases(result: Record) -> list[Case]:
    return [
        Case(
            (*key(row), name),
            "tokens/s",
            row["tokens_per_s"][side],
            disturbed=bool(row.get("disturbed")),
        )
        for row in result["rows"]
        for side, name in SIDES.items()
    ]
