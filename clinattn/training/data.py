"""Data that a run trains on: token sequences of two splits, and what their ids mean."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from clinattn.encoder.heads import IGNORE

from .standard import Standard

MOST_UNKNOWN = 0.05  # share of [UNK] in texts without a warning


@dataclass(frozen=True)
class Tokens:
    """Consecutive tokens: ids (N,) int64, and with an encoder that asks for them days or values.

    days: (N,) fp64, when each stands. values: (N,) fp32, NaN where there is none.
    """

    ids: Tensor
    days: Tensor | None = None
    values: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, at: slice | Tensor) -> Tokens:
        return Tokens(
            self.ids[at],
            None if self.days is None else self.days[at],
            None if self.values is None else self.values[at],
        )

    def mark(self, token: int, day: Tensor | None) -> Tokens:
        """A token that is no event, to stand among these: on `day`, and without a value."""
        return Tokens(
            torch.tensor([token]),
            None if day is None else day.reshape(1),
            None if self.values is None else torch.tensor([float("nan")]),
        )


def joined(parts: Sequence[Tokens]) -> Tokens:
    """The parts one after the other; all have days or none has, and so for values."""
    days = [part.days for part in parts if part.days is not None]
    values = [part.values for part in parts if part.values is not None]
    return Tokens(
        torch.cat([part.ids for part in parts]),
        torch.cat(days) if days else None,
        torch.cat(values) if values else None,
    )


@dataclass(frozen=True)
class Example(Tokens):
    """A sequence: [CLS], the static facts, and from `start` on the events or words.

    label: its class, or the number to predict; -100 without one. subject: whose it is, a number.
    part: the number of a window of a note, from 0, in the order of which they follow.
    """

    label: float = IGNORE
    subject: int = 0
    start: int = 1
    part: int = 0


def sequence(
    cls: int,
    static: Tokens,
    events: Tokens,
    label: float = IGNORE,
    subject: int = 0,
    *,
    end: int | None = None,
    part: int = 0,
) -> Example:
    """A sequence; [CLS] and static facts stand at the first event's time, or on day 0 without one.

    Static facts are known throughout: no time passes between static facts and the first event.
    end: of a token to be the last, at the last event's time.
    """
    first = last = None
    if static.days is not None and events.days is not None:
        first = events.days[0] if len(events) else static.days.new_zeros(())
        last = events.days[-1] if len(events) else first
        static = replace(static, days=first.expand(len(static)))
    marks = [] if end is None else [events.mark(end, last)]
    whole = joined([events.mark(cls, first), static, events, *marks])
    return Example(whole.ids, whole.days, whole.values, label, subject, 1 + len(static), part)


def windows(
    static: Tokens,
    events: Tokens,
    cls: int,
    max_tokens: int,
    subject: int = 0,
    *,
    end: int | None = None,
    overlap: float = 0.0,
) -> list[Example]:
    """events in pieces, each after [CLS] and the static facts, of max_tokens at most.

    static is cut to half of a sequence, and is a sequence by itself if there are no events. end: of
    a token behind each piece. overlap: the share of a piece that is in the next one too; with some,
    the last piece is as long as the others, and ends with the events.
    """
    taken = 1 if end is None else 2
    static = static.take(slice((max_tokens - taken) // 2))
    room = max_tokens - taken - len(static)
    return [
        sequence(cls, static, events.take(slice(at, at + room)), subject=subject, end=end, part=i)
        for i, at in enumerate(starts_of(len(events), room, overlap))
    ]


def starts_of(count: int, room: int, overlap: float) -> list[int]:
    """Beginnings of pieces of `room` that together cover `count` events or words."""
    if not overlap:
        return list(range(0, max(count, 1), room))
    step = max(1, room - round(overlap * room))
    last = max(0, count - room)
    return [*range(0, last, step), last]


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
    train: list[Example]
    held_out: list[Example]
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
            if not examples:
                raise ValueError(f"{self.source}: no sequence is in the split {name!r}")
        if len(self.tokens) == len(self.special):
            raise ValueError(f"{self.source}: no token is left besides the special ones")

    def ordinary(self) -> Tensor:
        """(V,) bool: the ids that are content."""
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

    def fingerprint(self) -> str:
        """A hash that is the same for the same sequences, labels and ids, wherever they were read.

        Days and values count where there are any, and for pairs whose the sequences are.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.tokens, sorted(self.special), self.classes)).encode())
        for split in (self.train, self.held_out):
            for example in split:
                digest.update(f"{len(example)} {example.label} ".encode())
                if self.sep is not None:
                    digest.update(f"{example.subject} {example.start} ".encode())
                for column in (example.ids, example.days, example.values):
                    if column is not None:
                        digest.update(column.numpy().tobytes())
        return digest.hexdigest()


def unigram_entropy(corpus: Corpus) -> float:
    """Entropy in nats of the held-out sequences' content: no unigram model has a lower loss."""
    counts = torch.bincount(
        torch.cat([example.ids for example in corpus.held_out]), minlength=len(corpus.tokens)
    )[corpus.ordinary()]
    p = counts[counts > 0].double() / counts.sum()
    return float(-(p * p.log()).sum())
