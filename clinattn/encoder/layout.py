"""Layouts of the tokens of a batch in memory, and attention over each.

A layout is made once per forward pass. Everything else in the encoder works token by token, on
(T, hidden) and (B, N, hidden) alike.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor

from clinattn.operator import split
from clinattn.operator.packing import unpad
from clinattn.operator.visibility import concrete
from clinattn.operator.words.checks import check_tensor
from clinattn.operator.words.scalars import as_int, at_most_far

from .config import EncoderConfig
from .inputs import INDEX_DTYPES, check_attention_mask
from .packed_layout import PackedLayout
from .padded_layout import PaddedLayout, SdpaLayout
from .split_layout import SplitLayout


class Batch(TypedDict, total=False):
    """The keyword arguments that go with the inputs; see Encoder.encode."""

    lengths: Tensor | None
    attention_mask: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    positions: Tensor | None
    token_types: Tensor | None
    values: Tensor | None
    layout: str | None


def sequences(inputs: Any, batch: Batch) -> int:
    """The number of sequences in the arguments of Encoder.encode."""
    cu_seqlens = batch.get("cu_seqlens")
    if cu_seqlens is None:
        check_tensor("inputs", inputs)
        return inputs.shape[0] if inputs.dim() else 0
    check_tensor("cu_seqlens", cu_seqlens)
    return cu_seqlens.shape[0] - 1 if cu_seqlens.dim() == 1 else 0


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

    def following(self, x: Tensor, end: int) -> Tensor:
        """x (tokens) of the next token in the sequence of each token; `end` for the last."""

    def first(self, x: Tensor) -> Tensor:
        """The first token of each sequence: (sequences, ...), zeros for an empty one."""

    def last(self, x: Tensor) -> Tensor:
        """The last token of each sequence: (sequences, ...), zeros for an empty one."""

    def mean(self, x: Tensor) -> Tensor:
        """The mean of each sequence's tokens: (sequences, ...), zeros for an empty one."""

    def counted(self, tokens: int) -> float:
        """The divisor by which a sum over so many chosen tokens becomes their mean, at least 1.

        Where sequences are split over processes, it makes the mean of the processes' results that
        over all tokens.
        """

    def heads(self, projected: Tensor) -> tuple[Tensor, ...]:
        """(..., n, H, D) -> n tensors as attention takes them: q, k and v for n = 3."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None, dropout_p: float
    ) -> Tensor:
        """Attention of q, k and v as heads returns them -> (..., H, D)."""

    def prefix(self, x: Tensor) -> Tensor:
        """The first global_prefix tokens of each sequence, arranged as x is."""

    def attend_from_prefix(
        self, o: Tensor, q: Tensor, k: Tensor, v: Tensor, dropout_p: float
    ) -> Tensor:
        """o with the tokens of prefix replaced: their queries q see all keys of their sequence."""


def make_layout(
    tokens: Tensor,
    lengths: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    layout: str | None,
    config: EncoderConfig,
) -> Layout:
    """Check the arguments of Encoder.encode and choose the layout they ask for.

    tokens: (T,) or (B, N), of any dtype.
    """
    if layout not in (None, "packed", "padded"):
        raise ValueError(f"layout={layout!r}: expected 'packed' or 'padded'")
    if split.active is not None and (tokens.dim() != 1 or config.attention == "sdpa"):
        raise NotImplementedError(
            "inside context_parallel: expected 1-D inputs, this process's part of packed "
            "sequences, with cu_seqlens, and attention='clinattn'"
        )
    visibility = config.causal, config.global_prefix
    for name, x in (("lengths", lengths), ("cu_seqlens", cu_seqlens)):
        if x is not None:
            check_tensor(name, x)
            if x.dtype not in INDEX_DTYPES:
                raise TypeError(f"{name} has dtype {x.dtype}: expected int32 or int64")
            if x.device != tokens.device and x.device.type != "cpu":
                raise ValueError(f"{name} is on {x.device}: expected {tokens.device} or the CPU")
    if tokens.dim() == 1:
        if cu_seqlens is None or lengths is not None or attention_mask is not None:
            raise ValueError(
                "1-D input_ids are packed: expected cu_seqlens, and no lengths or attention_mask"
            )
        if config.attention == "sdpa" or layout == "padded":
            raise ValueError("1-D input_ids are packed: expected attention='clinattn' and 'packed'")
        return _packed(tokens, cu_seqlens, max_seqlen, visibility)
    if cu_seqlens is not None or max_seqlen is not None:
        raise ValueError("cu_seqlens and max_seqlen belong to 1-D input_ids; 2-D take lengths")
    if attention_mask is not None:
        if lengths is not None:
            raise ValueError("lengths and attention_mask: got both, expected at most one")
        check_attention_mask(attention_mask, tokens)
        attention_mask = attention_mask.to(tokens.device).ne(0)
    batch, length = tokens.shape
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}: expected ({batch},)")
    if lengths is not None and concrete(lengths):
        if bool(((lengths < 0) | (lengths > length)).any()):
            raise ValueError(f"lengths={lengths.tolist()}: expected 0 to N={length}")
    if config.attention == "sdpa" and layout == "packed":
        raise ValueError("attention='sdpa' has no packed form: expected layout='padded'")
    if config.attention != "sdpa" and layout != "padded":
        return _unpadded(tokens, lengths, attention_mask, visibility)
    starts = None
    if attention_mask is not None:
        lengths, starts = attention_mask.sum(1), _starts(attention_mask)
    if config.attention == "sdpa":
        lengths = _unless_full(lengths, length)
        return SdpaLayout(lengths, length, tokens.device, *visibility, starts)
    return PaddedLayout(lengths, length, tokens.device, *visibility, starts)


def _starts(mask: Tensor) -> Tensor | None:
    """The place of each row's first token, (B,); None where every row begins with it."""
    starts = mask.int().argmax(1)
    return None if concrete(starts) and not starts.any() else starts


