"""Places of the keys of each block, for biases whose blocks of keys do not follow one another."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clinattn.integrations.xformers.bands import PAGED, PAGED_GAPPY
from clinattn.operator.packing import token_places
from clinattn.operator.visibility import concrete
from clinattn.operator.words.checks import check_tensor
from clinattn.operator.words.scalars import as_int


class KeyPlaces(NamedTuple):
    """indices: int64 (total,), the places of all keys that count, block after block.

    lengths: how many of them each block has.
    """

    indices: Tensor
    lengths: list[int]

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 (blocks + 1,): where each block starts among the indices."""
        ends = list(accumulate(self.lengths, initial=0))
        return torch.tensor(ends, dtype=torch.int32, device=self.indices.device)


def key_places(bias: Any, n_keys: int, device: Any) -> KeyPlaces:
    """Returns the places of the keys of each block among n_keys.

    Raises ValueError for keys or pages outside, a table of another shape, or an n_keys that is not
    what the bias was made for; TypeError for a table of another dtype.
    """
    spans = _spans(bias)
    is_paged = type(bias).__name__ in PAGED | PAGED_GAPPY
    if is_paged:
        page_size = checked_page_size(bias.page_size)
        table = checked_block_tables(bias.block_tables, len(spans))
        limit = table.shape[1] * page_size
        if n_keys % page_size:
            raise ValueError(f"key: got {n_keys} tokens, expected pages of {page_size}")
    else:
        limit = bias.k_seqinfo.seqstart_py[-1]
        if n_keys != limit:
            raise ValueError(f"key: got {n_keys} tokens, expected the {limit} of attn_bias")
    for start, end in spans:
        if not 0 <= start <= end <= limit:
            raise ValueError(
                f"attn_bias: got a block of the keys {start} to {end}, expected 0 to {limit}"
            )
    lengths = [end - start for start, end in spans]
    starts, ends = torch.tensor(spans, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
    indices = token_places(starts, ends - starts, sum(lengths))
    places = KeyPlaces(indices, lengths)
    if not is_paged:
        return places
    block = _block_of(places.lengths, device)
    page = table.to(device)[block, places.indices // page_size].long()
    if concrete(page) and page.numel():
        low, high = (int(x) for x in torch.aminmax(page))
        if low < 0 or (high + 1) * page_size > n_keys:
            raise ValueError(
                f"block_tables: got pages from {low} to {high}, expected 0 to "
                f"{n_keys // page_size - 1}"
            )
    return places._replace(indices=page * page_size + places.indices % page_size)


def _spans(bias: Any) -> list[tuple[int, int]]:
    """(start, end) of the keys of each block, in pages counted in the block's own row of them."""
    name, info = type(bias).__name__, bias.k_seqinfo
    if name in PAGED:
        return [(0, length) for length in info.seqlen_py]
    if name in PAGED_GAPPY:
        return list(zip(info.seqstart_py, info.seqlen_py, strict=False))
    return list(info.intervals())


def _block_of(lengths: list[int], device: Any) -> Tensor:
    """int64 (total,): the block of each key."""
    repeats = torch.tensor(lengths, dtype=torch.int64, device=device)
    return torch.repeat_interleave(repeats, output_size=sum(lengths))


def checked_block_tables(block_tables: Any, blocks: int) -> Tensor:
    check_tensor("block_tables", block_tables)
    if block_tables.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"block_tables: got {block_tables.dtype}, expected torch.int32")
    if block_tables.dim() != 2 or block_tables.shape[0] != blocks:
        raise ValueError(
            f"block_tables: got shape {tuple(block_tables.shape)}, expected ({blocks}, pages)"
        )
    return block_tables


def checked_page_size(page_size: Any) -> int:
    size = as_int("page_size", page_size)
    if size <= 0:
        raise ValueError(f"page_size: got {size}, expected > 0")
    return size
