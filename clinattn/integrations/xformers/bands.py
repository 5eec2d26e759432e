"""Bands of keys: what a query sees of its sequence under each of xformers' biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Band(NamedTuple):
    """Query i sees i' - left <= j <= i' + right, None for no bound.

    i' is i, or with bottom_right i + n_keys - n_queries.
    """

    left: int | None = None
    right: int | None = None
    bottom_right: bool = False

    def visible(self, n_queries: int, n_keys: int, device: Any = None) -> Tensor:
        """bool (n_queries, n_keys)."""
        shift = n_keys - n_queries if self.bottom_right else 0
        query = torch.arange(n_queries, device=device)[:, None] + shift
        distance = torch.arange(n_keys, device=device) - query
        visible = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
        if self.left is not None:
            visible &= distance >= -self.left
        if self.right is not None:
            visible &= distance <= self.right
        return visible

    def keywords(self) -> dict[str, Any]:
        """The band as arguments of fused_attention and fused_attention_varlen."""
        return {"window": (self.left, self.right), "bottom_right": self.bottom_right}


EVERYTHING = Band()
CAUSAL = Band(right=0)
CAUSAL_AT_THE_END = Band(right=0, bottom_right=True)


def _local(bias: Any) -> Band:
    return Band(bias._window_size - 1, 0)


def _local_at_the_end(bias: Any) -> Band:
    return Band(bias._window_size - 1, 0, bottom_right=True)


# Bands by class name: xformers' own objects are taken without importing xformers. A subclass of
# another name may mean something else.
DENSE: dict[str, Callable[[Any], Band]] = {
    "LowerTriangularMask": lambda bias: CAUSAL,
    "LowerTriangularMaskWithTensorBias": lambda bias: CAUSAL,
    "LowerTriangularFromBottomRightMask": lambda bias: CAUSAL_AT_THE_END,
    "LowerTriangularFromBottomRightLocalAttentionMask": _local_at_the_end,
    "LocalAttentionFromBottomRightMask": lambda bias: Band(
        bias.window_left, bias.window_right, bottom_right=True
    ),
}
BLOCKS: dict[str, Callable[[Any], Band]] = {
    "BlockDiagonalMask": lambda bias: EVERYTHING,
    "BlockDiagonalCausalMask": lambda bias: CAUSAL,
    "BlockDiagonalCausalFromBottomRightMask": lambda bias: CAUSAL_AT_THE_END,
    "BlockDiagonalCausalLocalAttentionMask": _local,
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": _local_at_the_end,
}
PADDED_BLOCKS: dict[str, Callable[[Any], Band]] = {
    "BlockDiagonalPaddedKeysMask": lambda bias: EVERYTHING,
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": lambda bias: CAUSAL_AT_THE_END,
}


def is_plain_tensor(bias: Any) -> bool:
    """Returns whether bias holds added scores itself; some of xformers' biases subclass Tensor."""
    bases = {base.__name__ for base in type(bias).__mro__}
    return isinstance(bias, Tensor) and "AttentionBias" not in bases


def band_of(bias: Any) -> Band:
    """Returns the band of a bias. Raises NotImplementedError for one that no table has."""
    name = type(bias).__name__
    for table in (DENSE, BLOCKS, PADDED_BLOCKS):
        if name in table:
            return table[name](bias)
    served = ", ".join((*DENSE, *BLOCKS, *PADDED_BLOCKS))
    raise NotImplementedError(
        f"attn_bias: got a {name}, expected a torch.Tensor or one of {served}"
    )
