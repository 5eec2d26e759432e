"""Forwards read from their source."""

from __future__ import annotations

import torch
from torch import nn

from clinattn.integrations.formula import formula_of


class Decorated(nn.Module):
    @torch.no_grad()
    def forward(self, hidden_states):
        return self.dense(hidden_states)


class Twice(nn.Module):
    def forward(self, hidden_states):
        y = self.dense(hidden_states)
        return y + y


class Unread(nn.Module):
    def forward(self, hidden_states):
        y = self.dense(hidden_states)
        y = self.other(hidden_states)
        return y


class Branching(nn.Module):
    def forward(self, hidden_states):
        if self.training:
            return hidden_states
        return self.dense(hidden_states)


class Straight(nn.Module):
    def forward(self, hidden_states):
        """A docstring."""
        x = self.dense(hidden_states)
        first, second = x.chunk(2)
        hidden_states = self.act(first)
        return hidden_states * second


def test_formulas():
    for cls in (Decorated, Twice, Unread, Branching):
        assert formula_of(cls.forward) is None, cls
    both = "self.dense(hidden_states).chunk(2)"
    assert formula_of(Straight.forward) == f"self.act({both}[0]) * {both}[1]"
    assert formula_of(torch.relu) is None