def _unless_full(lengths: Tensor | None, length: int) -> Tensor | None:
    """None for lengths that leave no padding; a compiled graph serves any lengths."""
    if lengths is None or torch.compiler.is_compiling():
        return lengths
    return None if bool((lengths >= length).all()) else lengths


def _packed(
    tokens: Tensor, cu_seqlens: Tensor, max_seqlen: Any, visibility: tuple[bool, int]
) -> PackedLayout:
    total, part = tokens.shape[0], None
    if split.active is not None:
        part = split.active.part(total)
        total = part.total
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}: expected (sequences + 1,), at least "
            "one sequence"
        )
    if max_seqlen is not None:
        max_seqlen = at_most_far(as_int("max_seqlen", max_seqlen))
    if concrete(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != total:
            raise ValueError(f"cu_seqlens={ends}: expected 0 first and the {total} tokens last")
        lengths = [end - start for start, end in pairwise(ends)]
        if min(lengths) < 0:
            raise ValueError(f"cu_seqlens={ends}: expected no decrease")
        if max_seqlen is not None and max_seqlen < max(lengths):
            raise ValueError(f"max_seqlen={max_seqlen}: expected at least {max(lengths)}")
    if max_seqlen is None:
        max_seqlen = total if torch.compiler.is_compiling() else int(cu_seqlens.diff().max())
    cu_seqlens = cu_seqlens.to(device=tokens.device, dtype=torch.int32)
    packed = cu_seqlens, max_seqlen, tokens.shape[0], None, None, *visibility
    if split.active is not None and part is not None:
        return SplitLayout(*packed, split=split.active, begin=part.begin)
    return PackedLayout(*packed)


def _unpadded(
    tokens: Tensor, lengths: Tensor | None, mask: Tensor | None, visibility: tuple[bool, int]
) -> PackedLayout:
    batch, length = tokens.shape
    if lengths is None and mask is None:
        lengths = torch.full((batch,), length)
    lengths = None if lengths is None else lengths.to(tokens.device)
    packed = unpad(tokens, lengths=lengths, mask=mask)
    total = packed.values.shape[0]
    return PackedLayout(
        packed.cu_seqlens, packed.max_seqlen, total, (batch, length), packed.indices, *visibility
    )
