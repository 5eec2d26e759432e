"""Numeric values by code on one scale: less the mean, over the standard deviation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
    def fit(cls, chunks: Callable[[], Iterable[tuple[Tensor, Tensor]]], size: int) -> Standard:
        """Fits mean and scale of ids below `size` to their finite values.

        chunks: gives ids and values, (E,) each, some at a time; asked twice, since squares are
        of what the mean leaves.
        """
        count, total = torch.zeros(2, size, dtype=torch.float64)
        for ids, values in _known(chunks):
            count += torch.bincount(ids, minlength=size)
            total += torch.bincount(ids, values, size)
        mean = total / count
        squares = torch.zeros(size, dtype=torch.float64)
        for ids, values in _known(chunks):
            squares += torch.bincount(ids, (values - mean[ids]).square(), size)
        scale = (squares / count).sqrt()
        # what rounding to fp32 makes of equal values is no spread
        flat = scale <= torch.finfo(torch.float32).eps * mean.abs()
        return cls(mean, torch.where(flat, 1.0, scale))

    def __call__(self, ids: Tensor, values: Tensor) -> Tensor:
        """values (E,) of token ids (E,), fp32; NaN stays, and infinity becomes it."""
        z = ((values.double() - self.mean[ids]) / self.scale[ids]).float()
        return torch.where(z.isfinite(), z, float("nan"))


def _known(
    chunks: Callable[[], Iterable[tuple[Tensor, Tensor]]],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids of content with a finite value, and the values in fp64."""
    for ids, values in chunks():
        known = values.isfinite() & (ids >= len(SPECIAL_TOKENS))
        yield ids[known], values[known].double()
