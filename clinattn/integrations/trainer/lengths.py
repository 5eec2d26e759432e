"""Lengths of the sequences of a dataset."""

from __future__ import annotations

from typing import Any


def lengths_of(dataset: Any, column: str = "length", progress: bool = True) -> list[int]:
    """Returns the tokens of each sequence: those of a column, else counted.

    dataset: a map-style dataset, of `datasets` or other. column: the name of a column with lengths,
    used where the dataset has it. Otherwise every feature is read once: its length is the sum of
    its attention_mask, or that of its input_ids. progress: shows a bar on a terminal, where tqdm is
    installed.

    Raises TypeError for a dataset without a length, and for features without input_ids.
    """
    if column in (getattr(dataset, "column_names", None) or ()):
        return [int(x) for x in dataset[column]]
    try:
        n = len(dataset)
    except TypeError:
        raise TypeError(
            f"dataset: {type(dataset).__name__} has no length; expected a map-style dataset, whose "
            "sequences can be put into batches by a budget"
        ) from None
    return [length_of(dataset[i]) for i in _watched(n, progress)]


def length_of(feature: Any) -> int:
    """The tokens of a feature; those that its attention_mask hides do not count."""
    try:
        ids, mask = feature["input_ids"], feature.get("attention_mask")
    except (AttributeError, KeyError, IndexError, TypeError):
        raise TypeError(
            f"dataset: got a feature of {type(feature).__name__} without input_ids, expected a "
            "dict with input_ids (N,)"
        ) from None
    return len(ids) if mask is None else sum(1 for x in mask if x)


def _watched(n: int, progress: bool) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return range(n)
    return tqdm(range(n), "lengths", disable=None if progress else True)
