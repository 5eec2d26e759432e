"""flash_attn.bert_padding: between padded batches (batch, seqlen, ...) and packed tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from clinattn.operator.packing import (
    INTEGERS,
    check_indices,
    cu_seqlens_from_lengths,
    mask_from_lengths,
    pad,
    take,
    unpad,
)
from clinattn.operator.words.checks import check_on, check_tensor
from clinattn.operator.words.scalars import as_size


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """(tokens (total, ...), indices, cu_seqlens int32, max_seqlen, seqused int32); differentiable.

    attention_mask: (batch, seqlen), nonzero = a token. unused_mask: the same for tokens that are
    allocated but not used: they are packed and counted in all but seqused (batch,).
    """
    check_tensor("hidden_states", hidden_states)
    masks = {"attention_mask": attention_mask}
    if unused_mask is not None:
        masks["unused_mask"] = unused_mask
    for name, x in masks.items():
        check_on(name, x, hidden_states.device, "hidden_states")
        if x.dim() != 2 or x.shape != attention_mask.shape:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (batch, seqlen)")
    kept = attention_mask.ne(0)
    seqused = kept.sum(1, dtype=torch.int32)
    if unused_mask is not None:
        kept = kept | unused_mask.ne(0)
    values, cu_seqlens, max_seqlen, indices = unpad(hidden_states, mask=kept)
    return values, indices, cu_seqlens, max_seqlen, seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(tokens, indices, cu_seqlens int32, max_seqlen) of rows that hold several sequences each.

    attention_mask_in_length: (batch, seqlen), the lengths of the row's sequences, then zeros.
    """
    check_tensor("hidden_states", hidden_states)
    device = hidden_states.device
    check_on("attention_mask_in_length", attention_mask_in_length, device, "hidden_states")
    if attention_mask_in_length.dim() != 2 or attention_mask_in_length.dtype not in INTEGERS:
        raise ValueError(
            f"attention_mask_in_length: got {attention_mask_in_length.dtype} "
            f"{tuple(attention_mask_in_length.shape)}, expected integers (batch, seqlen)"
        )
    seqlen = attention_mask_in_length.shape[1]
    kept = mask_from_lengths(attention_mask_in_length.sum(1), seqlen)
    if tuple(hidden_states.shape[:2]) != tuple(kept.shape):
        raise ValueError(
            f"attention_mask_in_length: got shape {tuple(kept.shape)}, "
            f"expected {tuple(hidden_states.shape[:2])}"
        )
    lengths = attention_mask_in_length[attention_mask_in_length.ne(0)]
    indices = kept.flatten().nonzero().squeeze(1)
    max_seqlen = int(lengths.max()) if len(lengths) else 0
    return take(hidden_states, indices), indices, cu_seqlens_from_lengths(lengths), max_seqlen


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Tokens (total, ...) back at indices of (batch, seqlen, ...), zeros elsewhere."""
    return pad(hidden_states, indices, batch, seqlen)


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows of input at indices; differentiable."""
    check_tensor("input", input)
    check_indices(indices, len(input) if input.dim() else 0, input.device)
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """values as the rows at indices of a tensor with first_axis_dim rows; differentiable."""
    check_tensor("values", values)
    first_axis_dim = as_size("first_axis_dim", first_axis_dim)
    check_indices(indices, first_axis_dim, values.device, values)
    rows = values.new_zeros(first_axis_dim, *values.shape[1:])
    return rows.index_copy(0, indices.long(), values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of input at indices, and input itself for the residual; both have gradients."""
    return index_first_axis(input, indices), input.view_as(input)


# The names under which the functions are torch.autograd.Functions in flash-attn.


class IndexFirstAxis:
    apply = staticmethod(index_first_axis)


class IndexPutFirstAxis:
    apply = staticmethod(index_put_first_axis)


class IndexFirstAxisResidual:
    apply = staticmethod(index_first_axis_residual)
