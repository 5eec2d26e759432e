"""Cases to explain without a trained model: a classifier whose answer is known by construction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from clinattn.tools.explanation.case import Case, Group, Unit, shown
from clinattn.tools.explanation.explain import explained
from clinattn.tools.explanation.settings import ExplainSettings


@dataclass
class Sum:
    """The logit of the second class is the sum of the weights of the tokens that are there."""

    weights: Tensor
    module: nn.Module
    classes: tuple[str, ...] = ("absent", "present")
    independent: bool = False
    baseline: None = None

    @property
    def inputs(self):
        return {"ids": torch.arange(len(self.weights))[None]}

    def logits(self, kept: Sequence[Tensor]) -> Tensor:
        return torch.stack(
            [torch.stack([torch.zeros(()), self.weights[x].sum()]) for x in kept]
        ).double()

    def without_attention(self) -> str:
        return "the sum has none"


class Summing(nn.Module):
    def __init__(self, weights: Tensor):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(weights[:, None])
        self.eval()

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, ids: Tensor) -> SimpleNamespace:
        total = self.embedding(ids).sum(1)
        return SimpleNamespace(logits=torch.cat([0 * total, total], 1))


def case_of(weights: Sequence[float], units: Sequence[Unit], **known) -> Case:
    """The first weight is that of [CLS]; each unit is one token."""
    x = torch.tensor(weights)
    return Case(Sum(x, Summing(x)), units=units, of_token=torch.arange(-1, len(units)), **known)


def timeline(count: int, names: Sequence[str] | None = None, visits: int = 3) -> Case:
    """A timeline of so many events; the fourth speaks most for, the third most against."""
    weights = [0.0, *(0.01 * (i % 7 - 3) for i in range(count))]
    weights[3:5] = [-2.0, 3.0]
    each = -(-count // visits)
    units = [
        Unit(
            names[i % len(names)] if names else f"LAB:{50_000 + i % 400}:mg",
            f"{i % 90}.5",
            "A measurement with a longer name" if i % 3 else "",
            f"2180-{1 + i // each:02d}-03 {i % each * 60 // each // 4 + 8:02d}:{i % 4:02d}",
            True,
            i // each,
        )
        for i in range(count)
    ]
    groups = [
        Group(f"Visit {i + 1}", units[i * each].when, units[min((i + 1) * each, count) - 1].when)
        for i in range(visits)
    ]
    return case_of(
        weights, units, title="patient 7", unit="event", groups=groups, facts={"model": "a sum"}
    )


def note(text: str, weights: Sequence[float] | None = None) -> Case:
    """A note of words between spaces."""
    units, at = [], 0
    for word in text.split():
        at = text.index(word, at)
        units.append(Unit(shown(word), span=(at, at + len(word))))
        at += len(word)
    given = [0.0, *(weights or [0.1 * (i % 5 - 2) for i in range(len(units))])]
    return case_of(given, units, title="note n.txt", unit="word", text=text, read=at)


def record_of(case: Case, **changes) -> dict:
    """The record, by two methods that need no attention."""
    known = {"methods": ("gradient_x_input", "integrated_gradients"), "target": "present"}
    settings = ExplainSettings("model", **known | {"data": "meds:x", "patient": "7"} | changes)
    return explained(case, settings, lambda *_: None)
