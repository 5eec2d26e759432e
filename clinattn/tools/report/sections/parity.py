"""bench/models/parity.py: outputs and gradients of models before and after replace_attention."""

from __future__ import annotations

import math

from clinattn.tools.report.section import Case, Record, Section, Table, of_environment
from clinattn.tools.ways import dtype_name

KINDS = ("outputs", "gradients")


def section(result: Record) -> Section:
    rows, left = result["rows"], result.get("left", {})
    reasons: dict[str, list[str]] = {}
    for name, reason in left.items():
        reasons.setdefault(reason, []).append(name)
    header = ("model type", "class", "passed", "replaced", *map(" ".join, columns(rows)), "padding")
    tables = [
        Table(
            "Largest error of a model type, as a share of what is allowed",
            header,
            [cells(own, columns(rows)) for own in by_worst(rows)],
            labels=2,
            note="Up to 1.00 passes: twice the error that the model's own attention has against "
            "fp64, plus two rounding units. The largest come first.",
        )
    ]
    if reasons:
        lines = [(why, ", ".join(own), str(len(own))) for why, own in sorted(reasons.items())]
        tables.append(Table("Not compared", ("reason", "model types", "number"), lines, labels=2))
    return Section(
        title="Models before and after their attention is replaced",
        conclusion=conclusion(rows, left),
        facts=of_environment(result),
        load="No clock is read here: errors do not depend on what else the machine does.",
        tables=tables,
    )


def conclusion(rows: list[Record], left: Record) -> str:
    types = list(by_type(rows).values())
    passed = sum(all(row["passed"] for row in own) for own in types)
    others = f"; {len(left)} other types could not be compared" if left else ""
    return (
        f"{passed} of {len(types)} model types give the results of their own attention after "
        f"clinattn has replaced it, up to rounding, in {len(rows):,} comparisons{others}."
    )


def by_type(rows: list[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for row in rows:
        found.setdefault(row["architecture"], []).append(row)
    return found


def by_worst(rows: list[Record]) -> list[list[Record]]:
    """Rows of each type, those with the largest share of what is allowed first; NaN before all."""

    def largest(own: list[Record]) -> tuple[bool, float]:
        return all(row["passed"] for row in own), -max(worst(own, kind) for kind in KINDS)

    return sorted(by_type(rows).values(), key=largest)


def worst(rows: list[Record], kind: str, dtype: str | None = None) -> float:
    """The largest share of what is allowed, inf for NaN; 0 where nothing was compared."""
    found = [row[kind] for row in rows if dtype in (None, row["dtype"])]
    return max((math.inf if math.isnan(x) else x for x in found if x is not None), default=0.0)


def columns(rows: list[Record]) -> list[tuple[str, str]]:
    return [(d, kind) for d in dict.fromkeys(row["dtype"] for row in rows) for kind in KINDS]


def cells(own: list[Record], kinds: list[tuple[str, str]]) -> tuple[str, ...]:
    return (
        own[0]["architecture"],
        own[0]["model"],
        "yes" if all(row["passed"] for row in own) else "no",
        f"{own[0]['replaced']} of {own[0]['attentions']}",
        *(f"{worst(own, kind, dtype):.2f}" for dtype, kind in kinds),
        ", ".join(dict.fromkeys(row["padding"] for row in own)),
    )


def cases(result: Record) -> list[Case]:
    return [
        Case((name, dtype_name(dtype), kind), "of the error allowed", share)
        for name, own in by_type(result["rows"]).items()
        for dtype, kind in columns(own)
        if 0 < (share := worst(own, kind, dtype)) < math.inf
    ]
