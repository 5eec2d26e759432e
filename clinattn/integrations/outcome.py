"""What became of a module whose attention was to be replaced."""

from __future__ import annotations

from typing import NamedTuple


class Outcome(NamedTuple):
    """replaced, or not and the reason why; detail says by what."""

    replaced: bool
    detail: str
