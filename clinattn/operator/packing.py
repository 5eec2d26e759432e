"""Between padded batches (B, N, ...) and packed tokens (T, ...), and batches of bounded size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clinattn.operator.visibility import concrete
from clinattn.operator.words.checks import check_on, check_tensor
from clinattn.operator.words.scalars import FAR, as_flag, as_int, as_size, ints_of

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Packed(NamedTuple):
    """Tokens of several sequences one after the other.

    values (T, ...); cu_seqlens int32 (B + 1,), where each sequence starts and the last ends;
    max_seqlen, the longest; indices int64 (T,), where each token was in the flattened (B * N,).
    """

    values: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    indices: Tensor


def cu_seqlens_from_lengths(lengths: Tensor) -> Tensor:
    """Lengths (B,) of any integer dtype -> int32 (B + 1,), from 0 to their sum."""
    _check_lengths(lengths)
    cu_seqlens = lengths.new_zeros(lengths.shape[0] + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=cu_seqlens[1:])
    return cu_seqlens


def token_places(starts: Tensor, lengths: Tensor, total: int | None = None) -> Tensor:
    """Returns int64 (T,), the places [starts_s, starts_s + lengths_s) of all sequences s in order.

    starts, lengths: (S,), of any integer dtype. total: the sum of lengths, where it is known: a GPU
    is not waited for then.
    """
    sequence = torch.repeat_interleave(lengths, output_size=total)
    ahead = lengths.cumsum(0) - lengths  # tokens of the sequences before
    return torch.arange(len(sequence), device=lengths.device) + (starts - ahead)[sequence]


def _check_lengths(lengths: Any) -> None:
    check_tensor("lengths", lengths)
    if lengths.dtype not in INTEGERS:
        raise TypeError(f"lengths: got {lengths.dtype}, expected an integer dtype")
    if lengths.dim() != 1:
        raise ValueError(f"lengths: got shape {tuple(lengths.shape)}, expected (B,)")
    if concrete(lengths) and len(lengths):
        least, total = int(lengths.min()), sum(lengths.tolist())
        if least < 0 or total > FAR:
            raise ValueError(
                f"lengths: got {least} and {total} in all, expected >= 0 and at most {FAR}"
            )


def cu_seqlens_from_mask(mask: Tensor) -> Tensor:
    """Mask (B, N), nonzero = a token -> int32 (B + 1,)."""
    check_tensor("mask", mask)
    if mask.dim() != 2:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected (B, N)")
    return cu_seqlens_from_lengths(mask.ne(0).sum(1))


def mask_from_lengths(lengths: Tensor, seqlen: int) -> Tensor:
    """Lengths (B,) -> bool (B, seqlen), True at the tokens; a right-padded batch."""
    _check_lengths(lengths)
    seqlen = as_size("seqlen", seqlen)
    return torch.arange(seqlen, device=lengths.device) < lengths[:, None]


def unpad(padded: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None) -> Packed:
    """Keep the tokens of a padded batch; differentiable, the inverse of pad.

    padded: (B, N, ...). Either lengths (B,), the tokens being the first of each row, or mask
    (B, N), nonzero = a token, wherever it lies in its row. The count of tokens is read once, which
    stops the host until a GPU has it; under torch.compile N stands in for the longest.
    Raises ValueError unless exactly one of lengths and mask is given, in its shape.
    """
    _check_padded(padded)
    batch, seqlen = padded.shape[:2]
    if (lengths is None) == (mask is None):
        raise ValueError("unpad: expected exactly one of lengths and mask")
    if lengths is not None:
        _check_lengths(lengths)
        if lengths.shape != (batch,):
            raise ValueError(f"lengths: got shape {tuple(lengths.shape)}, expected ({batch},)")
        mask = mask_from_lengths(lengths, seqlen)
    check_tensor("mask", mask)
    assert mask is not None
    if mask.shape != (batch, seqlen):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected ({batch}, {seqlen})")
    if mask.is_meta:
        raise ValueError("lengths or mask: got one on meta, expected values: they make the shapes")
    mask = mask.ne(0)
    counts = mask.sum(1) if lengths is None else lengths
    indices = mask.flatten().nonzero().squeeze(1)
    if torch.compiler.is_compiling():  # a graph holds what no value of lengths can change
        return Packed(take(padded, indices), cu_seqlens_from_lengths(counts), seqlen, indices)
    max_seqlen = int(counts.max()) if batch else 0
    if max_seqlen > seqlen:
        raise ValueError(f"lengths: got values up to {max_seqlen}, expected at most {seqlen}")
    return Packed(take(padded, indices), cu_seqlens_from_lengths(counts), max_seqlen, indices)


def _check_padded(padded: Any) -> None:
    check_tensor("padded", padded)
    if padded.dim() < 2:
        raise ValueError(f"padded: got shape {tuple(padded.shape)}, expected (B, N, ...)")


def take(padded: Tensor, indices: Tensor) -> Tensor:
    """Returns the tokens (T, ...) of a padded batch (B, N, ...) at indices as of unpad."""
    _check_padded(padded)
    check_indices(indices, padded.shape[0] * padded.shape[1], padded.device)
    return padded.flatten(0, 1).index_select(0, indices)


def check_indices(
    indices: Any, rows: int, device: torch.device, values: Tensor | None = None
) -> None:
    """Checks int64 (T,) places among `rows` rows; with values, one for each of them."""
    check_on("indices", indices, device, "what they index")
    if values is not None and values.dtype.itemsize == 1 and values.is_floating_point():
        raise TypeError(f"values: got {values.dtype}, expected a dtype of 16 bits or more")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices: got {indices.dtype}, expected torch.int64")
    if indices.dim() != 1 or (values is not None and indices.shape != values.shape[:1]):
        expected = "(T,)" if values is None else f"that of the tokens, {tuple(values.shape[:1])}"
        raise ValueError(f"indices: got shape {tuple(indices.shape)}, expected {expected}")
    if concrete(indices) and len(indices):
        low, high = (x.item() for x in torch.aminmax(indices))
        if low < 0 or high >= rows:
            raise ValueError(f"indices: got values from {low} to {high}, expected 0 to {rows - 1}")


def pad(values: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Puts packed tokens (T, ...) back into (batch, seqlen, ...), zeros elsewhere; differentiable.

    indices: int64 (T,), places in the flattened (batch * seqlen,), as unpad returns them.
    """
    check_tensor("values", values)
    batch, seqlen = as_size("batch", batch), as_size("seqlen", seqlen)
    check_indices(indices, batch * seqlen, values.device, values)
    padded = values.new_zeros(batch * seqlen, *values.shape[1:])
    return padded.index_copy(0, indices.long(), values).unflatten(0, (batch, seqlen))


def batch_by_tokens(
    lengths: Sequence[int], max_tokens: int, *, padded: bool = False
) -> list[list[int]]:
    """Cut sequences into batches of at most max_tokens tokens each; returns their positions.

    The longest come first, equal ones in their order, and each joins the batch at hand or starts
    the next, so the result depends on the arguments alone. padded=True counts every sequence of a
    batch as long as its longest.
    Raises ValueError for a sequence longer than max_tokens.
    """
    lengths = ints_of("lengths", lengths)
    max_tokens, padded = as_int("max_tokens", max_tokens), as_flag("padded", padded)
    batches: list[list[int]] = []
    used = 0
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[position]
        if length > max_tokens:
            raise ValueError(
                f"lengths: got {length} at position {position}, expected at most {max_tokens}"
            )
        cost = lengths[batches[-1][0]] if padded and batches else length
        if batches and used + cost <= max_tokens:
            batches[-1].append(position)
            used += cost
        else:
            batches.append([position])
            used = length
    return batches
