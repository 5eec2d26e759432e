"""A model run from the output of its embedding, and gradients there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Score = Callable[[Any], Tensor]


class Embedded:
    """A model, its inputs, and the module whose output `x` is attributed to."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], module: nn.Module):
        self.model, self.inputs, self.module = model, inputs, module

    def run(
        self, replace: Callable[[Tensor], Tensor], inputs: Mapping[str, Any] | None = None
    ) -> Any:
        """Returns the model's output with replace(x) in place of x, for other inputs if given."""
        calls = 0

        def hook(module: nn.Module, args: Any, x: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > 1 or not isinstance(x, Tensor) or not x.is_floating_point():
                name = type(module).__name__
                raise ValueError(
                    f"embeddings: {name} is called more than once, or returns no floating tensor; "
                    "expected a module with one output for the tokens"
                )
            return replace(x)

        handle = self.module.register_forward_hook(hook)
        try:
            out = self.model(**(self.inputs if inputs is None else inputs))
        finally:
            handle.remove()
        if not calls:
            raise ValueError(
                f"embeddings: {type(self.module).__name__} was not called, expected a module that "
                "the model computes its tokens with"
            )
        return out

    def leaf(self) -> tuple[Any, Tensor]:
        """Returns the output, and the x that it is a function of."""
        kept: list[Tensor] = []

        def replace(x: Tensor) -> Tensor:
            kept.append(x.detach().requires_grad_())
            return kept[0]

        return self.run(replace), kept[0]

    def value(self, inputs: Mapping[str, Any]) -> Tensor:
        """Returns x for other inputs."""
        kept: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            kept.append(x)
            return x

        with torch.no_grad():
            self.run(keep, inputs)
        return kept[0]


def embedding_of(model: nn.Module) -> nn.Module:
    """Returns the module of a model that turns its inputs into vectors, one for each token."""
    if "clinattn.encoder" in sys.modules:
        from clinattn.encoder.embeddings import Embeddings

        own = [x for x in model.modules() if isinstance(x, Embeddings)]
        if len(own) == 1:
            return own[0]
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"embeddings: got None, and {type(model).__name__} does not tell its own, expected the "
            "module whose output is attributed to"
        )
    return found


def gradient(score: Tensor, x: Tensor) -> Tensor:
    """The gradient of the sum of scores to x."""
    try:
        return torch.autograd.grad(score.sum(), x)[0]
    except RuntimeError as error:
        if "not have been used" not in str(error) and "does not require grad" not in str(error):
            raise
        raise ValueError("target: does not depend on the embeddings, expected a logit") from error


def integrated(
    embedded: Embedded, score: Score, x: Tensor, baseline: Tensor, steps: int
) -> Tensor:
    """Integrated gradients (Sundararajan et al., 2017) of each feature of x, like x.

    (x - b) times the mean of the gradient on the way from b to x, by Gauss-Legendre quadrature of
    so many steps: the sum tends to score(x) - score(b).
    """
    total = torch.zeros_like(x)
    for place, weight in gauss_legendre(steps):
        at = (baseline + place * (x - baseline)).requires_grad_()
        total += weight * gradient(score(embedded.run(partial(_instead, at))), at)
    return total * (x - baseline)


def _instead(y: Tensor, _: Tensor) -> Tensor:
    return y


def gauss_legendre(n: int) -> list[tuple[float, float]]:
    """Places and weights of n points for integrals from 0 to 1 (Golub & Welsch, 1969)."""
    k = torch.arange(1, n, dtype=torch.float64)
    beside = k / (4 * k * k - 1).sqrt()
    places, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    weights = vectors[0].square()
    return list(zip((0.5 * (1 + places)).tolist(), weights.tolist(), strict=True))


def scores_of(x: Tensor, gradient: Tensor) -> Tensor:
    """sum over features of x times its gradient, in fp32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.detach().to(dtype) * gradient.to(dtype)).sum(-1)


def norms_of(x: Tensor, gradient: Tensor) -> Tensor:
    """The Euclidean length of x times its gradient."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x.detach().to(dtype) * gradient.to(dtype), dim=-1)
