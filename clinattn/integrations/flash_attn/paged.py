"""Keys and values in pages, of which each sequence has a row of a table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clinattn.integrations.flash_attn.words import PAGED, check_layout
from clinattn.operator.packing import token_places
from clinattn.operator.visibility import concrete
from clinattn.operator.words.checks import check_on


def check_pages(k: Any, v: Any, block_table: Any, batch: int) -> None:
    """k, v (blocks, block_size, heads, head_dim), block_table (batch, blocks of a sequence)."""
    check_layout("k", k, PAGED)
    check_layout("v", v, PAGED)
    if k.shape != v.shape:
        raise ValueError(f"v: got shape {tuple(v.shape)}, expected that of k, {tuple(k.shape)}")
    check_on("v", v, k.device, "k")
    check_on("block_table", block_table, k.device, "k")
    if block_table.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"block_table: got {block_table.dtype}, expected torch.int32")
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise ValueError(
            f"block_table: got shape {tuple(block_table.shape)}, expected ({batch}, blocks)"
        )


def check_used(block_table: Tensor, lengths: Tensor, k: Tensor) -> None:
    """The table leads to pages of k wherever lengths (batch,) have tokens."""
    if not (concrete(lengths) and concrete(block_table)):
        return
    blocks, size = k.shape[:2]
    if (lengths > block_table.shape[1] * size).any():
        raise ValueError(
            f"block_table: got {block_table.shape[1]} blocks of {size} tokens for a sequence, "
            f"expected room for {int(lengths.max())}"
        )
    first = torch.arange(block_table.shape[1]) * size
    used = block_table[first < lengths[:, None]]
    if ((used < 0) | (used >= blocks)).any():
        low, high = (x.item() for x in torch.aminmax(used))
        raise ValueError(
            f"block_table: got blocks from {low} to {high}, expected 0 to {blocks - 1}"
        )


def page_of(position: Tensor, block_table: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(page, row in the page), int64, of the tokens at position (batch, n) of their sequences."""
    page = block_table.gather(1, (position // block_size).long()).long()
    return page, (position % block_size).long()


def dense_pages(pages: Tensor, block_table: Tensor) -> Tensor:
    """(batch, seqlen, heads, head_dim), with seqlen that of a full row of the table.

    Entries of the table that lead nowhere, as those past a sequence's end may, read the nearest
    page there is.
    """
    return pages[block_table.long().clamp(0, len(pages) - 1)].flatten(1, 2)


def packed_pages(
    k: Tensor, v: Tensor, block_table: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """k and v (total, heads, head_dim) of the sequences that cu_seqlens marks; differentiable."""
    check_layout("k", k, PAGED)
    check_on("cu_seqlens_k", cu_seqlens, k.device, "k")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens_k: got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, expected torch.int32 "
            "(number of sequences + 1,)"
        )
    check_pages(k, v, block_table, len(cu_seqlens) - 1)
    size, lengths = k.shape[1], cu_seqlens.diff()
    check_used(block_table, lengths, k)
    capacity = block_table.shape[1] * size
    places = token_places(torch.arange(len(lengths), device=k.device) * capacity, lengths)
    where = block_table.flatten()[places // size], places % size
    return k[where], v[where]
