"""Modules of transformers that compute around linear layers, in the pass of the layer.

A class is known by what its forward computes, read from its source (formula.py), so that all the
classes that are the same code under other names are served, those of a model's own repository too.
Anything else keeps its code, with the linear layers in it replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clinattn.encoder.linear import is_wrapped, linear
from clinattn.integrations import stand_in
from clinattn.integrations.formula import formula_of
from clinattn.integrations.outcome import Outcome
from clinattn.integrations.stand_in import StandIn
from clinattn.integrations.torch.linear import Linear

# Activations of the compiled layers by the class that transformers has for them
ACTIVATIONS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",  # its name before 5.0
    "NewGELUActivation": "gelu_tanh",
}


def activation_of(act: Any) -> str | None:
    """The compiled layers' name for a module or function, None where it is to be called."""
    if isinstance(act, nn.Module):
        if is_wrapped(act):
            return None
        if type(act) is nn.GELU:
            return {"none": "gelu", "tanh": "gelu_tanh"}[act.approximate]
        if type(act) is nn.ReLU:
            return "relu"
        if type(act).__module__ == "transformers.activations":
            return ACTIVATIONS.get(type(act).__name__)
        return None
    return {F.gelu: "gelu", F.relu: "relu", torch.relu: "relu"}.get(act)


def activated_linear(
    layer: nn.Linear, x: Tensor, act: Any, norm: nn.Module | None = None
) -> Tensor:
    """norm(act(layer(x)))."""
    activation = activation_of(act)
    if activation is not None:
        return linear(layer, x, activation=activation, norm=norm)
    y = act(linear(layer, x))
    return y if norm is None else norm(y)


class AroundLinear(StandIn):
    """formula: what `method` returns in the classes served. layers: the attributes it calls."""

    formula: ClassVar[str]
    method: ClassVar[str] = "forward"
    layers: ClassVar[tuple[str, ...]] = ("dense",)
    dense: nn.Linear
    dropout: nn.Dropout
    LayerNorm: nn.LayerNorm


class PostNorm(AroundLinear):
    formula = "self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)"

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return linear(
            self.dense, hidden_states,
            dropout=self.dropout, residual=input_tensor, norm=self.LayerNorm,
        )  # fmt: skip


class Added(AroundLinear):
    formula = "self.dropout(self.dense(hidden_states)) + input_tensor"

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return linear(self.dense, hidden_states, dropout=self.dropout, residual=input_tensor)


class AddedInOrder(Added):
    formula = "input_tensor + self.dropout(self.dense(hidden_states))"


class AddedToResidual(AroundLinear):
    formula = "residual + self.dropout(self.dense(hidden_states))"

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return linear(self.dense, hidden_states, dropout=self.dropout, residual=residual)


class Activated(AroundLinear):
    formula = "self.intermediate_act_fn(self.dense(hidden_states))"
    intermediate_act_fn: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return activated_linear(self.dense, hidden_states, self.intermediate_act_fn)


class Transform(AroundLinear):
    """Transform before the decoder of masked language modelling."""

    formula = "self.LayerNorm(self.transform_act_fn(self.dense(hidden_states)))"
    transform_act_fn: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return activated_linear(self.dense, hidden_states, self.transform_act_fn, self.LayerNorm)


class TwoLayers(AroundLinear):
    formula = "self.fc2(self.activation_fn(self.fc1(hidden_states)))"
    layers = ("fc1", "fc2")
    fc1: nn.Linear
    fc2: nn.Linear
    activation_fn: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return linear(self.fc2, activated_linear(self.fc1, hidden_states, self.activation_fn))


class FeedForward(AroundLinear):
    """Feed-forward layers of DistilBERT, called by chunks of the sequence if configured so."""

    formula = "self.dropout(self.lin2(self.activation(self.lin1(input))))"
    method = "ff_chunk"
    layers = ("lin1", "lin2")
    lin1: nn.Linear
    lin2: nn.Linear
    activation: Callable[[Tensor], Tensor]

    def ff_chunk(self, input: Tensor) -> Tensor:
        x = activated_linear(self.lin1, input, self.activation)
        return linear(self.lin2, x, dropout=self.dropout)


class Gated(AroundLinear):
    """Feed-forward layers of ModernBERT; without an activation of ours, by their own code."""

    formula = (
        "self.Wo(self.drop(self.act(self.Wi(hidden_states).chunk(2, dim=-1)[0])"
        " * self.Wi(hidden_states).chunk(2, dim=-1)[1]))"
    )
    layers = ("Wi", "Wo")
    Wi: nn.Linear
    Wo: nn.Linear
    act: Callable[[Tensor], Tensor]
    drop: nn.Dropout

    def forward(self, hidden_states: Tensor) -> Tensor:
        activation = activation_of(self.act)
        if activation is None:
            return super().forward(hidden_states)  # type: ignore[misc]
        x = linear(self.Wi, hidden_states, activation=activation, gated=True, dropout=self.drop)
        return linear(self.Wo, x)


FAMILIES: tuple[type[AroundLinear], ...] = (
    PostNorm, Added, AddedInOrder, AddedToResidual, Activated, Transform, TwoLayers, FeedForward,
    Gated,
)  # fmt: skip


@cache
def family_of(cls: type) -> type[AroundLinear] | None:
    """The family that computes what a class of modules does, with the same parameters."""
    for family in FAMILIES:
        method, own = getattr(cls, family.method, None), getattr(family, family.method)
        if method is not None and formula_of(method) == family.formula:
            parameters, known = (tuple(inspect.signature(x).parameters) for x in (method, own))
            return family if parameters == known else None
    return None


@cache
def stand_in_of(cls: type) -> Any:
    """The class that takes the place of one that a family serves, under its name."""
    family = family_of(cls)
    if family is None:
        raise TypeError(f"clinattn: {cls.__name__} has no stand-in")
    return type(cls.__name__, (family, cls), {"replaces": cls, "__module__": __name__})


AroundLinear.stand_in_of = staticmethod(stand_in_of)


def adapt(module: nn.Module) -> Outcome | None:
    """Gives a module around replaced linear layers its stand-in; None if it is of no family."""
    if isinstance(module, AroundLinear):
        return Outcome(True, f"{module.formula}, in the pass of the linear layer")
    cls: Any = type(module)
    family = family_of(cls)
    if family is None:
        return None
    if family.method in vars(module):
        return Outcome(False, f"its {family.method} was overridden on the instance")
    for name in family.layers:
        layer = getattr(module, name)
        if type(layer) is not Linear:
            kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
            return Outcome(False, f"its {name} is a {kind}, which was not replaced")
    module.__class__ = stand_in_of(cls)
    return adapt(module)


def restore(module: nn.Module) -> bool:
    """Undoes adapt; returns whether there was something to undo."""
    return isinstance(module, AroundLinear) and stand_in.restore(module)
