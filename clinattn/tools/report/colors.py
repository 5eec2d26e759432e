"""Colours of the page and of the plots, in light and dark.

Lines and bars differ for colour-blind readers, and stand out from the page at 3 to 1 or more;
texts do at 4.5 to 1. Bars have their names beside them, and lines a mark of their own.
"""

from __future__ import annotations

LIGHT = {
    "ink": "#1b1f24",
    "soft": "#57606a",
    "page": "#ffffff",
    "panel": "#f6f8fa",
    "line": "#8c959f",
    "warn": "#953800",
    "link": "#0550ae",
    "line0": "#00634a",
    "line1": "#868e96",
    "line2": "#cc5500",
    "line3": "#0072b2",
    "line4": "#e0307a",
    "line5": "#1b1f24",
}
DARK = {
    "ink": "#e6edf3",
    "soft": "#9da7b1",
    "page": "#0d1117",
    "panel": "#161b22",
    "line": "#6e7681",
    "warn": "#fdba74",
    "link": "#79b8ff",
    "line0": "#7ee2b8",
    "line1": "#8b949e",
    "line2": "#f0883e",
    "line3": "#58a6ff",
    "line4": "#d670c0",
    "line5": "#f0f6fc",
}
TEXTS = ("ink", "soft", "warn", "link")
LINES = tuple(name for name in LIGHT if name.startswith("line") and name != "line")
WAYS = {  # an encoder's way always has the same colour
    "clinattn_packed": "line0",
    "sdpa_padded": "line1",
    "clinattn_padded": "line2",
    "sdpa_bucketed": "line3",
}
OTHER_WAY = "line4"


def bar_color(variant: str) -> str:
    """Returns the name of the colour of an encoder's way; unknown ways share one."""
    return WAYS.get(variant, OTHER_WAY)
