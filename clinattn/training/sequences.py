"""Token sequences with times and values, and how they are cut from events and words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from clinattn.encoder.heads import IGNORE


class Digest(Protocol):
    """A hash of hashlib."""

    def update(self, content: bytes, /) -> None: ...


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

    def feed(self, digest: Digest) -> None:
        """Tells a hash what the tokens are; days and values where there are any."""
        for column in (self.ids, self.days, self.values):
            if column is not None:
                digest.update(column.numpy().tobytes())

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
