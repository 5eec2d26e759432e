"""Numeric values by code on one scale: less the mean, over the standard deviation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clinattn.workloads import SPECIAL_TOKENS


@dataclass(frozen=True)
class Standard:
    """mean, scale: (V,) fp64, of each token id; NaN where its values say nothing.

    That is so for the special tokens, [UNK] among them (it is many codes in many units), and for
    codes that had no value. A code of one value, or of the same throughout, is centred only: its
    scale is 1.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, ids: Tensor, values: Tensor, size: int) -> Standard:
        """Fits mean and scale of ids below `size` to their finite values; ids, values: (E,)."""
        known = values.isfinite() & (ids >= len(SPECIAL_TOKENS))
        ids, x = ids[known], values[known].double()
        count = torch.bincount(ids, minlength=size)
        mean = torch.bincount(ids, x, size) / count
        scale = (torch.bincount(ids, (x - mean[ids]).square(), size) / count).sqrt()
        # what rounding to fp32 makes of equal values is no spread
        flat = scale <= torch.finfo(torch.float32).eps * mean.abs()
        return cls(mean, torch.where(flat, 1.0, scale))

    def __call__(self, ids: Tensor, values: Tensor) -> Tensor:
        """values (E,) of token ids (E,), fp32; NaN stays, and infinity becomes it."""
        z = ((values.double() - self.mean[ids]) / self.scale[ids]).float()
        return torch.where(z.isfinite(), z, float("nan"))
