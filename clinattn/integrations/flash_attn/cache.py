"""Places of sequences in a cache of keys and values: a row each, or pages of a table."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from clinattn.integrations.flash_attn.paged import check_pages, dense_pages, page_of
from clinattn.integrations.flash_attn.words import DENSE, check_heads, check_layout
from clinattn.operator.words.checks import check_lengths, check_on


class Cache(NamedTuple):
    """k, v: (rows, seqlen, heads, head_dim), or pages (blocks, block_size, heads, head_dim).

    rows: int64 (batch,), of each sequence, None for the first batch rows. block_table: the pages.
    """

    k: Tensor
    v: Tensor
    batch: int
    rows: Tensor | None
    block_table: Tensor | None

    @property
    def capacity(self) -> int:
        """Number of tokens of a sequence that there is room for."""
        blocks = 1 if self.block_table is None else self.block_table.shape[1]
        return blocks * self.k.shape[1]

    def write(self, places: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v (batch, n, heads, head_dim) at places (batch, n) of their sequences, in place."""
        if self.block_table is not None:
            where = page_of(places, self.block_table, self.k.shape[1])
        else:
            rows = torch.arange(self.batch, device=k.device) if self.rows is None else self.rows
            where = rows[:, None], places
        self.k[where] = k
        self.v[where] = v

    def read(self) -> tuple[Tensor, Tensor]:
        """k, v (batch, capacity, heads, head_dim): views, unless rows or pages are gathered."""
        if self.block_table is not None:
            return dense_pages(self.k, self.block_table), dense_pages(self.v, self.block_table)
        if self.rows is not None:
            return self.k[self.rows], self.v[self.rows]
        return self.k[: self.batch], self.v[: self.batch]


def checked_cache(q: Any, k_cache: Any, v_cache: Any, rows: Any, block_table: Any) -> Cache:
    check_layout("q", q, DENSE)
    check_layout("k_cache", k_cache, DENSE)
    check_layout("v_cache", v_cache, DENSE)
    check_heads(q, k_cache)
    if k_cache.shape != v_cache.shape:
        raise ValueError(
            f"v_cache: got shape {tuple(v_cache.shape)}, expected that of k_cache, "
            f"{tuple(k_cache.shape)}"
        )
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_on(name, x, q.device, "q")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: got {x.dtype}, expected that of q, {q.dtype}")
    batch = len(q)
    if block_table is not None:
        if rows is not None:
            raise ValueError("cache_batch_idx: got one with block_table, expected only one of them")
        check_pages(k_cache, v_cache, block_table, batch)
    elif rows is not None:
        rows = check_lengths("cache_batch_idx", rows, batch, len(k_cache) - 1, q.device).long()
    elif len(k_cache) < batch:
        raise ValueError(f"k_cache: got {len(k_cache)} rows, expected at least the {batch} of q")
    return Cache(k_cache, v_cache, batch, rows, block_table)
