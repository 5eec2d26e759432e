"""Packed keys and values of which a part of each sequence is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clinattn.operator.packing import cu_seqlens_from_lengths, token_places
from clinattn.operator.visibility import concrete
from clinattn.operator.words.checks import check_cu_seqlens, check_lengths


def used_tokens(
    k: Tensor, v: Tensor, cu_seqlens: Tensor, seqused: Any = None, leftpad: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """k, v and cu_seqlens of the tokens [leftpad, seqused) of each sequence; differentiable.

    k, v: (total, heads, head_dim). seqused, leftpad: (batch,) int32, by default all tokens, none.
    """
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
    parts = (x.index_select(0, indices) for x in (k, v))
    return *parts, cu_seqlens_from_lengths(ends - starts)
