"""Gains of an encoder's ways over each other: of the kernels, of packing, and of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]

# The name of a gain, the way that has it, and the way that it is over.
KERNELS = ("the kernels alone", "clinattn_padded", "sdpa_padded")
PACKING = ("packing alone", "clinattn_packed", "clinattn_padded")
PARTS = (
    KERNELS,
    PACKING,
    ("kernels and packing", "clinattn_packed", "sdpa_padded"),
    ("sorting by length, in torch", "sdpa_bucketed", "sdpa_padded"),
    ("kernels and packing, over sorting", "clinattn_packed", "sdpa_bucketed"),
)


@dataclass(frozen=True)
class Gain:
    """ratio: of median tokens/s in a mode, of `way` over `over`.

    apart: whether the rounds of both differ by more than they scatter: their quartiles do not meet.
    """

    what: str
    mode: str
    way: str
    over: str
    ratio: float
    apart: bool


def gains(rows: Sequence[Record]) -> list[Gain]:
    """The gain of each part in each mode, of those whose both ways were measured."""
    found = {(row["mode"], row["variant"]): row["tokens_per_s"] for row in rows}
    return [
        gain(what, mode, (way, found[mode, way]), (over, found[mode, over]))
        for what, way, over in PARTS
        for mode in dict.fromkeys(row["mode"] for row in rows)
        if (mode, way) in found and (mode, over) in found
    ]


def best_gains(rows: Sequence[Record]) -> list[Gain]:
    """The gain in each mode of clinattn's fastest way over the fastest of torch."""
    found = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        own = {r["variant"]: r["tokens_per_s"] for r in rows if r["mode"] == mode}
        best = {}
        for side in ("clinattn", "sdpa"):
            of_side = [way for way in own if way.startswith(f"{side}_")]
            if of_side:
                best[side] = max((own[way]["median"], way) for way in of_side)[1]
        if len(best) == 2:
            ways = [(best[side], own[best[side]]) for side in ("clinattn", "sdpa")]
            found.append(gain("the fastest of both", mode, *ways))
    return found


def gain(what: str, mode: str, way: tuple[str, Record], over: tuple[str, Record]) -> Gain:
    """way, over: an identifier, and the median and quartiles of its tokens/s."""
    (name, rate), (other, theirs) = way, over
    apart = rate["q1"] > theirs["q3"] or rate["q3"] < theirs["q1"]
    return Gain(what, mode, name, other, rate["median"] / theirs["median"], apart)
