"""Shades of a page's words and events: for and against a class, in five steps.

Blue and orange differ for colour-blind readers; an underline, solid or dotted and thicker with the
step, says the same without colour.
"""

from __future__ import annotations

from clinattn.tools.report.colors import DARK, LIGHT

HUES = {"for": "line3", "against": "line2"}
STEPS = (0.05, 0.15, 0.3, 0.5, 0.75)  # of the largest score, where each step begins
MIXED = (0.12, 0.2, 0.3, 0.4, 0.5)  # of the hue, with the page


def step(score: float, largest: float) -> int:
    """0 to 5; 0 is not shaded."""
    return sum(abs(score) >= least * largest for least in STEPS) if largest else 0


def mixed(page: str, hue: str, share: float) -> str:
    """The colour with that share of hue; all are #rrggbb."""
    pairs = [(int(page[i : i + 2], 16), int(hue[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)


def shades(scheme: dict[str, str]) -> dict[str, str]:
    """The names and colours of all shades, light or dark, such as for1 and against5."""
    return {
        f"{side}{i}": mixed(scheme["page"], scheme[hue], share)
        for side, hue in HUES.items()
        for i, share in enumerate(MIXED, 1)
    }


SHADES = {"light": shades(LIGHT), "dark": shades(DARK)}
