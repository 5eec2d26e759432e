"""A self-contained HTML page from results in JSON: no script, no font, nothing fetched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from clinattn.files.disk import parse_json, write_text
from clinattn.tools.other_work import disturbance
from clinattn.tools.report.shapes import check_result, kind_of
from clinattn.tools.report.tables import COLORS, section

MEBIBYTE = 1 << 20
WAYS = ("sdpa_padded", "sdpa_bucketed", "clinattn_padded", "clinattn_packed")  # with a colour each
CHART_WIDTH, VALUE_WIDTH, ROW_HEIGHT = 360, 70, 44  # a phone's width: text keeps its size there


Result = dict[str, Any]


class ReportError(ValueError):
    """A file that is no benchmark result; the message says what was given and expected."""


def load_result(path: str | Path) -> Result:
    """Loads what `clinattn bench` or bench/ wrote. Raises ReportError for anything else."""
    where = f"results={str(path)!r}"
    try:
        result = parse_json(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ReportError(
            f"{where} cannot be read ({reason}): expected the results.json of clinattn bench, or "
            "JSON of bench/"
        ) from error
    kind = kind_of(result)
    if kind is None:
        raise ReportError(
            f"{where} is no benchmark result: expected a JSON object with schema 1, or rows of "
            "a benchmark in bench/cpu or bench/models, or of pytest-benchmark"
        )
    try:
        check_result(result, kind)
    except ValueError as error:
        raise ReportError(f"{where}: {error}") from None
    return result


def write_report(results: Result | Sequence[Result], path: str | Path) -> None:
    """Render one result or several to an HTML file."""
    given = [results] if isinstance(results, dict) else results
    write_text(path, render(*given))


def render(*results: Result) -> str:
    encoders = [result for result in results if kind_of(result) == "encoder"]
    sections = [section(result) for result in results if kind_of(result) != "encoder"]
    facts = [result["environment"] for result in encoders]
    facts += [found.facts for found in sections if found is not None]
    return template().render(
        date=max(str(fact.get("date", ""))[:10] for fact in facts),
        encoders=[
            {
                "result": result,
                "charts": charts(result["rows"]),
                "disturbance": disturbance(result["rows"]),
                "histogram": histogram(result["workload"]) if "workload" in result else None,
            }
            for result in encoders
        ],
        sections=sections,
        raw=[json.dumps(result, indent=1) for result in results],
    )


@cache
def template() -> jinja2.Template:
    text = files("clinattn.tools.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["short"] = short
    return environment.from_string(text)


def short(value: Any) -> str:
    """A value as a reader wants it: three digits of an error, thousands apart, yes and no."""
    if value is None:
        return "not available"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def charts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Throughput with quartiles and, if it was read, memory of each mode; padding, alike in all."""
    modes: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        modes.setdefault(row["mode"], []).append(row)
    drawn = []
    for mode, own in modes.items():
        rates = [row["tokens_per_s"] for row in own]
        medians, spread = [q["median"] for q in rates], [(q["q1"], q["q3"]) for q in rates]
        title = f"{mode}: real tokens per second"
        drawn.append(bar_chart(title, own, medians, "{:,.0f}", spread))
    for mode, own in modes.items():
        if all(row["peak_memory_bytes"] is not None for row in own):
            memory = [row["peak_memory_bytes"] / MEBIBYTE for row in own]
            title = f"{mode}: peak memory of a batch, MiB"
            drawn.append(bar_chart(title, own, memory, "{:,.0f}"))
    for own in list(modes.values())[:1]:
        shares = [100 * row["padding_share"] for row in own]
        drawn.append(bar_chart("padding, % of computed tokens", own, shares, "{:.1f}%"))
    return drawn


def bar_chart(
    title: str,
    rows: list[dict[str, Any]],
    values: list[float],
    text: str,
    spread: list[tuple[float, float]] | None = None,
) -> dict[str, Any]:
    """Horizontal bars in pixels of the chart's own width."""
    largest = max([*values, *(high for _, high in spread or [])]) or 1.0
    unit = (CHART_WIDTH - VALUE_WIDTH) / largest
    bars = []
    for i, (row, value) in enumerate(zip(rows, values, strict=True)):
        low, high = spread[i] if spread else (value, value)
        bars.append(
            {
                "color": bar_color(row["variant"]),
                "label": row["label"],
                "text": text.format(value),
                "y": i * ROW_HEIGHT,
                "width": round(value * unit, 1),
                "low": round(low * unit, 1),
                "high": round(high * unit, 1),
                "end": round(max(value, high) * unit + 6, 1),
            }
        )
    return {
        "title": title,
        "bars": bars,
        "spread": spread is not None,
        "width": CHART_WIDTH,
        "height": ROW_HEIGHT * len(rows),
    }


def bar_color(variant: str) -> str:
    """The name of the page's colour for a way; unknown ways share one colour."""
    return variant if variant in WAYS else f"line{COLORS - 1}"


def histogram(workload: dict[str, Any]) -> dict[str, Any]:
    """Columns of the length histogram."""
    counts, edges = workload["histogram"]["counts"], workload["histogram"]["edges"]
    height, step, largest = 120, CHART_WIDTH / len(counts), max(counts) or 1
    columns = [
        {
            "x": round(i * step, 1),
            "width": round(step - 1, 1),
            "height": round(height * count / largest, 1),
            "text": f"{edges[i]:,.0f} to {edges[i + 1]:,.0f} tokens: {count} sequences",
        }
        for i, count in enumerate(counts)
    ]
    return {"columns": columns, "width": CHART_WIDTH, "height": height, "last": f"{edges[-1]:,.0f}"}
