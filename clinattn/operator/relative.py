"""Relative position biases as tables of distances: T5's buckets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clinattn.operator.words.checks import check_tensor
from clinattn.operator.words.scalars import FAR, as_flag, as_int


def t5_buckets(num_buckets: int, bidirectional: bool, max_distance: int) -> Tensor:
    """int64 (2 max_distance + 1,): the bucket of each distance j - i from -max_distance on.

    Raffel et al. (2020), as transformers' T5Attention._relative_position_bucket computes it: half
    of the buckets are single distances, the others grow in width; those beyond share the last.
    """
    distance = torch.arange(-max_distance, max_distance + 1)
    bucket = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket += (distance > 0) * num_buckets
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    exact = num_buckets // 2
    ratio = torch.log(distance.float() / exact) / math.log(max_distance / exact)
    wide = exact + (ratio * (num_buckets - exact)).to(torch.long)
    wide = wide.clamp(max=num_buckets - 1)
    return bucket + torch.where(distance < exact, distance, wide)


def t5_relative_bias(
    weight: Tensor, *, bidirectional: bool = True, max_distance: int = 128
) -> Tensor:
    """The `relative_bias` of a T5 layer: (heads, 2 max_distance + 1), differentiable.

    weight: (num_buckets, heads), as of T5Attention.relative_attention_bias. All distances beyond
    max_distance share its bucket.
    """
    check_tensor("weight", weight)
    bidirectional = as_flag("bidirectional", bidirectional)
    max_distance = as_int("max_distance", max_distance)
    if not weight.is_floating_point():
        raise TypeError(f"weight: got {weight.dtype}, expected a floating dtype")
    if weight.dim() != 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected (num_buckets, heads)")
    exact = weight.shape[0] // (4 if bidirectional else 2)
    if exact < 1 or not exact < max_distance <= FAR:
        raise ValueError(
            f"max_distance: got {max_distance} with {weight.shape[0]} buckets, expected more than "
            f"the {exact} single distances, of which there is at least 1"
        )
    buckets = t5_buckets(weight.shape[0], bidirectional, max_distance).to(weight.device)
    return weight[buckets].T
