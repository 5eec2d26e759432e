"""One self-contained HTML page from a benchmark's JSON: no script, no font, nothing fetched."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

MEBIBYTE = 1 << 20
CHART_WIDTH, VALUE_WIDTH, ROW_HEIGHT = 360, 70, 44  # a phone's width: text keeps its size there


class ReportError(ValueError):
    """A file that is no benchmark result; the message says what was given and expected."""


def load_result(path: str | Path) -> dict[str, Any]:
    """The JSON that `clinattn bench` wrote. Raises ReportError for anything else."""
    where = f"results={str(path)!r}"
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReportError(
            f"{where} cannot be read ({error}): expected the results.json of clinattn bench"
        ) from error
    if not isinstance(result, dict) or result.get("schema") != 1:
        raise ReportError(f"{where} is no benchmark result: expected a JSON object with schema 1")
    return result


def write_report(result: dict[str, Any], path: str | Path) -> None:
    """Render the result to an HTML file."""
    Path(path).write_text(render(result), encoding="utf-8")


def render(result: dict[str, Any]) -> str:
    template = files("clinattn").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["short"] = short
    modes = list(dict.fromkeys(row["mode"] for row in result["rows"]))
    charts = [
        chart
        for mode in modes
        for chart in mode_charts([row for row in result["rows"] if row["mode"] == mode], mode)
    ]
    return environment.from_string(template).render(
        result=result,
        charts=charts,
        histogram=histogram(result["workload"]) if "workload" in result else None,
        raw=json.dumps(result, indent=1),
    )


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


def mode_charts(rows: list[dict[str, Any]], mode: str) -> list[dict[str, Any]]:
    """Bar charts of one mode: throughput with quartiles, padding, memory if it was read."""
    charts = [
        bar_chart(
            f"{mode}: real tokens per second",
            rows,
            [row["tokens_per_s"]["median"] for row in rows],
            "{:,.0f}",
            [(row["tokens_per_s"]["q1"], row["tokens_per_s"]["q3"]) for row in rows],
        ),
        bar_chart(
            f"{mode}: padding, % of computed tokens",
            rows,
            [100 * row["padding_share"] for row in rows],
            "{:.1f}%",
        ),
    ]
    if all(row["peak_memory_bytes"] is not None for row in rows):
        memory = [row["peak_memory_bytes"] / MEBIBYTE for row in rows]
        charts.append(bar_chart(f"{mode}: peak memory of a batch, MiB", rows, memory, "{:,.0f}"))
    return charts


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
                "variant": row["variant"],
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
