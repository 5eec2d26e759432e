"""Activations that are written out as a product x g(x), found on the graph that autograd has.

GPT-2's gelu is one: x times one plus a tanh of x and its cube. As of any activation, relevance
passes such a product by act(x) / x, which is g(x): the path through g is closed, and the other is
not halved. A product of two activations of different inputs is a gate, and not found here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Edge = tuple[Any, int]  # a node, and which of its outputs

# Nodes whose outputs are functions of single numbers, by what stands before "Backward"
OF_NUMBERS = frozenset(
    "Mul Div Add Sub Rsub Neg Pow Exp Log1p Tanh Sigmoid Erf Erfc Softplus ToCopy Clone".split()
)
SCALES = frozenset({"Mul", "Div", "ToCopy"})


def closed_by_activation(
    node: Any, reaches: Mapping[Any, bool], name_of: Callable[[Any], str]
) -> int | None:
    """The place of g(x) among the factors of the node, None where it is no product x g(x).

    reaches: the nodes that depend on what is explained.
    """

    def inputs(edge: Edge) -> list[Edge]:
        return [x for x in edge[0].next_functions if reaches.get(x[0], False)]

    factors = inputs((node, 0))
    if name_of(node) != "Mul" or len(factors) != 2:
        return None

    def without_scales(edge: Edge) -> Edge:
        while name_of(edge[0]) in SCALES and len(inputs(edge)) == 1:
            (edge,) = inputs(edge)
        return edge

    def is_of_numbers(edge: Edge, source: Edge) -> bool:
        stack, seen = [edge], set()
        while stack:
            at = stack.pop()
            if at == source or at in seen:
                continue
            seen.add(at)
            if name_of(at[0]) not in OF_NUMBERS or not inputs(at):
                return False
            stack += inputs(at)
        return True

    first, second = factors
    if is_of_numbers(second, without_scales(first)):
        return 1
    if is_of_numbers(first, without_scales(second)):
        return 0
    return None
