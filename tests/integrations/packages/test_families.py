"""Families of modules of transformers, each known by the formula of its forward."""

from __future__ import annotations

import inspect

from torch import nn

from clinattn.integrations.formula import formula_of
from clinattn.integrations.transformers import around_linear


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
