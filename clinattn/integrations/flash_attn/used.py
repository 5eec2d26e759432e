"""The keys and values of packed sequences or pages, without those that are not used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clinattn.integrations.flash_attn.paged import packed_pages
from clinattn.integrations.flash_attn.words import PACKED, PAGED, check_layout
from clinattn.operator.packing import cu_seqlens_from_lengths, token_places
from clinattn.operator.visibility import concrete
from clinattn.operator.words.checks import check_cu_seqlens, check_lengths


def used_keys(
    k: Any,
    v: Any,
    cu_seqlens_k: Any,
    cu_seqlens_q: Tensor,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """k, v (total, heads, head_dim) and cu_seqlens of the keys that are used; differentiable.

    k, v: packed as cu_seqlens_k says, or pages (blocks, block_size, heads, head_dim), which
    block_table (batch, blocks of a sequence) leads to, as long as cu_seqlens_k or seqused_k say.
    seqused_k, leftpad_k: (batch,) int32; of each sequence the tokens [leftpad_k, seqused_k) are
    used, by default all. Raises ValueError for leftpad_k with pages.
    """
    if block_table is seqused_k is leftpad_k is None:
        return k, v, cu_seqlens_k
    batch = len(cu_seqlens_q) - 1
    if block_table is None:
        check_layout("k", k, PACKED)
        check_layout("v", v, PACKED)
        return _used_tokens(k, v, cu_seqlens_k, seqused_k, leftpad_k)
    if leftpad_k is not None:
        raise ValueError("leftpad_k: got one with block_table, expected only one of them")
    if seqused_k is not None:
        check_layout("k", k, PAGED)
        room = block_table.shape[-1] * k.shape[1]
        lengths = check_lengths("seqused_k", seqused_k, batch, room, k.device)
        cu_seqlens_k = cu_seqlens_from_lengths(lengths)
    return *packed_pages(k, v, block_table, cu_seqlens_k), cu_seqlens_k


def _used_tokens(
    k: Tensor, v: Tensor, cu_seqlens: Tensor, seqused: Any, leftpad: Any
) -> tuple[Tensor, Tensor, Tensor]:
    check_cu_seqlens("k", cu_seqlens, None, k.shape[0], k.device)
    lengths, batch = cu_seqlens.diff(), len(cu_seqlens) - 1
    ends, starts = lengths, torch.zeros_like(lengths)
    if seqused is not None:
        ends = check_lengths("seqused_k", seqused, batch, k.shape[0], k.device)
    if leftpad is not None:
        starts = check_lengths("leftpad_k", leftpad, batch, k.shape[0], k.device)
    if concrete(lengths) and not ((starts <= ends) & (ends <= lengths)).all():
        raise ValueError(
            f"leftpad_k and seqused_k: got {starts.tolist()} and {ends.tolist()}, expected tokens "
            f"of sequences of the lengths {lengths.tolist()}"
        )
    indices = token_places(cu_seqlens[:-1] + starts, ends - starts)
    k, v = k.index_select(0, indices), v.index_select(0, indices)
    return k, v, cu_seqlens_from_lengths(ends - starts)
