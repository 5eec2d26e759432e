"""The page of an explanation: one file without scripts, which fetches nothing, and is private."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from clinattn.files.disk import write_text
from clinattn.tools.explanation.case import Case, shown
from clinattn.tools.explanation.deletion import conclusions, mean, probability
from clinattn.tools.explanation.settings import METHODS
from clinattn.tools.explanation.shades import SHADES, step
from clinattn.tools.explanation.words import (
    Record,
    agreement,
    conclusion,
    label,
    ranks,
    scores_of,
    several,
    shown_shares,
)
from clinattn.tools.report.charts import Bar, bar_chart, step_chart
from clinattn.tools.report.templates import template

MOST_BARS = 12


def write_page(record: Record, case: Case, path: Path) -> None:
    """Writes the page, mode 0600."""
    write_text(path, render(record, case), private=True)


def render(record: Record, case: Case) -> str:
    """The page as HTML. case: the words or events that the record is of."""
    shares = [scores_of(record, column) for column in range(2)]
    placed = [ranks(x) for x in shares]
    largest = max(map(abs, shares[0]), default=0.0)
    curve = record["deletion"]
    units = [
        {
            "label": label(unit),
            "time": unit["time"],
            "known": unit["known"],
            "shade": _shade(unit["scores"][0], largest),
            "shares": shown_shares(unit["scores"], record),
            "ranks": [place[i] for place in placed],
            "visit": case.groups[unit["group"]].title if case.groups else "",
        }
        for i, unit in enumerate(record["units"])
    ]
    return template("page.html.j2", "clinattn.tools.explanation").render(
        record=record,
        shades=SHADES,
        conclusion=conclusion(record),
        probabilities=_probabilities(record),
        probability=probability,
        methods=[METHODS[method] for method in record["methods"]],
        units=units,
        marked={i: f"u{i}" for i in record["strongest"]},
        agreement=agreement(record),
        visits=list(_visits(record, units)),
        chart=_deletion_chart(record),
        verdicts=conclusions(curve, record["probability"], record["target"], record["unit"]),
        pieces=list(_pieces(case)) if case.text is not None else None,
        unread=shown(case.text[case.read :]) if case.text is not None else "",
        several=several,
    )


def _shade(score: float, largest: float) -> str:
    """The class of a unit's element: for3, against1; "" for a weak one."""
    found = step(score, largest)
    return f"{'for' if score > 0 else 'against'}{found}" if found else ""


def _probabilities(record: Record) -> Any:
    order = sorted(record["classes"].items(), key=lambda pair: -pair[1])[:MOST_BARS]
    bars = [Bar(name, x, "line3" if name == record["target"] else "line1") for name, x in order]
    return bar_chart("Probabilities of the classes", bars, "probability", "{:.3f}")


def _deletion_chart(record: Record) -> Any:
    curve, whole = record["deletion"], record["probability"]
    columns = list(zip(*curve["random"], strict=True))
    series = {
        f"strongest by {METHODS[method].title}": [whole, *row]
        for method, row in curve["methods"].items()
    }
    name = f"random, mean and range of {len(curve['random'])}"
    series[name] = [whole, *map(mean, columns)]
    return step_chart(
        f"Probability of {record['target']} when {record['unit']}s are taken away",
        [f"{share}" for share in (0, *curve["shares"])],
        series,
        ("random", [whole, *map(min, columns)], [whole, *map(max, columns)]),
        f"% of {record['unit']}s taken away (steps not to scale)",
        "probability",
    )


def _visits(record: Record, units: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each visit, with its strongest events, and all of them by time."""
    strongest = set(record["strongest"])
    members: dict[int, list[int]] = {}
    for i, unit in enumerate(record["units"]):
        members.setdefault(unit["group"], []).append(i)
    for number, group in enumerate(record["groups"]):
        own = members[number]
        yield {
            **group,
            "id": f"v{number}",
            "sums": shown_shares(group["scores"], record),
            "strongest": [i for i in own if i in strongest],
            "times": [
                (time, list(of_time))
                for time, of_time in groupby(own, key=lambda i: units[i]["time"])
            ],
        }


def _pieces(case: Case) -> Iterator[tuple[str, int | None]]:
    """The text that the model read, cut into words (with their numbers) and what is between."""
    assert case.text is not None
    at = 0
    for i, unit in enumerate(case.units):
        start, end = unit.span
        if start > at:
            yield shown(case.text[at:start]), None
        yield shown(case.text[start:end]), i
        at = end
