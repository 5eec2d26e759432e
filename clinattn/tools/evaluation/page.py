"""The page of an evaluation: one file without scripts, which fetches nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clinattn.files.disk import write_text
from clinattn.tools.evaluation.evaluate import is_private
from clinattn.tools.evaluation.explained import on_page
from clinattn.tools.evaluation.printed import counts, rows_of_figures, titles
from clinattn.tools.evaluation.words import (
    DECISIONS,
    EFRON,
    FIGURES,
    Record,
    both,
    conclusion,
    facts,
    figures_of,
    number,
    threshold,
    value,
)
from clinattn.tools.report.charts import Bar, bar_chart
from clinattn.tools.report.curves import share_chart
from clinattn.tools.report.section import Table
from clinattn.tools.report.templates import template

SEEN = 3  # figures that are seen from afar
MOST_BARS = 14
ABREAST = 3  # figures of a table of groups, which has to be printed too


def write_page(record: Record, path: Path) -> None:
    """Writes the page, mode 0600 where it has the data of a person."""
    write_text(path, render(record), private=is_private(record))


def render(record: Record) -> str:
    """The page as HTML."""
    whole = record["groups"][0]
    names = figures_of(record)
    explanation = record["explanation"]
    shown = [*dict.fromkeys([*names, *(DECISIONS if record["task"] == "binary" else ())])]
    return template("page.html.j2", "clinattn.tools.evaluation").render(
        record=record,
        title=f"Evaluation of {record['source']['file']}",
        conclusion=conclusion(record),
        seen=[
            (value(whole["figures"][name]), FIGURES[name].title, whole["figures"][name])
            for name in names[:SEEN]
        ],
        interval=both,
        figures=Table("All rows", ("figure", *titles(record)), list(rows_of_figures(record))),
        charts=list(_charts(record)),
        reliability=_reliability(record),
        classes=_classes(record),
        groups=list(_groups(record)),
        explained=None if explanation is None else on_page(explanation),
        threshold=threshold(record) if record["task"] == "binary" else "",
        meanings=[FIGURES[name] for name in shown],
        undefined=_undefined(record),
        sources=[*dict.fromkeys(x for name in shown for x in FIGURES[name].sources), EFRON],
        facts=Table("Facts", ("fact", "value"), list(facts(record).items()), labels=2),
        raw=json.dumps(record | {"explanation": None}, indent=1, default=str),
    )


def _charts(record: Record) -> Iterator[Any]:
    whole = record["groups"][0]
    if "reliability" in whole:
        bins = whole["reliability"]
        points = [(x["predicted"], x["observed"]) for x in bins]
        known = [x for x in bins if x["low"] is not None]
        band = (
            [(x["predicted"], x["low"]) for x in known],
            [(x["predicted"], x["high"]) for x in known],
        )
        yield share_chart(
            "Calibration",
            ("groups of equal size, with intervals", points),
            "calibrated",
            "probability, mean of the group",
            "share with the outcome",
            band if known else None,
        )
    if whole.get("roc"):
        yield share_chart(
            "ROC curve",
            ("the model", whole["roc"]),
            "a coin",
            "share of those without the outcome",
            "share of those with it",
            marked=False,
        )


def _reliability(record: Record) -> Table | None:
    if "reliability" not in record["groups"][0]:
        return None
    rows = [
        (
            f"{number(x['from'])} to {number(x['to'])}",
            f"{x['rows']:,}",
            number(x["predicted"]),
            number(x["observed"]),
            "-" if x["low"] is None else f"{number(x['low'])} to {number(x['high'])}",
        )
        for x in record["groups"][0]["reliability"]
    ]
    head = ("probability", "rows", "mean probability", "share observed")
    return Table("Groups of equal size", (*head, f"{record['level']:.0%} interval"), rows)


def _classes(record: Record) -> Table | None:
    if record["task"] != "classes":
        return None
    whole = record["groups"][0]
    rows = [
        (name, f"{count:,}", both(found))
        for name, count, found in zip(
            record["classes"], whole["of_class"], whole["of_classes"], strict=True
        )
    ]
    return Table("Each class against the others", ("class", "rows", "AUROC"), rows)


def _groups(record: Record) -> Iterator[tuple[Any, list[Table]]]:
    """Yields of each column or code a chart of the first figure, or None, and the tables."""
    names = figures_of(record)
    parts = {"": names[:ABREAST], ", calibration": names[ABREAST:]}
    if record["task"] == "binary":
        parts[", decisions"] = [name for name in DECISIONS if name not in names]
    for by in record["by"]:
        own = [group for group in record["groups"] if group["by"] in (None, by)]
        tables = [
            Table(
                f"By {by}{part}",
                (
                    "group",
                    *(() if part else counts(record, own[0])),
                    *(FIGURES[name].title for name in shown),
                ),
                [
                    (
                        group["name"],
                        *(() if part else counts(record, group).values()),
                        *(both(group["figures"][name]) for name in shown),
                    )
                    for group in own
                ],
            )
            for part, shown in parts.items()
            if shown
        ]
        yield _bars(by, names[0], own), tables


def _bars(by: str, name: str, groups: list[Record]) -> Any:
    bars = []
    for group in groups[:MOST_BARS]:
        found = group["figures"][name]
        if found["value"] is None or found["value"] < 0:
            continue
        spread = None if found["low"] is None else (found["low"], found["high"])
        color = "line1" if group["by"] is None else "line3"
        bars.append(Bar(group["name"], found["value"], color, spread))
    if not bars:
        return None
    title = FIGURES[name].title
    return bar_chart(f"{title} by {by}", bars, title, "{:.3f}")


def _undefined(record: Record) -> int:
    """The most resamples without a value, of the figures of all rows that have an interval."""
    figures = record["groups"][0]["figures"].values()
    return max((x["undefined"] for x in figures if x["low"] is not None), default=0)
