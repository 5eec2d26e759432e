"""The packed layout of sequences whose tokens are split over processes, inside context_parallel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clinattn.operator.split import Split

from .packed_layout import PackedLayout, at_least_fp32


@dataclass(frozen=True, kw_only=True)
class SplitLayout(PackedLayout):
    """(T, ...): the tokens from `begin` on of sequences end to end. cu_seqlens: of whole ones."""

    split: Split
    begin: int

    @cached_property
    def _tokens(self) -> tuple[Tensor, Tensor]:
        """The place of each token among all, and its sequence."""
        end = self.begin + self.total
        token = torch.arange(self.begin, end, device=self.cu_seqlens.device, dtype=torch.int32)
        return token, torch.searchsorted(self.cu_seqlens[1:], token, right=True)

    def positions(self) -> Tensor:
        token, sequence = self._tokens
        return (token - self.cu_seqlens[sequence]).long()

    def following(self, x: Tensor, end: int) -> Tensor:
        token, sequence = self._tokens
        whole = self.split.gathered(x, 0)
        is_last = token + 1 >= self.cu_seqlens[sequence + 1]
        return whole[(token + 1).clamp(max=len(whole) - 1).long()].where(~is_last, end)

    def _one_of_each(self, x: Tensor, at: Tensor) -> Tensor:
        here = (at >= self.begin) & (at < self.begin + self.total) & (self.lengths > 0)
        if self.total == 0:
            return self._summed(x, torch.zeros_like(here))
        chosen = x[(at - self.begin).long().clamp(0, self.total - 1)]
        return self._summed(x, here, chosen)

    def _summed(self, x: Tensor, here: Tensor, chosen: Tensor | None = None) -> Tensor:
        """The sum over processes of rows (sequences, ...), of which this one has those `here`.

        It depends on x in every process, as all of them take part in its backward pass.
        """
        rows = at_least_fp32(x[:1].sum(0) * 0 if chosen is None else chosen)
        return self.split.summed(rows.where(here[:, None], 0)).to(x.dtype)

    def mean(self, x: Tensor) -> Tensor:
        ends = self.cu_seqlens.clamp(self.begin, self.begin + self.total)
        sums = at_least_fp32(x)
        if self.total:
            sums = torch.segment_reduce(sums, "sum", lengths=ends.diff().long())
        else:
            sums = sums.sum(0).expand(len(ends) - 1, -1)
        return (self.split.summed(sums) / self.lengths.clamp(min=1)[:, None]).to(x.dtype)

    def counted(self, tokens: int) -> float:
        everywhere = self.split.summed(torch.tensor(tokens, device=self.cu_seqlens.device))
        return max(int(everywhere), 1) / self.split.processes

    def prefix(self, x: Tensor) -> Tensor:
        raise NotImplementedError(
            "global_projections: not served inside context_parallel, where the first tokens of a "
            "sequence may be another process's"
        )
