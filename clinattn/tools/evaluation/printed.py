"""An evaluation on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from clinattn.tools.evaluation.words import (
    DECISIONS,
    FIGURES,
    Record,
    both,
    conclusion,
    figures_of,
    interval,
    number,
    threshold,
    value,
)


def lines(record: Record) -> Iterator[Any]:
    """Yields texts and tables, in their order."""
    yield conclusion(record)
    yield _figures(record)
    if record["task"] == "binary":
        yield threshold(record)
    if len(record["groups"]) > 1:
        yield _groups(record)
    if record["task"] == "classes":
        yield _classes(record)


def rows_of_figures(record: Record) -> Iterator[tuple[str, ...]]:
    """Yields title, value, interval and what saying the same always gives, of all rows."""
    whole = record["groups"][0]
    base = whole["baseline"]
    names = figures_of(record)
    if record["task"] == "binary":
        names = [*dict.fromkeys([*names, *DECISIONS])]
    for name in names:
        found = whole["figures"][name]
        same = number(base[name]) if name in base else "-"
        yield FIGURES[name].title, value(found), interval(found), same


def titles(record: Record) -> tuple[str, str, str]:
    """Titles of rows_of_figures; the last is of a model that always says the same."""
    always = {"binary": "prevalence", "classes": "class shares", "numbers": "mean"}[record["task"]]
    return "value", f"{record['level']:.0%} interval", f"always the {always}"


def _figures(record: Record) -> Table:
    table = Table("figure", show_edge=False)
    for name in titles(record):
        table.add_column(name, justify="right")
    for cells in rows_of_figures(record):
        table.add_row(*cells)
    return table


def counts(record: Record, group: Record) -> dict[str, str]:
    """Patients, rows, and of a yes or no the positives with their share, by their heads."""
    found = {"patients": f"{group['patients']:,}"} if record["unit"] == "patients" else {}
    found["rows"] = f"{group['rows']:,}"
    if record["task"] == "binary":
        found["positives"] = f"{group['positives']:,} ({group['positives'] / group['rows']:.1%})"
    return found


def _groups(record: Record) -> Table:
    table = Table("by", "group", show_edge=False)
    first, *names = figures_of(record)[:4]
    heads = (*counts(record, record["groups"][0]), *(FIGURES[x].title for x in (first, *names)))
    for name in heads:
        table.add_column(name, justify="right", no_wrap=name == FIGURES[first].title)
    for group in record["groups"]:
        cells = counts(record, group).values()
        shown = (value(group["figures"][x]) for x in names)
        own = both(group["figures"][first])
        table.add_row(group["by"] or "", group["name"], *cells, own, *shown)
    return table


def _classes(record: Record) -> Table:
    table = Table("class", show_edge=False)
    for name in ("rows", "AUROC against the others"):
        table.add_column(name, justify="right")
    whole = record["groups"][0]
    for name, count, found in zip(
        record["classes"], whole["of_class"], whole["of_classes"], strict=True
    ):
        table.add_row(name, f"{count:,}", both(found))
    return table
