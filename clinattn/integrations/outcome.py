"""The outcome of replacing the attention of a module."""

from __future__ import annotations

from typing import NamedTuple


class Outcome(NamedTuple):
    """replaced: whether attention was replaced. detail: by what, or the reason why not.

    container: whether all of this is about modules inside, which have outcomes of their own.
    """

    replaced: bool
    detail: str
    container: bool = False
