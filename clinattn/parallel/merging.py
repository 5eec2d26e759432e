"""Results of attention to parts of the keys, merged into those of all keys.

With lse = log sum_n exp(lse_n), o = sum_n exp(lse_n - lse) o_n (Milakov and Gimelshein, 2018).
"""

from __future__ import annotations

import torch
from torch import Tensor

from clinattn.operator import ops

Results = tuple[Tensor, Tensor, Tensor | None]  # o (T, H, D), lse (H, T), lse_low, as of the op


def exact(lse: Tensor, lse_low: Tensor | None) -> Tensor:
    """Returns lse in fp64, with what rounding took from it."""
    return lse.double() if lse_low is None else lse.double() + lse_low.double()


def rounded(whole: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns lse and lse_low in a dtype."""
    lse = whole.to(dtype)
    return lse, (whole - lse.double()).where(lse.isfinite(), 0).to(dtype)


def share(part: Tensor, whole: Tensor) -> Tensor:
    """Returns exp(part - whole), 0 where nothing is seen; lse (H, T) in, factors (T, H, 1) out."""
    return torch.exp(part - whole.where(whole != -torch.inf, 0)).t()[..., None]


class Merged:
    """The results so far. Those of one part alone keep their bits."""

    def __init__(self) -> None:
        self._parts = 0

    def add(self, results: Results) -> None:
        self._parts += 1
        if self._parts == 1:
            self._first = results
            return
        o, lse = results[0], exact(*results[1:])
        if self._parts == 2:
            first = self._first[0]
            self._dtypes = first.dtype, self._first[1].dtype
            wide = torch.promote_types(first.dtype, torch.float32)
            self._o, self._lse = first.to(wide, copy=True), exact(*self._first[1:])
        whole = torch.logaddexp(self._lse, lse)
        wide = self._o.dtype
        self._o.mul_(share(self._lse, whole).to(wide))
        self._o.add_(o.to(wide) * share(lse, whole).to(wide))
        self._lse = whole

    def results(self) -> Results | None:
        """Returns o, lse and lse_low; None without parts."""
        if self._parts == 0:
            return None
        if self._parts == 1:
            return self._first
        of_o, of_lse = self._dtypes
        return self._o.to(of_o), *rounded(self._lse, of_lse)


def nothing_seen(q: Tensor, v: Tensor) -> Results:
    """Returns the results of queries (T, H, D) that see no value (..., Dv)."""
    lse = ops.lse_like(q, packed=True)
    return q.new_zeros((*q.shape[:2], v.shape[-1])), lse.fill_(-torch.inf), None
