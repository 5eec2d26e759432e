"""Notes longer than a model: windows that overlap, and one answer for a note from its windows.

A classifier is trained on each window with the label of its note, and answers by note, as Huang,
Altosaar and Ranganath do (ClinicalBERT, 2019, arXiv:1904.05342).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clinattn.workloads import Vocabulary

from .sequences import Example, Tokens, windows

FIRST = "first"
HALF = 2  # Huang et al.: windows beyond which the mean counts for more than the largest


def note_windows(
    ids: Tensor, vocabulary: Vocabulary, max_tokens: int, overlap: float = 0.0, pool: str = "mean"
) -> list[Example]:
    """The windows (N,) of a note's token ids (E,), special tokens included, of max_tokens at most.

    Each begins where `overlap`, a share of it, is left of the one before; the last ends with the
    note. All tokens are read, but with the pooling FIRST only the first window.
    """
    nothing = Tokens(ids[:0])
    found = windows(
        nothing, Tokens(ids), vocabulary.cls, max_tokens, end=vocabulary.end, overlap=overlap
    )
    return found[:1] if pool == FIRST else found


def notes_of(examples: Sequence[Example]) -> list[slice]:
    """A slice of the examples, which are in order, for the windows of each note."""
    starts = [i for i, example in enumerate(examples) if example.part == 0]
    return [slice(i, j) for i, j in zip(starts, [*starts[1:], len(examples)], strict=True)]


def _mean(logits: Tensor) -> Tensor:
    return logits.mean(0)


def _max(logits: Tensor) -> Tensor:
    return logits.amax(0)


def _readmission(logits: Tensor) -> Tensor:
    """log of (largest + mean * n / HALF) / (1 + n / HALF), of probabilities; softmax gives them."""
    p, weight = logits.softmax(-1), len(logits) / HALF
    found = (p.amax(0) + weight * p.mean(0)) / (1 + weight)
    return found.clamp(min=torch.finfo(p.dtype).tiny).log()


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": _mean,
    "max": _max,
    "readmission": _readmission,
    FIRST: lambda logits: logits[0],
}
PHRASES = {
    "mean": "the mean of the windows' logits",
    "max": "the largest logit of each class",
    "readmission": "largest and mean probability, the mean for more in long notes (Huang 2019)",
    FIRST: "only the first window is read, in training too",
}


def pooled(logits: Tensor, pool: str) -> Tensor:
    """The logits (C,), fp64, of a note from those of its windows (W, C), whatever was beside them.

    A note of one window keeps its own.
    """
    logits = logits.double()
    return logits[0] if len(logits) == 1 else POOLS[pool](logits)


def by_note(logits: Tensor, examples: Sequence[Example], pool: str) -> Tensor:
    """The logits of each note (S, C), fp64, from those of all examples (N, C)."""
    return torch.stack([pooled(logits[at], pool) for at in notes_of(examples)])
