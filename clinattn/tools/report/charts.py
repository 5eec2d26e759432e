"""Charts of the page as numbers in pixels: bars, lines and columns, each with axes and units.

`alternative` is a chart in words, for who cannot see it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clinattn.tools.report.colors import LINES

WIDTH = 360  # of every chart, a phone's: text keeps its size there
VALUE_WIDTH, ROW_HEIGHT = 70, 44  # of bars
AXIS = 36  # height of ticks and title below a chart
HEIGHT = 200  # of the field of lines and columns
LEFT, RIGHT, TOP = 52, 12, 24
STEP_LINES = ("line0", "line2", "line3")
TINY = 1e-30  # what is less has no axis
MARKS = (  # of a line's points, around 0 0
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
    "M-3.5 -3.5h7v7h-7Z",
    "M0 -4.5L4.5 3.5H-4.5Z",
    "M0 -5L5 0L0 5L-5 0Z",
    "M0 4.5L4.5 -3.5H-4.5Z",
    "M-4 -1.5h2.5v-2.5h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5Z",
)

Record = dict[str, Any]
Points = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Bar:
    """spread: quartiles, drawn as a whisker. color: a name in colors."""

    label: str
    value: float
    color: str
    spread: tuple[float, float] | None = None


def bar_chart(title: str, bars: Sequence[Bar], axis: str, text: str) -> Record:
    """Horizontal bars from 0. axis: what is shown, with its unit. text: the format of a value."""
    largest = max(max(bar.value, *(bar.spread or (0.0,))) for bar in bars)
    largest = largest if largest > TINY else 1.0
    unit = (WIDTH - VALUE_WIDTH) / largest
    bottom = ROW_HEIGHT * len(bars)
    drawn = []
    for i, bar in enumerate(bars):
        low, high = bar.spread or (bar.value, bar.value)
        drawn.append(
            {
                "color": bar.color,
                "label": bar.label,
                "text": text.format(bar.value),
                "y": i * ROW_HEIGHT,
                "width": round(bar.value * unit, 1),
                "low": round(low * unit, 1),
                "high": round(high * unit, 1),
                "end": round(max(bar.value, high) * unit + 6, 1),
                "spread": bar.spread is not None,
            }
        )
    return {
        "kind": "bars",
        "title": title,
        "axis": axis,
        "bars": drawn,
        "width": WIDTH,
        "height": bottom + AXIS,
        "bottom": bottom,
        "right": WIDTH - VALUE_WIDTH,
        "x_ticks": [(round(x * unit, 1), tick(x)) for x in rounded_steps(largest)],
        "alternative": f"{axis}. " + listed((bar.label, text.format(bar.value)) for bar in bars),
    }


def line_chart(title: str, series: Points, x_axis: str, y_axis: str) -> Record | None:
    """Lines over logarithmic axes; None where no line has two points or more."""
    lines = {name: sorted(set(points)) for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if len({x for x, _ in points}) > 1}
    positive = [y for points in lines.values() for _, y in points if y > TINY]
    if not positive:
        return None
    xs = sorted({x for points in lines.values() for x, _ in points})
    low, high = decades(min(positive), max(positive))
    bottom = TOP + HEIGHT

    def at(x: float, y: float) -> tuple[float, float]:
        right = math.log(x / xs[0]) / math.log(xs[-1] / xs[0])
        up = math.log(max(y, low) / low) / math.log(high / low)
        return round(LEFT + right * (WIDTH - LEFT - RIGHT), 1), round(bottom - up * HEIGHT, 1)

    drawn = []
    for i, (name, points) in enumerate(lines.items()):
        placed = [at(x, y) for x, y in points]
        drawn.append(
            {
                "name": name,
                "color": LINES[i % len(LINES)],
                "mark": MARKS[i % len(MARKS)],
                "dashed": i >= len(LINES),
                "points": placed,
                "path": "M" + "L".join(f"{x} {y}" for x, y in placed),
                "texts": [f"{name}: {y:,.4g} at {x:,.0f}" for x, y in points],
            }
        )
    ends = [
        (name, ", ".join(f"{y:,.4g} at {x:,.0f}" for x, y in (points[0], points[-1])))
        for name, points in lines.items()
    ]
    return {
        "kind": "lines",
        "title": title,
        "axis": x_axis,
        "y_axis": y_axis,
        "lines": drawn,
        "width": WIDTH,
        "height": bottom + AXIS,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "bottom": bottom,
        "x_ticks": [(at(x, low)[0], f"{x:,.0f}") for x in spread(xs)],
        "y_ticks": [(at(xs[0], y)[1], tick(y)) for y in spread(steps(low, high), 7)],
        "alternative": f"{y_axis} by {x_axis}, both axes logarithmic. {listed(ends)}",
    }


def step_chart(
    title: str,
    steps: Sequence[str],
    series: Mapping[str, Sequence[float]],
    band: tuple[str, Sequence[float], Sequence[float]],
    x_axis: str,
    y_axis: str,
) -> Record:
    """Lines from 0 over named steps, at equal distances; band: a name, and its two edges.

    The band belongs to the last line, which is dashed.
    """
    bottom = TOP + HEIGHT
    largest = max(TINY, *band[2], *(y for line in series.values() for y in line))
    y_ticks = rounded_steps(largest)
    if y_ticks[-1] < largest:
        y_ticks.append(y_ticks[-1] + y_ticks[1])
    top = y_ticks[-1]
    across = (WIDTH - LEFT - RIGHT) / (len(steps) - 1)

    def at(i: int, y: float) -> tuple[float, float]:
        return round(LEFT + i * across, 1), round(bottom - y / top * HEIGHT, 1)

    def path(points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{x} {y}" for x, y in points)

    drawn = []
    for i, (name, values) in enumerate(series.items()):
        points = [at(j, y) for j, y in enumerate(values)]
        drawn.append(
            {
                "name": name,
                "color": STEP_LINES[i],
                "mark": MARKS[i],
                "dashed": i == len(series) - 1,
                "width": 6 if i == 0 else 2,  # seen below an equal one
                "points": points,
                "path": path(points),
                "texts": [f"{name}: {y:.3f} at {x}" for x, y in zip(steps, values, strict=True)],
            }
        )
    words, low, high = band
    edge = [at(j, y) for j, y in enumerate(low)]
    edge += [at(j, y) for j, y in reversed(list(enumerate(high)))]
    said = [
        (name, ", ".join(f"{y:.3f} at {x}" for x, y in zip(steps, values, strict=True)))
        for name, values in {**series, f"{words}, lowest": low, f"{words}, highest": high}.items()
    ]
    return {
        "kind": "lines",
        "title": title,
        "axis": x_axis,
        "y_axis": y_axis,
        "lines": drawn,
        "band": path(edge) + "Z",
        "width": WIDTH,
        "height": bottom + AXIS,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "bottom": bottom,
        "x_ticks": [(at(i, 0)[0], step) for i, step in enumerate(steps)],
        "y_ticks": [(at(0, y)[1], f"{y:g}") for y in y_ticks],
        "alternative": f"{y_axis} by {x_axis}. {listed(said)}",
    }


def histogram(title: str, edges: Sequence[float], counts: Sequence[float]) -> Record:
    """Columns of how many sequences have which length."""
    width, largest, bottom = WIDTH - LEFT - RIGHT, max(*counts, TINY), TOP + HEIGHT
    step = width / len(counts)
    texts = [
        (f"{edges[i]:,.0f} to {edges[i + 1]:,.0f} tokens", f"{count:,.0f} sequences")
        for i, count in enumerate(counts)
    ]
    return {
        "kind": "columns",
        "title": f"{title}, cut at {edges[-1]:,.0f} tokens",
        "axis": "tokens of a sequence",
        "y_axis": "sequences",
        "columns": [
            {
                "x": round(LEFT + i * step, 1),
                "y": round(bottom - HEIGHT * count / largest, 1),
                "width": round(max(step - 1, 0.5), 1),
                "height": round(HEIGHT * count / largest, 1),
                "text": ": ".join(texts[i]),
            }
            for i, count in enumerate(counts)
        ],
        "width": WIDTH,
        "height": bottom + AXIS,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "bottom": bottom,
        "x_ticks": [
            (round(LEFT + i * step, 1), f"{edges[i]:,.0f}") for i in spread(range(len(edges)))
        ],
        "y_ticks": [
            (round(bottom - HEIGHT * y / largest, 1), tick(y)) for y in rounded_steps(largest)
        ],
        "alternative": "How many sequences have which length. "
        + listed(text for text, count in zip(texts, counts, strict=True) if count),
    }


def listed(pairs: Any) -> str:
    return "; ".join(f"{name}: {text}" for name, text in pairs) + "."


def rounded_steps(largest: float, most: int = 4) -> list[float]:
    """0 and its multiples of 1, 2 or 5 times a power of ten, `most` steps or fewer."""
    power = 10.0 ** math.floor(math.log10(largest / most))
    step = next(x * power for x in (1, 2, 5, 10, 20) if most * x * power >= largest)
    return [i * step for i in range(int(largest / step + 1e-9) + 1)]


def decades(low: float, high: float) -> tuple[float, float]:
    """The powers of ten around an interval, at least one apart."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return 10.0**first, 10.0 ** max(last, first + 1)


def steps(low: float, high: float) -> list[float]:
    return [10.0**i for i in range(round(math.log10(low)), round(math.log10(high)) + 1)]


def spread(values: Sequence[Any], most: int = 5) -> list[Any]:
    """At most `most` of the values, with the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def tick(value: float) -> str:
    """1,000,000 as 1M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
