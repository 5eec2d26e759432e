"""Forwards read from their source, and the families that are known by them."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from clinattn.integrations.formula import formula_of
from clinattn.integrations.transformers import around_linear


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


def test_a_formula_under_other_parameters_is_of_no_family():
    class Moved(nn.Module):
        def forward(self, input_tensor, hidden_states):
            return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)

    assert formula_of(Moved.forward) == around_linear.PostNorm.formula
    assert around_linear.family_of(Moved) is None


def test_families_name_what_their_formula_calls():
    for family in around_linear.FAMILIES:
        assert all(f"self.{name}(" in family.formula for name in family.layers)
        method = getattr(family, family.method)
        names = set(inspect.signature(method).parameters) - {"self"}
        assert all(f"({name})" in family.formula or f"+ {name}" in family.formula
                   or f"{name} +" in family.formula for name in names)  # fmt: skip
