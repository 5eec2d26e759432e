"""Biases of keys in pages, of which each sequence has a row of a table.

Keys are (1, pages * page_size, ...). block_tables: int32 (sequences, pages of a sequence), the page
of each page_size keys of a sequence; entries past its last key are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clinattn.integrations.xformers.bands import band_of
from clinattn.integrations.xformers.block_biases import check_as_many
from clinattn.integrations.xformers.dense_biases import AttentionBias, check_window_size
from clinattn.integrations.xformers.places import (
    checked_block_tables,
    checked_page_size,
    key_places,
)
from clinattn.integrations.xformers.seqlens import _GappySeqInfo, _PaddedSeqLenInfo, _SeqLenInfo


@dataclass
class Paged(AttentionBias):
    """Base of the biases below: blocks of queries, and blocks of keys in pages."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: Any
    block_tables: Tensor
    page_size: int

    def to(self, device: Any) -> Any:
        return replace(
            self,
            q_seqinfo=self.q_seqinfo.to(device),
            k_seqinfo=self.k_seqinfo.to(device),
            block_tables=self.block_tables.to(device),
        )

    def materialize(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: Any = "cpu"
    ) -> Tensor:
        """0 where visible, -inf elsewhere, (..., n_queries, keys of the pages in block_tables).

        shape: (..., n_queries, n_keys), as in xformers with n_keys of the rows of block_tables one
        after the other; the result has those of the pages. A page that is twice in a row counts
        twice: log 2.
        """
        in_rows = self.block_tables.numel() * self.page_size
        expected = (self.q_seqinfo.seqstart_py[-1], in_rows)
        if tuple(shape[-2:]) != expected:
            raise ValueError(f"shape: got {shape[-2]} x {shape[-1]}, expected {expected}")
        pages = int(self.block_tables.max()) + 1 if self.block_tables.numel() else 0
        places = key_places(self, pages * self.page_size, device)
        counts = torch.zeros(expected[0], pages * self.page_size, device=device)
        blocks = places.indices.split(places.lengths)
        for (start, end), indices in zip(self.q_seqinfo.intervals(), blocks, strict=True):
            visible = band_of(self).visible(end - start, len(indices), device)
            counts[start:end].index_add_(1, indices, visible.to(counts.dtype))
        return counts.log().to(dtype).expand(*shape[:-1], -1)


@dataclass
class PagedBlockDiagonalPaddedKeysMask(Paged):
    """BlockDiagonalPaddedKeysMask in pages."""

    k_seqinfo: _PaddedSeqLenInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Tensor,
        page_size: int,
        *,
        device: Any = None,
    ) -> Any:
        """kv_seqlen: how many keys of each sequence count, the first ones of its pages."""
        q_seqinfo, k_seqinfo = paddings(q_seqlen, kv_seqlen, block_tables, page_size, device)
        return cls(q_seqinfo, k_seqinfo, block_tables, page_size)


@dataclass
class PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(PagedBlockDiagonalPaddedKeysMask):
    """BlockDiagonalCausalWithOffsetPaddedKeysMask in pages."""


@dataclass
class PagedBlockDiagonalCausalLocalPaddedKeysMask(PagedBlockDiagonalPaddedKeysMask):
    """BlockDiagonalCausalLocalAttentionPaddedKeysMask in pages."""

    _window_size: int

    def __post_init__(self) -> None:
        check_window_size(self._window_size)

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Tensor,
        page_size: int,
        window_size: int,
        *,
        device: Any = None,
    ) -> Any:
        q_seqinfo, k_seqinfo = paddings(q_seqlen, kv_seqlen, block_tables, page_size, device)
        return cls(q_seqinfo, k_seqinfo, block_tables, page_size, window_size)


@dataclass
class PagedBlockDiagonalGappyKeysMask(Paged):
    """BlockDiagonalGappyKeysMask in pages."""

    k_seqinfo: _GappySeqInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Tensor,
        page_size: int,
        *,
        device: Any = None,
    ) -> Any:
        """kv_seqstarts: the first key of each sequence that counts, within its own pages."""
        check_as_many(q_seqlen, kv_seqlen)
        row = row_length(block_tables, page_size, len(kv_seqlen))
        k_seqinfo = _GappySeqInfo.from_seqlens_gappy(kv_seqstarts, kv_seqlen, True, device=device)
        check_ends(k_seqinfo.seqlen_py, row)
        q_seqinfo = _SeqLenInfo.from_seqlens(q_seqlen, device=device)
        return cls(q_seqinfo, k_seqinfo, block_tables, page_size)


@dataclass
class PagedBlockDiagonalCausalWithOffsetGappyKeysMask(PagedBlockDiagonalGappyKeysMask):
    """BlockDiagonalCausalWithOffsetGappyKeysMask in pages."""


def paddings(
    q_seqlen: Sequence[int],
    kv_seqlen: Sequence[int],
    block_tables: Tensor,
    page_size: int,
    device: Any,
) -> tuple[_SeqLenInfo, _PaddedSeqLenInfo]:
    """(q_seqinfo, k_seqinfo), each sequence of keys padded to a row of block_tables."""
    check_as_many(q_seqlen, kv_seqlen)
    row = row_length(block_tables, page_size, len(kv_seqlen))
    k_seqinfo = _PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, row, device=device)
    return _SeqLenInfo.from_seqlens(q_seqlen, device=device), k_seqinfo


def row_length(block_tables: Any, page_size: Any, blocks: int) -> int:
    """Returns the number of keys that the pages of a sequence hold."""
    return checked_block_tables(block_tables, blocks).shape[1] * checked_page_size(page_size)


def check_ends(ends: Sequence[int], row: int) -> None:
    if max(ends, default=0) > row:
        raise ValueError(
            f"block_tables: got room for {row} keys of a sequence, expected {max(ends)} at least"
        )
