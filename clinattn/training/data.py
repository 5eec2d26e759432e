"""What a run trains on: token sequences of two splits, and what their ids mean."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clinattn.encoder.heads import IGNORE


class Example(NamedTuple):
    """One sequence, [CLS] first: ids (N,) int64. label: its class, -100 without one."""

    ids: Tensor
    label: int = IGNORE


@dataclass(frozen=True)
class Corpus:
    """tokens[i] is what id i stands for; special: the ids that are no content; mask: [MASK]'s."""

    source: str
    tokens: tuple[str, ...]
    special: frozenset[int]
    mask: int
    train: list[Example]
    held_out: list[Example]
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("train", "held_out"):
            if not getattr(self, name):
                raise ValueError(f"{self.source}: no sequence is in the split {name!r}")
        if len(self.tokens) == len(self.special):
            raise ValueError(f"{self.source}: no token is left besides the special ones")

    def ordinary(self) -> Tensor:
        """(V,) bool: the ids that are content."""
        kept = torch.ones(len(self.tokens), dtype=torch.bool)
        kept[sorted(self.special)] = False
        return kept

    def fingerprint(self) -> str:
        """The same for the same sequences, labels and ids, wherever they were read."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.tokens, sorted(self.special), self.classes)).encode())
        for split in (self.train, self.held_out):
            for ids, label in split:
                digest.update(f"{len(ids)} {label} ".encode() + ids.numpy().tobytes())
        return digest.hexdigest()


def windows(static: Tensor, events: Tensor, cls: int, max_tokens: int) -> list[Tensor]:
    """events in pieces, each after [CLS] and the static ids, of max_tokens at most.

    static is cut to half of a sequence, and is a sequence by itself if there are no events.
    """
    prefix = torch.cat([torch.tensor([cls]), static[: (max_tokens - 1) // 2]])
    pieces = events.split(max_tokens - len(prefix)) if len(events) else [events]
    return [torch.cat([prefix, piece]) for piece in pieces]


def unigram_entropy(corpus: Corpus) -> float:
    """In nats, of the content of the held-out sequences: no unigram model has a lower loss."""
    counts = torch.bincount(
        torch.cat([ids for ids, _ in corpus.held_out]), minlength=len(corpus.tokens)
    )[corpus.ordinary()]
    p = counts[counts > 0].double() / counts.sum()
    return float(-(p * p.log()).sum())
