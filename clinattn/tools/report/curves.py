"""A chart of shares against shares: a curve over linear axes from 0, beside the diagonal."""

from __future__ import annotations

from collections.abc import Sequence

from clinattn.tools.report.charts import (
    AXIS,
    HEIGHT,
    LEFT,
    MARKS,
    RIGHT,
    TINY,
    TOP,
    WIDTH,
    Record,
    rounded_steps,
)

Point = Sequence[float]  # two


def share_chart(
    title: str,
    curve: tuple[str, Sequence[Point]],
    diagonal: str,
    x_axis: str,
    y_axis: str,
    band: tuple[Sequence[Point], Sequence[Point]] | None = None,
    marked: bool = True,
) -> Record:
    """Curve and diagonal, each with its name. band: the lower and the upper edge of the curve's.

    marked: points have marks, and their numbers are said; of a curve of many, ten are.
    """
    name, points = curve
    edges = [] if band is None else [*band[0], *reversed(band[1])]
    largest = max(TINY, *(x for point in (*points, *edges) for x in point))
    ticks = rounded_steps(largest)
    if ticks[-1] < largest - 1e-9:
        ticks.append(ticks[-1] + ticks[1])
    top, bottom = ticks[-1], TOP + HEIGHT

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            round(LEFT + x / top * (WIDTH - LEFT - RIGHT), 1),
            round(bottom - y / top * HEIGHT, 1),
        )

    def path(given: Sequence[Point]) -> str:
        return "M" + "L".join("{} {}".format(*at(*point)) for point in given)

    said = points if marked else points[:: max(1, len(points) // 10)]
    texts = [f"{y:.3f} at {x:.3f}" for x, y in said]
    shaded = {} if band is None else {"band": path(edges) + "Z"}
    return {
        "kind": "lines",
        "title": title,
        "axis": x_axis,
        "y_axis": y_axis,
        "lines": [
            {
                "name": name,
                "color": "line3",
                "mark": MARKS[0] if marked else "",
                "dashed": False,
                "points": [at(*point) for point in points] if marked else [],
                "path": path(points),
                "texts": texts,
            },
            {
                "name": diagonal,
                "color": "line1",
                "mark": "",
                "dashed": True,
                "points": [],
                "path": path([(0, 0), (top, top)]),
                "texts": [],
            },
        ],
        "width": WIDTH,
        "height": bottom + AXIS,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "bottom": bottom,
        "x_ticks": [(at(x, 0)[0], f"{x:g}") for x in ticks],
        "y_ticks": [(at(0, y)[1], f"{y:g}") for y in ticks],
        "alternative": f"{y_axis} by {x_axis}. {name}: {', '.join(texts)}.",
        **shaded,
    }
