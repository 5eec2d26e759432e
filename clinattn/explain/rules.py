"""AttnLRP (Achtibat et al., 2024) on the graph that autograd has of a model, as it is.

Relevance is input times gradient, where each node of the graph has the gradient of its rule:

- attention: the gradients of q, k and v are divided by 4, 4 and 2, as each of its two products
  gives half to either factor, and softmax keeps its gradient;
- another product of two activations, a gate for one: divided by 2;
- an activation act(x), one function or written out: act(x) / x in place of act'(x), the identity
  rule;
- a norm: its statistics are constants;
- what is linear: as it is.

No module is changed, so the rules hold for the code of any model. A node that has no rule is
refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clinattn.encoder.linear_op import LAYER_NORM, Linear, Norm, activated
from clinattn.explain.gates import closed_by_activation
from clinattn.operator.bare import BareAttention
from clinattn.operator.functions import DirectAttention, FusedAttention
from clinattn.operator.rotary import Rotary

Grads = tuple[Tensor | None, ...]
Hook = Callable[[Grads, Grads], Grads | None]  # of the gradients of tensors alone

# Nodes of torch, by what stands before "Backward", whose gradient is that of their rule: what is
# linear in each input alone, relu, softmax
UNCHANGED = frozenset(
    """
    Add Sub Rsub Neg Sum Mean Cumsum View UnsafeView ReshapeAlias Alias Transpose T Permute Expand
    Squeeze Unsqueeze Slice Select Split SplitWithSizes SafeSplit Unbind Cat Stack Index IndexSelect
    IndexCopy IndexPut IndexAdd Gather MaskedFill MaskedScatter Where Clone ToCopy ConstantPadNd
    Roll Flip Repeat AsStrided Copy CopySlices SegmentReduce Relu Threshold Softmax SafeSoftmax
    Tril Triu
    """.split()
)
# Products: the places of their two factors among the inputs of the node
PRODUCTS = {
    "Mul": (0, 1), "Mm": (0, 1), "Mv": (0, 1), "Bmm": (0, 1), "Dot": (0, 1), "Linear": (0, 1),
    "MkldnnLinear": (0, 1), "Addmm": (1, 2), "Baddbmm": (1, 2), "Addmv": (1, 2),
}  # fmt: skip
# The nodes by which norms that are written out divide
STATISTICS = frozenset({"Rsqrt"})
ATTENTION = (BareAttention, DirectAttention, FusedAttention)
OF_ATTENTION = (4, 4, 2)  # q, k, v


def apply(score: Tensor, x: Tensor) -> None:
    """Gives each node between x, a leaf, and score the gradient of its rule.

    Raises NotImplementedError for a node that has none.
    """
    reaches = _reaching(score, x)
    seen: set[Any] = set()
    stack: list[Any] = [score.grad_fn]
    while stack:
        node = stack.pop()
        on_the_way = node is not None and (reaches[node] or name_of(node) in STATISTICS)
        if node in seen or not on_the_way or getattr(node, "variable", None) is x:
            continue
        seen.add(node)
        closed = closed_by_activation(node, reaches, name_of)
        if closed is None:
            reaching = tuple(reaches.get(before, False) for before, _ in node.next_functions)
            hook = rule_of(node, reaching)
        else:
            hook = _closed(closed)
        if hook is not None:
            node.register_hook(hook)
        if name_of(node) not in STATISTICS:
            befores = (before for before, _ in node.next_functions)
            stack += [before for place, before in enumerate(befores) if place != closed]


def _reaching(score: Tensor, x: Tensor) -> dict[Any, bool]:
    """The nodes that score depends on, and whether they depend on x; not beyond statistics."""
    reaches: dict[Any, bool] = {}
    stack: list[tuple[Any, bool]] = [(score.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        if done:
            reaches[node] = any(reaches.get(before, False) for before, _ in node.next_functions)
        elif node is not None and node not in reaches:
            reaches[node] = getattr(node, "variable", None) is x
            if not reaches[node] and name_of(node) not in STATISTICS:
                stack.append((node, True))
                stack += [(before, False) for before, _ in node.next_functions]
    return reaches


def name_of(node: Any) -> str:
    """"Addmm" for AddmmBackward0; the name of its class for a Function of Python."""
    own = getattr(type(node), "_forward_cls", None)
    return own.__name__ if own is not None else re.sub(r"Backward\d*$", "", node.name())


def rule_of(node: Any, reaching: tuple[bool, ...]) -> Hook | None:
    """The hook for a node; None where its gradient is that of its rule."""
    own = getattr(type(node), "_forward_cls", None)
    name = name_of(node)
    if own is not None:
        if issubclass(own, ATTENTION) and not any(reaching[3:]):
            return _divided(dict(enumerate(OF_ATTENTION)))
        if own is Linear:
            return _compiled_linear(node)
        if own is Norm:
            return _compiled_norm(node)
        if own is Rotary:
            return None
    elif name in STATISTICS:
        return _nothing
    elif name in UNCHANGED:
        return None
    elif name in PRODUCTS:
        factors = PRODUCTS[name]
        both = all(place < len(reaching) and reaching[place] for place in factors)
        return _divided(dict.fromkeys(factors, 2)) if both else None
    elif name == "Div" and not any(reaching[1:]):
        return None
    elif name == "Pow" and not any(reaching[1:]) and node._saved_exponent:
        return _divided({0: node._saved_exponent})  # x^p by x^(p - 1)
    elif name.startswith("ScaledDotProduct") and not any(reaching[3:]):
        return _divided(dict(enumerate(OF_ATTENTION)))
    elif name in ACTIVATIONS:
        return _scaled(ACTIVATIONS[name](node))
    elif name == "NativeLayerNorm":
        return _layer_norm(node._saved_result2, node._saved_weight, node._saved_normalized_shape)
    raise NotImplementedError(
        f"method='attnlrp': {node.name()} in the model's graph has no rule of AttnLRP; "
        "'gradient_x_input' and 'integrated_gradients' need none"
    )


def ratio(y: Tensor, x: Tensor, at_zero: float) -> Tensor:
    """y / x, and its limit where x is 0."""
    return torch.where(x == 0, at_zero, y / x)


ACTIVATIONS: dict[str, Callable[[Any], Tensor]] = {
    "Gelu": lambda node: ratio(
        F.gelu(node._saved_self, approximate=node._saved_approximate), node._saved_self, 0.5
    ),
    "Silu": lambda node: ratio(F.silu(node._saved_self), node._saved_self, 0.5),
    "Tanh": lambda node: ratio(node._saved_result, node._saved_result.atanh(), 1.0),
}


def _divided(by: dict[int, int]) -> Hook:
    def hook(grads: Grads, _: Grads) -> Grads:
        return tuple(
            g if g is None or place not in by else g / by[place] for place, g in enumerate(grads)
        )

    return hook


def _closed(closed: int) -> Hook:
    def hook(grads: Grads, _: Grads) -> Grads:
        return tuple(
            torch.zeros_like(g) if g is not None and place == closed else g
            for place, g in enumerate(grads)
        )

    return hook


def _nothing(grads: Grads, _: Grads) -> Grads:
    return tuple(g if g is None else torch.zeros_like(g) for g in grads)


def _scaled(factor: Tensor) -> Hook:
    def hook(_: Grads, dy: Grads) -> Grads:
        assert dy[0] is not None
        return (dy[0] * factor,)

    return hook


def _layer_norm(rstd: Tensor, weight: Tensor | None, shape: Any) -> Hook:
    """(x - mean(x)) rstd weight, with rstd a constant."""
    dims = tuple(range(-len(shape), 0))

    def hook(grads: Grads, dy: Grads) -> Grads:
        assert dy[0] is not None
        g = (dy[0] if weight is None else dy[0] * weight) * rstd
        return (g - g.mean(dims, keepdim=True)).to(dy[0].dtype), *grads[1:]

    return hook


def _compiled_norm(node: Any) -> Hook:
    x, weight, _ = node.saved_tensors
    eps, centred = node.eps, node.kind == LAYER_NORM

    def hook(grads: Grads, dy: Grads) -> Grads:
        assert dy[0] is not None
        g = dy[0].float() if weight is None else dy[0].float() * weight.float()
        moved = x - x.mean(-1, keepdim=True) if centred else x
        g = g * (moved.square().mean(-1, keepdim=True) + eps).rsqrt()
        g = g - g.mean(-1, keepdim=True) if centred else g
        return g.to(x.dtype), *grads[1:]

    return hook


def _compiled_linear(node: Any) -> Hook | None:
    """A linear layer with what follows it in its pass: activation and gate."""
    form = node.form
    if form.activation is None and not form.gated:
        return None
    x, weight, _, u = node.saved_tensors

    def hook(grads: Grads, dy: Grads) -> Grads:
        assert dy[0] is not None
        g, inner = dy[0].float(), u.float()
        inner, gate = inner.chunk(2, -1) if form.gated else (inner, None)
        y = activated(form.activation, False, inner)
        of_act = ratio(y, inner, 0.5) if form.activation else torch.ones_like(inner)
        if gate is not None:
            du = torch.cat((g * gate * of_act / 2, g * y / 2), -1)
        else:
            du = g * of_act
        dx = (du.to(weight.dtype) @ weight).to(x.dtype)
        return dx, *grads[1:]

    return hook
