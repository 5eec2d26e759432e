"""PNG and SVG plots of a benchmark result, from its JSON alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from clinattn.files.disk import written_whole
from clinattn.tools.report.charts import tick
from clinattn.tools.report.colors import LIGHT, bar_color
from clinattn.tools.ways import dtype_name, pass_name, way_name

MEBIBYTE = 1 << 20

Result = dict[str, Any]


def write_plots(result: Result, folder: Path) -> list[Path]:
    """Write <name>.png and <name>.svg for each plot the result has data for.

    Both hold the plot in words, for programs that read a page aloud.
    """
    matplotlib.rcParams["svg.hashsalt"] = "clinattn"  # the same data give the same file
    matplotlib.rcParams["text.parse_math"] = False  # a $ in the name of a folder is one
    written = []
    for name, (draw, needs) in PLOTS.items():
        if not needs(result):
            continue
        figure = draw(result)
        for suffix in ("png", "svg"):
            path = folder / f"{name}.{suffix}"
            save(figure, path, name)
            written.append(path)
    return written


def save(figure: Figure, path: str | Path, title: str) -> None:
    """Write a figure whole, with its words; the same figure gives the same bytes."""
    metadata: dict[str, Any] = {"Title": f"{title}: {in_words(figure)}"}
    metadata |= {"Date": None} if Path(path).suffix == ".svg" else {}
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=150, bbox_inches="tight", metadata=metadata)


def in_words(figure: Figure) -> str:
    """Every panel's title, axis and labelled bars."""
    parts = []
    for ax in figure.axes:
        names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        values = [text.get_text() for text in ax.texts]
        bars = "; ".join(f"{n}: {v}" for n, v in zip(names, values, strict=False))
        parts.append(f"{ax.get_title()}, {ax.get_xlabel()}. {bars}".strip())
    return "".join(x if x.isprintable() else "?" for x in "; ".join(parts))  # a folder's name


def caption(result: Result) -> str:
    """Hardware, versions and date in one line, as every figure carries them."""
    facts, row = result["environment"], result["rows"][0]
    hardware = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    return (
        f"{row['preset']}, {dtype_name(row['dtype'])}, up to {row['max_tokens']} tokens, "
        f"{row['workload']}; "
        f"{hardware}; torch {facts['torch']}; {facts['date'][:10]}"
    )


def _by_mode(result: Result) -> dict[str, list[dict[str, Any]]]:
    modes: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        modes.setdefault(row["mode"], []).append(row)
    return modes


def _bars(
    result: Result,
    modes: dict[str, list[dict[str, Any]]],
    xlabel: str,
    value: Callable[[dict[str, Any]], float],
    text: str,
    spread: bool = False,
) -> Figure:
    """Horizontal bars by variant, one panel for each mode; spread draws the quartiles."""
    figure = Figure(figsize=(4.5 * len(modes) + 2, 2.6), layout="constrained")
    axes = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for ax, (mode, rows) in zip(axes, modes.items(), strict=True):
        values = [value(row) for row in rows]
        labels = [way_name(row["variant"]) for row in rows]
        errors = None
        if spread:
            quartiles = [row["tokens_per_s"] for row in rows]
            errors = np.array([(q["median"] - q["q1"], q["q3"] - q["median"]) for q in quartiles]).T
        colors = [LIGHT[bar_color(row["variant"])] for row in rows]
        bars = ax.barh(labels, values, xerr=errors, capsize=3, color=colors)
        ax.bar_label(bars, [text.format(v) for v in values], padding=6, fontsize=8)
        ax.margins(x=0.25)
        ax.xaxis.set_major_formatter(lambda x, _: tick(x))
        ax.set(title=pass_name(mode), xlabel=xlabel)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.supxlabel(caption(result), fontsize=7)
    return figure


def _throughput(result: Result) -> Figure:
    return _bars(
        result,
        _by_mode(result),
        "real tokens/s, median and quartiles",
        lambda row: row["tokens_per_s"]["median"],
        "{:,.0f}",
        spread=True,
    )


def _padding(result: Result) -> Figure:
    rows = next(iter(_by_mode(result).values()))  # alike in every mode
    return _bars(
        result,
        {"padding": rows},
        "% of computed tokens",
        lambda row: 100 * row["padding_share"],
        "{:.1f}%",
    )


def _memory(result: Result) -> Figure:
    return _bars(
        result,
        _by_mode(result),
        "peak memory of a batch, MiB",
        lambda row: row["peak_memory_bytes"] / MEBIBYTE,
        "{:,.0f}",
    )


def _lengths(result: Result) -> Figure:
    workload = result["workload"]
    figure = Figure(figsize=(5.5, 2.6), layout="constrained")
    ax = figure.subplots()
    counts, edges = workload["histogram"]["counts"], workload["histogram"]["edges"]
    ax.stairs(counts, edges, fill=True, color=LIGHT[bar_color("sdpa_bucketed")])
    ax.set(xlabel="tokens per sequence", ylabel="sequences", title=workload["source"])
    ax.title.set_fontsize(8)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def _has_rows(result: Result) -> bool:
    return bool(result["rows"])


PLOTS: dict[str, tuple[Callable[[Result], Figure], Callable[[Result], bool]]] = {
    "throughput": (_throughput, _has_rows),
    "padding": (_padding, _has_rows),
    "memory": (
        _memory,
        lambda result: (
            _has_rows(result)
            and all(row["peak_memory_bytes"] is not None for row in result["rows"])
        ),
    ),
    "lengths": (_lengths, lambda result: "workload" in result),
}
