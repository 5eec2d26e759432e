"""How the tokens of a batch lie in memory, and how attention runs over them.

A layout is made once per forward pass. Everything else in the encoder works token by token and
does not know whether it sees (T, hidden) or (B, N, hidden).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from clinattn.attention import fused_attention, fused_attention_varlen
from clinattn.packing import mask_from_lengths, pad, take, unpad
from clinattn.visibility import concrete


class Batch(TypedDict, total=False):
    """The keyword arguments that say how input_ids are arranged; see Encoder.encode."""

    lengths: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    positions: Tensor | None
    token_types: Tensor | None
    layout: str | None


class Layout(Protocol):
    @property
    def max_seqlen(self) -> int: ...

    @property
    def cu_seqlens(self) -> Tensor | None: ...

    def pack(self, x: Tensor) -> Tensor:
        """x as the caller gave it, (T, ...) or (B, N, ...), into this layout."""

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of pack; padding comes back as zeros where it was dropped."""

    def positions(self) -> Tensor:
        """The index of each token in its sequence, broadcastable to the token shape."""

    def first(self, x: Tensor) -> Tensor:
        """The first token of each sequence: (sequences, ...)."""

    def heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """qkv (..., 3, H, D) -> q, k and v as attention takes them."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None, dropout_p: float
    ) -> Tensor:
        """What heads gives -> (..., H, D)."""


@dataclass(frozen=True)
class PackedLayout:
    """(T, ...): sequences end to end. indices: their places in a (B, N) batch, if they came so."""

    cu_seqlens: Tensor
    max_seqlen: int
    total: int
    batch_shape: tuple[int, int] | None = None
    indices: Tensor | None = None

    def pack(self, x: Tensor) -> Tensor:
        return x if self.indices is None else take(x, self.indices)

    def restore(self, x: Tensor) -> Tensor:
        if self.indices is None or self.batch_shape is None:
            return x
        return pad(x, self.indices, *self.batch_shape)

    def positions(self) -> Tensor:
        starts = torch.repeat_interleave(
            self.cu_seqlens[:-1], self.cu_seqlens.diff(), output_size=self.total
        )
        return torch.arange(self.total, device=starts.device) - starts

    def first(self, x: Tensor) -> Tensor:
        return x[self.cu_seqlens[:-1].long()]

    def heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.unbind(-3)

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
            window=window,
            dropout_p=dropout_p,
        )


@dataclass(frozen=True)
class PaddedLayout:
    """(B, N, ...) as given; padding goes through every layer and attention leaves it out."""

    lengths: Tensor | None
    max_seqlen: int
    device: torch.device

    def pack(self, x: Tensor) -> Tensor:
        return x

    def restore(self, x: Tensor) -> Tensor:
        return x

    def positions(self) -> Tensor:
        return torch.arange(self.max_seqlen, device=self.device)

    def first(self, x: Tensor) -> Tensor:
        return x[:, 0]

    @property
    def cu_seqlens(self) -> None:
        return None

    def heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.transpose(1, 3).unbind(2)  # each (B, H, N, D), strided

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None, dropout_p: float
    ) -> Tensor:
        o = fused_attention(
            q,
            k,
            v,
            dropout_p=dropout_p,
            window=window,
            kv_lengths=self.lengths,
            q_lengths=self.lengths,
        )
        return o.transpose(1, 2)


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
        if window not in self.masks:
            self.masks[window] = self.mask(window, q.dtype)
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.masks[window], dropout_p=dropout_p
        )
        return o.transpose(1, 2)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """None where nothing is hidden, else (B, 1, 1, N), (N, N) or (B, 1, N, N)."""
        index = torch.arange(self.max_seqlen, device=self.device)
        visible = None
        if self.lengths is not None:
            # an empty sequence keeps one key, so that no row of scores is all -inf
            real = mask_from_lengths(self.lengths.clamp(min=1), self.max_seqlen)
            visible = real[:, None, None, :]
        if window is not None:
            band = (index[:, None] - index).abs() <= window
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


def make_layout(
    input_ids: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    layout: str | None,
    attention: str,
) -> Layout:
    """Check the arguments of Encoder.forward and choose the layout they ask for."""
    if layout not in (None, "packed", "padded"):
        raise ValueError(f"layout={layout!r}: expected 'packed' or 'padded'")
    if input_ids.is_floating_point():
        raise TypeError(f"input_ids has dtype {input_ids.dtype}: expected integer token ids")
    if input_ids.dim() == 1:
        if cu_seqlens is None or lengths is not None:
            raise ValueError("1-D input_ids are packed: expected cu_seqlens, and no lengths")
        if attention == "sdpa" or layout == "padded":
            raise ValueError("1-D input_ids are packed: expected attention='clinattn' and 'packed'")
        return _packed(input_ids, cu_seqlens, max_seqlen)
    if input_ids.dim() != 2:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}: expected (T,) with cu_seqlens, "
            "or (B, N) with lengths"
        )
    if cu_seqlens is not None or max_seqlen is not None:
        raise ValueError("cu_seqlens and max_seqlen belong to 1-D input_ids; 2-D take lengths")
    batch, length = input_ids.shape
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}: expected ({batch},)")
    if attention == "sdpa":
        if layout == "packed":
            raise ValueError("attention='sdpa' has no packed form: expected layout='padded'")
        return SdpaLayout(_unless_full(lengths, length), length, input_ids.device)
    if layout == "padded":
        return PaddedLayout(lengths, length, input_ids.device)
    return _unpadded(input_ids, lengths)


def _unless_full(lengths: Tensor | None, length: int) -> Tensor | None:
    return None if lengths is None or bool((lengths >= length).all()) else lengths


def _packed(input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> PackedLayout:
    total = input_ids.shape[0]
    if concrete(cu_seqlens) and (cu_seqlens[0] != 0 or cu_seqlens[-1] != total):
        raise ValueError(
            f"cu_seqlens={cu_seqlens.tolist()}: expected 0 first and the {total} tokens last"
        )
    if max_seqlen is None:
        max_seqlen = total if torch.compiler.is_compiling() else int(cu_seqlens.diff().max())
    cu_seqlens = cu_seqlens.to(device=input_ids.device, dtype=torch.int32)
    return PackedLayout(cu_seqlens, max_seqlen, total)


def _unpadded(input_ids: Tensor, lengths: Tensor | None) -> PackedLayout:
    batch, length = input_ids.shape
    if lengths is None:
        lengths = torch.full((batch,), length)
    if concrete(lengths) and bool(((lengths < 0) | (lengths > length)).any()):
        raise ValueError(f"lengths={lengths.tolist()}: expected 0 to N={length}")
    packed = unpad(input_ids, lengths=lengths.to(input_ids.device))
    total = packed.values.shape[0]
    return PackedLayout(
        packed.cu_seqlens, packed.max_seqlen, total, (batch, length), packed.indices
    )
