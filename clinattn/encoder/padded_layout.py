"""The padded layouts, (B, N, ...): through clinattn, and through torch's own attention."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from clinattn.operator.attention import fused_attention
from clinattn.operator.packing import mask_from_lengths

from .packed_layout import at_least_fp32


@dataclass(frozen=True)
class PaddedLayout:
    """(B, N, ...) with the padding, which goes through every layer and which attention leaves out.

    starts: the places of the first tokens in the batch as given, (B,); in the layout they come
    first. None where they do already.
    """

    lengths: Tensor | None
    max_seqlen: int
    device: torch.device
    is_causal: bool = False
    global_prefix: int = 0
    starts: Tensor | None = None

    def pack(self, x: Tensor) -> Tensor:
        if self.starts is not None:
            x = self._rolled(x, self.starts)
        if self.lengths is None or not x.is_floating_point():
            return x
        return self._real(x)  # a NaN in the padding would reach the gradient of a weight as 0 * NaN

    def _real(self, x: Tensor) -> Tensor:
        """x (B, N, ...) with zeros in the padding."""
        assert self.lengths is not None
        real = mask_from_lengths(self.lengths, self.max_seqlen)
        return x.where(real.view(*real.shape, *(1,) * (x.dim() - 2)), 0)

    def restore(self, x: Tensor) -> Tensor:
        return x if self.starts is None else self._rolled(x, -self.starts)

    def _rolled(self, x: Tensor, by: Tensor) -> Tensor:
        """x (B, N, ...), each row moved to the left and what falls out put behind it."""
        places = (self.positions() + by[:, None]) % self.max_seqlen
        return x[torch.arange(x.shape[0], device=self.device)[:, None], places]

    def positions(self) -> Tensor:
        return torch.arange(self.max_seqlen, device=self.device)

    def following(self, x: Tensor, end: int) -> Tensor:
        last = self.max_seqlen if self.lengths is None else self.lengths[:, None]
        return x.roll(-1, 1).where(self.positions() + 1 < last, end)

    def first(self, x: Tensor) -> Tensor:
        return x[:, 0] if self.lengths is None else self._one_of_each(x, self.lengths * 0)

    def last(self, x: Tensor) -> Tensor:
        return x[:, -1] if self.lengths is None else self._one_of_each(x, self.lengths - 1)

    def _one_of_each(self, x: Tensor, at: Tensor) -> Tensor:
        assert self.lengths is not None
        chosen = x[torch.arange(x.shape[0], device=self.device), at.clamp(min=0)]
        return chosen.where((self.lengths > 0)[:, None], 0)

    def mean(self, x: Tensor) -> Tensor:
        if self.lengths is None:
            return x.mean(1)
        sums = self._real(at_least_fp32(x)).sum(1)
        return (sums / self.lengths.clamp(min=1)[:, None]).to(x.dtype)

    def counted(self, tokens: int) -> float:
        return max(tokens, 1)

    @property
    def cu_seqlens(self) -> None:
        return None

    def heads(self, projected: Tensor) -> tuple[Tensor, ...]:
        return projected.transpose(1, 3).unbind(2)  # each (B, H, N, D), strided

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None, dropout_p: float
    ) -> Tensor:
        prefix = 0 if window is None else self.global_prefix
        o = fused_attention(
            q,
            k,
            v,
            dropout_p=dropout_p,
            is_causal=self.is_causal,
            window=window,
            kv_lengths=self.lengths,
            q_lengths=self.lengths,
            global_prefix=min(prefix, self.max_seqlen),
        )
        return o.transpose(1, 2)

    def prefix(self, x: Tensor) -> Tensor:
        return x[:, : self.global_prefix]

    def attend_from_prefix(
        self, o: Tensor, q: Tensor, k: Tensor, v: Tensor, dropout_p: float
    ) -> Tensor:
        replaced = fused_attention(q, k, v, dropout_p=dropout_p, kv_lengths=self.lengths)
        return torch.cat((replaced.transpose(1, 2), o[:, q.shape[2] :]), 1)


@dataclass(frozen=True)
class SdpaLayout(PaddedLayout):
    """The same, through torch's scaled_dot_product_attention.

    Masks are made once per pass and window, additive and in q's dtype: SDPA turns a bool mask
    into that form at every call.
    """

    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None, dropout_p: float
    ) -> Tensor:
        causal = self.is_causal and window is None and self.lengths is None
        if window not in self.masks:
            self.masks[window] = None if causal else self.mask(window, q.dtype)
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.masks[window], dropout_p=dropout_p, is_causal=causal
        )
        return o.transpose(1, 2)

    def attend_from_prefix(
        self, o: Tensor, q: Tensor, k: Tensor, v: Tensor, dropout_p: float
    ) -> Tensor:
        replaced = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask(None, q.dtype), dropout_p=dropout_p
        )
        return torch.cat((replaced.transpose(1, 2), o[:, q.shape[2] :]), 1)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """None where nothing is hidden, else (B, 1, 1, N), (N, N) or (B, 1, N, N)."""
        visible = None
        if self.lengths is not None:
            # an empty sequence keeps one key, so that no row of scores is all -inf
            real = mask_from_lengths(self.lengths.clamp(min=1), self.max_seqlen)
            visible = real[:, None, None, :]
        band = self.band(window)
        if band is not None:
            if visible is None:
                visible = band
            else:
                # queries in the padding see every real key: past the window they would see none
                visible = visible & (band | ~real[:, None, :, None])
        if visible is None:
            return None
        return torch.zeros(visible.shape, dtype=dtype, device=self.device).masked_fill_(
            ~visible, float("-inf")
        )

    def band(self, window: int | None) -> Tensor | None:
        """(N, N), what windows, causal and the global prefix leave visible; None for all."""
        index = torch.arange(self.max_seqlen, device=self.device)
        if self.is_causal:
            causal = index[:, None] >= index
            return causal if window is None else causal & (index[:, None] - index <= window)
        if window is None:
            return None
        everywhere = index < self.global_prefix
        near = (index[:, None] - index).abs() <= window
        return near | everywhere | everywhere[:, None]
