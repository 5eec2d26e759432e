"""An explanation on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from clinattn.tools.explanation.deletion import conclusions, probability
from clinattn.tools.explanation.settings import METHODS
from clinattn.tools.explanation.words import (
    Record,
    agreement,
    conclusion,
    label,
    ranks,
    scores_of,
    shown_shares,
)


def lines(record: Record) -> Iterator[Any]:
    """Yields texts and tables, in their order."""
    yield f"{record['title']}: {conclusion(record)}"
    if record["predicted"]:
        yield record["predicted"]
    for name, text in record["facts"].items():
        yield f"{name}: {text}"
    yield _classes(record)
    yield _strongest(record)
    yield agreement(record)
    if len(record["groups"]) > 1:
        yield _groups(record)
    curve = record["deletion"]
    yield from conclusions(curve, record["probability"], record["target"], record["unit"])


def _classes(record: Record) -> Table:
    table = Table("class", show_edge=False)
    table.add_column("probability", justify="right")
    for name, x in sorted(record["classes"].items(), key=lambda pair: -pair[1]):
        table.add_row(f"{name} *" if name == record["target"] else name, probability(x))
    return table


def _strongest(record: Record) -> Table:
    timed = bool(record["groups"])
    table = Table(record["unit"], "time" if timed else "place", show_edge=False)
    placed = [ranks(scores_of(record, column)) for column in range(2)]
    for method in record["methods"]:
        table.add_column(METHODS[method].title, justify="right")
        table.add_column("rank", justify="right")
    for i in record["strongest"]:
        unit = record["units"][i]
        cells = [label(unit) + ("" if unit["known"] else " [UNK]")]
        cells.append(unit["time"] if timed else f"{i + 1:,}")
        for place, share in zip(placed, shown_shares(unit["scores"], record), strict=True):
            cells += [share, f"{place[i]:,}"]
        table.add_row(*cells)
    return table


def _groups(record: Record) -> Table:
    table = Table("visit", "from", "to", show_edge=False)
    for name in ("events", *(METHODS[method].title for method in record["methods"])):
        table.add_column(name, justify="right")
    for group in record["groups"]:
        sums = shown_shares(group["scores"], record)
        table.add_row(group["title"], group["first"], group["last"], f"{group['units']:,}", *sums)
    return table
