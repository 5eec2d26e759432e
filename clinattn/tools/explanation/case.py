"""The case that is explained: a sequence, in the words or events that a reader knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Unit:
    """A word of a text or an event of a timeline.

    name: a word, or a code. description: what a code means, where the data say it. span: of a
    word, its place in the text. when: of an event; "" for a static fact. known: False
    where the model reads [UNK]. group: the index of its visit.
    """

    name: str
    value: str = ""
    description: str = ""
    when: str = ""
    known: bool = True
    group: int = 0
    span: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Group:
    """A visit: consecutive events of a timeline, without a long gap."""

    title: str
    first: str = ""
    last: str = ""


class Model(Protocol):
    """A classifier of one kind, and the sequence that it was given."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def independent(self) -> bool:
        """Each class has a probability for itself."""

    @property
    def inputs(self) -> Mapping[str, Any]:
        """The arguments of a call with the whole sequence, a batch of one."""

    @property
    def baseline(self) -> Any:
        """Inputs without content, in the form that `attribute` takes as its baseline."""

    def logits(self, kept: Sequence[Tensor]) -> Tensor:
        """(S, classes) of the sequence with only the tokens kept, indices (n,) of each."""

    def without_attention(self) -> str | None:
        """Returns the reason why no method that reads attention serves the model, or None."""


@dataclass(frozen=True)
class Case:
    """A model's sequence as a reader knows it.

    title: who or what. subject: in a sentence. unit: what a unit is called, "event" or "word".
    of_token: (N,) the unit of each token, -1 for [CLS] and its like. text: of a note, with its end
    that the model did not read from `read`. predicted: what a class means, where that is known.
    facts: for the table of where numbers come from. checkpoint: the SHA-256 of the model's file or
    folder. warnings: what a reader has to know before any number.
    """

    model: Model
    title: str
    unit: str
    units: Sequence[Unit]
    of_token: Tensor
    groups: Sequence[Group] = ()
    text: str | None = None
    read: int = 0
    predicted: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str = ""
    warnings: Sequence[str] = ()

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.model.independent else logits.softmax(-1)

    def without(self, units: Tensor) -> Tensor:
        """Indices of the tokens that stay when units, (n,) indices, are taken away."""
        gone = torch.zeros(len(self.units) + 1, dtype=torch.bool)
        gone[units] = True
        return (~gone[self.of_token]).nonzero().squeeze(1)  # -1 is the last, which stays


Progress = Callable[[str, int, int], None]


def shown(text: str) -> str:
    """A text without control characters, which neither a terminal nor a page should get."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
