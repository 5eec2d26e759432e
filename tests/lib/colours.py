"""Contrast and distance of colours, also as colour-blind readers see them."""

from __future__ import annotations

# Linear sRGB as people without one kind of cones see it: Machado, Oliveira and Fernandes 2009.
SEEN = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}  # fmt: skip


def linear(color: str) -> list[float]:
    """Linear sRGB of #rrggbb."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2."""
    bright = [sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear(c), strict=True))
              for c in (one, other)]  # fmt: skip
    return (max(bright) + 0.05) / (min(bright) + 0.05)


def lab(rgb: list[float]) -> tuple[float, float, float]:
    """CIELAB of linear sRGB, white D65."""
    r, g, b = (min(1.0, max(0.0, x)) for x in rgb)
    x = (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.95047
    y = 0.2126 * r + 0.7152 * g + 0.0722 * b
    z = (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.08883
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def distance(one: str, other: str, seen) -> float:
    """Distance in CIELAB of two colours as somebody sees them; 2.3 is just noticed."""
    points = [lab([sum(a * b for a, b in zip(row, linear(c), strict=True)) for row in seen])
              for c in (one, other)]  # fmt: skip
    return sum((a - b) ** 2 for a, b in zip(*points, strict=True)) ** 0.5
