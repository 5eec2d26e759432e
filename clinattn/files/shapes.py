"""Shapes that values of a file must have, of names, kinds and lists; says where one differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LARGEST = 1e30  # of a number: its sums, products and digits stay in bounds
SHOWN = 40  # characters of a value in a message
CALLED = {type(None): "null", list: "a list", dict: "named values"}


@dataclass(frozen=True)
class Kind:
    """expected: as a message calls it."""

    expected: str
    fits: Callable[[Any], bool]

    def __or__(self, other: Kind) -> Kind:
        return Kind(
            f"{self.expected} or {other.expected}", lambda x: self.fits(x) or other.fits(x)
        )


@dataclass(frozen=True)
class Named:
    """A mapping. required, optional: the shapes under its names; others: of any other name.

    closed: another name is an error.
    """

    required: dict[str, Shape]
    optional: dict[str, Shape] | None = None
    others: Shape | None = None
    closed: bool = False


@dataclass(frozen=True)
class Each:
    """A list or tuple of `least` items or more."""

    item: Shape
    least: int = 0


Shape = Kind | Named | Each


def is_number(value: Any) -> bool:
    """A finite one; True and False are none."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and -LARGEST < value < LARGEST
    )


TEXT = Kind("a text", lambda x: isinstance(x, str))
NOTHING = Kind("null", lambda x: x is None)
FLAG = Kind("true or false", lambda x: isinstance(x, bool))
NUMBER = Kind("a number", is_number)
NOT_NEGATIVE = Kind("a number of at least 0", lambda x: is_number(x) and x >= 0)
POSITIVE = Kind("a number above 0", lambda x: is_number(x) and x > 0)
COUNT = Kind("a whole number of at least 0", lambda x: NOT_NEGATIVE.fits(x) and type(x) is int)
ANYTHING = Kind("anything", lambda x: True)


def require(value: Any, shape: Shape, where: str = "") -> None:
    """Raises ValueError that says where the value differs, what is there and what was expected."""
    if isinstance(shape, Kind):
        if not shape.fits(value):
            raise ValueError(f"{where or 'it'} is {shown(value)}: expected {shape.expected}")
    elif isinstance(shape, Each):
        if not isinstance(value, (list, tuple)) or len(value) < shape.least:
            expected = "a list" + (f" of {shape.least} or more" if shape.least else "")
            raise ValueError(f"{where or 'it'} is {shown(value)}: expected {expected}")
        for i, item in enumerate(value):
            require(item, shape.item, f"{where}[{i}]")
    else:
        if not isinstance(value, dict):
            raise ValueError(f"{where or 'it'} is {shown(value)}: expected named values")
        known = shape.required | (shape.optional or {})
        for name in shape.required:
            if name not in value:
                raise ValueError(f"{_path(where, name)} is missing")
        for name, own in value.items():
            if name not in known and shape.closed:
                raise ValueError(f"{_path(where, name)} is unknown: expected {sorted(known)}")
            require(own, known.get(name, shape.others or ANYTHING), _path(where, name))


def _path(where: str, name: Any) -> str:
    """name as it is where it is a word, else quoted: it comes from the file."""
    plain = isinstance(name, str) and name.isidentifier() and len(name) < SHOWN
    said = name if plain else shown(name)
    return f"{where}.{said}" if where else str(said)


def shown(value: Any) -> str:
    """A value in a message: short, and on one line."""
    if isinstance(value, (str, bool, float)):
        text = repr(value)
    elif isinstance(value, int):
        text = str(value) if abs(value) < LARGEST else "too large"
    else:
        text = CALLED.get(type(value), type(value).__name__)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
