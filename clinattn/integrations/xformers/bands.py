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


def _everything(bias: Any) -> Band:
    return Band()


def _causal(bias: Any) -> Band:
    return Band(right=0)


def _causal_at_the_end(bias: Any) -> Band:
    return Band(right=0, bottom_right=True)


def _causal_local(bias: Any) -> Band:
    return Band(bias._window_size - 1, 0)


def _causal_local_at_the_end(bias: Any) -> Band:
    return Band(bias._window_size - 1, 0, bottom_right=True)


def _local_at_the_end(bias: Any) -> Band:
    return Band(bias.window_left, bias.window_right, bottom_right=True)


# Bands by class name: xformers' own objects are taken without importing xformers. A subclass of
# another name may mean something else. A table for each place that keys can have.
Table = dict[str, Callable[[Any], Band]]
DENSE: Table = {
    "LowerTriangularMask": _causal,
    "LowerTriangularMaskWithTensorBias": _causal,
    "LowerTriangularFromBottomRightMask": _causal_at_the_end,
    "LowerTriangularFromBottomRightLocalAttentionMask": _causal_local_at_the_end,
    "LocalAttentionFromBottomRightMask": _local_at_the_end,
}
BLOCKS: Table = {
    "BlockDiagonalMask": _everything,
    "BlockDiagonalCausalMask": _causal,
    "BlockDiagonalCausalFromBottomRightMask": _causal_at_the_end,
    "BlockDiagonalCausalLocalAttentionMask": _causal_local,
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": _causal_local_at_the_end,
}
BLOCKS_APART: Table = {
    "BlockDiagonalPaddedKeysMask": _everything,
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": _causal_at_the_end,
    "BlockDiagonalLocalAttentionPaddedKeysMask": _local_at_the_end,
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": _causal_local_at_the_end,
    "BlockDiagonalGappyKeysMask": _everything,
    "BlockDiagonalCausalWithOffsetGappyKeysMask": _causal_at_the_end,
    "BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask": _local_at_the_end,
}
PAGED: Table = {
    "PagedBlockDiagonalPaddedKeysMask": _everything,
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask": _causal_at_the_end,
    "PagedBlockDiagonalCausalLocalPaddedKeysMask": _causal_local_at_the_end,
}
PAGED_GAPPY: Table = {
    "PagedBlockDiagonalGappyKeysMask": _everything,
    "PagedBlockDiagonalCausalWithOffsetGappyKeysMask": _causal_at_the_end,
}
BY_BLOCK: Table = BLOCKS | BLOCKS_APART | PAGED | PAGED_GAPPY
BY_NAME: Table = DENSE | BY_BLOCK


def is_plain_tensor(bias: Any) -> bool:
    """Returns whether bias holds added scores itself; some of xformers' biases subclass Tensor."""
    bases = {base.__name__ for base in type(bias).__mro__}
    return isinstance(bias, Tensor) and "AttentionBias" not in bases


def band_of(bias: Any) -> Band:
    """Returns the band of a bias. Raises NotImplementedError for one that no table has."""
    name = type(bias).__name__
    if name not in BY_NAME:
        served = ", ".join(BY_NAME)
        raise NotImplementedError(
            f"attn_bias: got a {name}, expected a torch.Tensor or one of {served}"
        )
    return BY_NAME[name](bias)
