"""The packed layout: sequences end to end, no padding anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clinattn.operator.attention import fused_attention_varlen
from clinattn.operator.packing import cu_seqlens_from_lengths, pad, take


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class PackedLayout:
    """(T, ...): sequences end to end. indices: their places in a (B, N) batch, if they came so."""

    cu_seqlens: Tensor
    max_seqlen: int
    total: int
    batch_shape: tuple[int, int] | None = None
    indices: Tensor | None = None
    is_causal: bool = False
    global_prefix: int = 0

    def pack(self, x: Tensor) -> Tensor:
        return x if self.indices is None else take(x, self.indices)

    def restore(self, x: Tensor) -> Tensor:
        if self.indices is None or self.batch_shape is None:
            return x
        return pad(x, self.indices, *self.batch_shape)

    def positions(self) -> Tensor:
        starts = torch.repeat_interleave(self.cu_seqlens[:-1], self.lengths, output_size=self.total)
        return torch.arange(self.total, device=starts.device) - starts

    def following(self, x: Tensor, end: int) -> Tensor:
        if self.total == 0:
            return x
        # an empty first sequence would end at -1: the last token, an end too
        ends = (self.cu_seqlens[1:].long() - 1) % self.total
        return x.roll(-1).index_fill(0, ends, end)

    @property
    def lengths(self) -> Tensor:
        return self.cu_seqlens.diff()

    def first(self, x: Tensor) -> Tensor:
        return self._one_of_each(x, self.cu_seqlens[:-1])

    def last(self, x: Tensor) -> Tensor:
        return self._one_of_each(x, self.cu_seqlens[1:] - 1)

    def _one_of_each(self, x: Tensor, at: Tensor) -> Tensor:
        if self.total == 0:
            return x.new_zeros(len(at), *x.shape[1:])
        chosen = x[at.long().clamp(0, self.total - 1)]
        return chosen.where((self.lengths > 0)[:, None], 0)

    def mean(self, x: Tensor) -> Tensor:
        sums = torch.segment_reduce(at_least_fp32(x), "sum", lengths=self.lengths.long())
        return (sums / self.lengths.clamp(min=1)[:, None]).to(x.dtype)

    def counted(self, tokens: int) -> float:
        return max(tokens, 1)

    def heads(self, projected: Tensor) -> tuple[Tensor, ...]:
        return projected.unbind(-3)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None, dropout_p: float
    ) -> Tensor:
        return fused_attention_varlen(
            q,
            k,
            v,
            self.cu_seqlens,
            max_seqlen_q=self.max_seqlen,
            max_seqlen_k=self.max_seqlen,
            is_causal=self.is_causal,
            window=window,
            global_prefix=0 if window is None else self.global_prefix,
            dropout_p=dropout_p,
        )

    @cached_property
    def prefix_rows(self) -> Tensor:
        return (self.positions() < self.global_prefix).nonzero().squeeze(1)

    def prefix(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.prefix_rows)

    def attend_from_prefix(
        self, o: Tensor, q: Tensor, k: Tensor, v: Tensor, dropout_p: float
    ) -> Tensor:
        prefix = self.global_prefix
        replaced = fused_attention_varlen(
            q,
            k,
            v,
            cu_seqlens_from_lengths(self.lengths.clamp(max=prefix)),
            self.cu_seqlens,
            max_seqlen_q=min(prefix, self.max_seqlen),
            max_seqlen_k=self.max_seqlen,
            dropout_p=dropout_p,
        )
        return o.index_copy(0, self.prefix_rows, replaced)
