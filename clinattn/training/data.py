"""Data that a run trains on: token sequences of two splits, and what their ids mean."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .examples import Examples, Listed
from .standard import Standard

MOST_UNKNOWN = 0.05  # share of [UNK] in texts without a warning


@dataclass(frozen=True)
class Target:
    """column: of task labels. mean, scale: of numbers, on the training sequences; None for classes.

    A model of numbers predicts the number less its mean, over the scale.
    """

    column: str
    mean: float | None = None
    scale: float | None = None


@dataclass(frozen=True)
class Corpus:
    """tokens[i] is what id i stands for; special: the ids that are no content; mask: [MASK]'s.

    held_out: what is not trained on, but evaluated while training; evaluated is its name.
    sep: [SEP]'s id, where sequences are to be made pairs. standard: what values were divided by.
    split: Division.record of workloads.splits, for checkpoints. target: what task labels hold.
    unknown: [UNK]'s id in texts, None for other data. tokenizer: of texts, as JSON.
    """

    source: str
    tokens: tuple[str, ...]
    special: frozenset[int]
    mask: int
    train: Examples
    held_out: Listed
    classes: tuple[str, ...] = ()
    sep: int | None = None
    standard: Standard | None = None
    evaluated: str = "held_out"
    split: dict[str, str] = field(default_factory=lambda: {"by": "hash"})
    target: Target | None = None
    unknown: int | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        for name, examples in (("train", self.train), (self.evaluated, self.held_out)):
            if not len(examples):
                raise ValueError(f"{self.source}: no sequence is in the split {name!r}")
        if len(self.tokens) == len(self.special):
            raise ValueError(f"{self.source}: no token is left besides the special ones")

    def ordinary(self) -> Tensor:
        """(V,) bool: the ids that are content; asked for with each sequence, and made once."""
        return self._ordinary

    @cached_property
    def _ordinary(self) -> Tensor:
        kept = torch.ones(len(self.tokens), dtype=torch.bool)
        kept[sorted(self.special)] = False
        return kept

    def warnings(self) -> list[str]:
        """A line for each split of texts of which too much is [UNK]."""
        if self.unknown is None:
            return []
        ordinary, found = self.ordinary(), []
        for name, split in (("training", self.train), ("held-out", self.held_out)):
            ids = torch.cat([example.ids for example in split])
            unknown = int((ids == self.unknown).sum())
            share = unknown / max(1, unknown + int(ordinary[ids].sum()))
            if share > MOST_UNKNOWN:
                remedy = (
                    "--vocabulary N trains a tokenizer on these texts (or --tokenizer names one), "
                    "and --min-count 1 keeps rare words"
                    if self.tokenizer is None
                    else "expected a tokenizer made for such texts: --tokenizer, or --vocabulary N"
                )
                found.append(f"{share:.1%} of the {name} tokens are [UNK]: {remedy}")
        return found

    @cached_property
    def fingerprint(self) -> str:
        """A hash that is the same for the same sequences, labels and ids, wherever they were read.

        Days and values count where there are any.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.tokens, sorted(self.special), self.classes)).encode())
        for split in (self.train, self.held_out):
            split.feed(digest)
        return digest.hexdigest()

    @cached_property
    def unigram_entropy(self) -> float:
        """In nats, of the held-out sequences' content: no unigram model has a lower loss."""
        ids = torch.cat([example.ids for example in self.held_out])
        counts = torch.bincount(ids, minlength=len(self.tokens))[self.ordinary()]
        p = counts[counts > 0].double() / counts.sum()
        return float(-(p * p.log()).sum())
