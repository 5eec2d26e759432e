"""Biases without blocks: what is visible, said without an N x N tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clinattn.integrations.xformers.bands import band_of
from clinattn.operator.words.scalars import as_int


class AttentionBias:
    """Base of what may be given as attn_bias besides a tensor."""

    def to(self, device: Any) -> Any:
        return self

    def materialize(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
    ) -> Tensor:
        """0 where visible, -inf elsewhere, (..., n_queries, n_keys); for tests and printing."""
        visible = torch.zeros(shape[-2:], dtype=torch.bool, device=device)
        for (start_q, end_q), (start_k, end_k) in self._blocks(*shape[-2:]):
            block = band_of(self).visible(end_q - start_q, end_k - start_k, device)
            visible[start_q:end_q, start_k:end_k] = block
        bias = torch.zeros(shape[-2:], dtype=dtype, device=device)
        return bias.masked_fill(~visible, -float("inf")).expand(shape)

    def _blocks(
        self, n_queries: int, n_keys: int
    ) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        yield (0, n_queries), (0, n_keys)


class LowerTriangularMask(AttentionBias):
    """Causal: query i sees the keys j <= i."""

    def __init__(self, device: Any = None) -> None:
        """device: not read, as in xformers."""

    def add_bias(self, bias: Tensor) -> LowerTriangularMaskWithTensorBias:
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """Causal, with a tensor added to the scores, which may need a gradient."""

    def __init__(self, bias: Tensor) -> None:
        self._bias = bias

    def to(self, device: Any) -> LowerTriangularMaskWithTensorBias:
        return LowerTriangularMaskWithTensorBias(self._bias.to(device))

    def materialize(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: Any = "cpu"
    ) -> Tensor:
        return super().materialize(shape, dtype, device) + self._bias.to(device, dtype)


class LowerTriangularFromBottomRightMask(AttentionBias):
    """Causal from bottom right."""

    def make_local_attention(
        self, window_size: int
    ) -> LowerTriangularFromBottomRightLocalAttentionMask:
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """Causal from bottom right, and of that the nearest _window_size keys."""

    _window_size: int

    def __post_init__(self) -> None:
        check_window_size(self._window_size)


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """Band from bottom right: window_left keys before a query's place, window_right after it."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        check_window_sides(self.window_left, self.window_right)


def check_window_size(window_size: Any) -> None:
    if as_int("window_size", window_size) <= 0:
        raise ValueError(f"window_size: got {window_size}, expected > 0")


def check_window_sides(window_left: Any, window_right: Any) -> None:
    for name, side in (("window_left", window_left), ("window_right", window_right)):
        if as_int(name, side) < 0:
            raise ValueError(f"{name}: got {side}, expected >= 0")
