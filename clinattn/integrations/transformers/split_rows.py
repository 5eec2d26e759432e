"""Checks of a model of transformers whose rows are split over processes."""

from __future__ import annotations

import torch
from torch import Tensor

from clinattn.integrations.transformers.masks import parts_of
from clinattn.operator.split import Split


def check_part(
    split: Split,
    tokens: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
) -> None:
    """Checks a call of attention with this process's part of each row.

    A mask made of a part alone, and positions counted from its first token, are those of another
    model. Raises NotImplementedError for a mask of padding or documents, ValueError for positions
    that are not those of whole sequences. Models that hand on no position_ids cannot be checked.
    """
    if attention_mask is not None:
        _, pattern = parts_of(attention_mask)
        if pattern is None or pattern.padded:
            raise NotImplementedError(
                "attention_mask: not served inside context_parallel; give None, and the ends of "
                "packed documents as cu_seq_lens_q and cu_seq_lens_k"
            )
        if pattern.segment_ids is not None and cu_seq_lens is None:
            raise NotImplementedError(
                "position_ids that start over: not served inside context_parallel without "
                "cu_seq_lens_q and cu_seq_lens_k, the ends of documents in whole rows"
            )
    if position_ids is not None and position_ids.shape[-1] == tokens:
        begin = split.part(tokens).begin
        split.check(position_ids, lambda: wrong_positions(begin, position_ids, cu_seq_lens))


def wrong_positions(begin: int, position_ids: Tensor, cu_seq_lens: Tensor | None) -> str | None:
    """Returns what is wrong with the positions of tokens from `begin` on; None where nothing is."""
    tokens = position_ids.shape[-1]
    place = torch.arange(begin, begin + tokens, device=position_ids.device)
    if cu_seq_lens is not None:
        ends = cu_seq_lens.to(position_ids.device).long()
        place = place - ends[torch.searchsorted(ends[1:], place, right=True)]
    ahead = position_ids - place
    if bool(((ahead == ahead.flatten()[:1]) & (ahead >= 0)).all()):
        return None
    return (
        f"position_ids: got {position_ids.flatten()[:4].tolist()}, ... for tokens from {begin} on, "
        "expected the positions in whole sequences, as clinattn.parallel.shard(mesh, position_ids, "
        "dim=1) gives them"
    )
