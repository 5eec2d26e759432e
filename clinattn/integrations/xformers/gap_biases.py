"""Biases of keys that do not follow one another: padded to one size, or with any gaps.

What lies between the blocks of keys is not seen. Queries are one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from clinattn.integrations.xformers.block_biases import BlockDiagonalMask, check_as_many
from clinattn.integrations.xformers.dense_biases import (
    AttentionBias,
    check_window_sides,
    check_window_size,
)
from clinattn.integrations.xformers.paged_biases import (
    PagedBlockDiagonalCausalLocalPaddedKeysMask,
    PagedBlockDiagonalCausalWithOffsetGappyKeysMask,
    PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
    PagedBlockDiagonalGappyKeysMask,
    PagedBlockDiagonalPaddedKeysMask,
    check_ends,
    row_length,
)
from clinattn.integrations.xformers.seqlens import _GappySeqInfo, _PaddedSeqLenInfo, _SeqLenInfo
from clinattn.operator.words.scalars import as_size


@dataclass
class Apart(AttentionBias):
    """Base of the biases below. _PAGED_TYPES: the biases of pages that mean the same."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: Any

    _PAGED_TYPES: ClassVar[tuple[type, ...]] = ()
    _blocks = BlockDiagonalMask._blocks

    def to(self, device: Any) -> Any:
        return replace(
            self, q_seqinfo=self.q_seqinfo.to(device), k_seqinfo=self.k_seqinfo.to(device)
        )

    def _check_paged_type(self, paged_type: Any) -> None:
        if paged_type not in self._PAGED_TYPES:
            names = " or ".join(x.__name__ for x in self._PAGED_TYPES)
            raise TypeError(
                f"paged_type: got {getattr(paged_type, '__name__', paged_type)}, expected "
                f"{names or 'no call'}: others do not have the window of {type(self).__name__}"
            )


@dataclass
class BlockDiagonalPaddedKeysMask(Apart):
    """Blocks whose keys start at multiples of kv_padding."""

    k_seqinfo: _PaddedSeqLenInfo

    _PAGED_TYPES: ClassVar[tuple[type, ...]] = (
        PagedBlockDiagonalPaddedKeysMask,
        PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
    )

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        causal_diagonal: Any = None,
        *,
        device: Any = None,
    ) -> Any:
        """kv_padding: room for the keys of each block, of which kv_seqlen count.

        causal_diagonal: no longer means anything in xformers; not read.
        """
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, device))

    def make_local_attention(
        self, window_left: int, window_right: int
    ) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        """Windows in place of all order that this bias has; window_right=0 is causal."""
        return BlockDiagonalLocalAttentionPaddedKeysMask(
            self.q_seqinfo, self.k_seqinfo, window_left, window_right
        )

    def make_paged(self, block_tables: Tensor, page_size: int, paged_type: type) -> Any:
        """The same blocks in pages. paged_type: the class, which says what is causal.

        Lengths are shared with this bias. Raises TypeError for a paged_type without the window.
        """
        self._check_paged_type(paged_type)
        row = row_length(block_tables, page_size, len(self.k_seqinfo.seqlen_py))
        check_ends(self.k_seqinfo.seqlen_py, row)
        k_seqinfo = replace(self.k_seqinfo, padding=row)
        return paged_type(self.q_seqinfo, k_seqinfo, block_tables, page_size, **self._window())

    def _window(self) -> dict[str, int]:
        """The fields of a window that a bias of pages has, too."""
        return {}


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Each block causal from bottom right, where the last key is the last that counts."""

    causal_diagonal: Any = None


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Each block a band from bottom right; window_left and window_right count besides the place."""

    window_left: int
    window_right: int

    _PAGED_TYPES: ClassVar[tuple[type, ...]] = ()

    def __post_init__(self) -> None:
        check_window_sides(self.window_left, self.window_right)

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_left: int,
        window_right: int,
        *,
        device: Any = None,
    ) -> Any:
        infos = _padded(q_seqlen, kv_padding, kv_seqlen, device)
        return cls(*infos, window_left, window_right)


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Each block causal from bottom right, and of that the nearest _window_size keys."""

    _window_size: int

    _PAGED_TYPES: ClassVar[tuple[type, ...]] = (PagedBlockDiagonalCausalLocalPaddedKeysMask,)

    def __post_init__(self) -> None:
        check_window_size(self._window_size)

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_size: int,
        *,
        device: Any = None,
    ) -> Any:
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, device), window_size)

    def _window(self) -> dict[str, int]:
        return {"_window_size": self._window_size}


@dataclass
class BlockDiagonalGappyKeysMask(Apart):
    """Blocks whose keys start anywhere."""

    k_seqinfo: _GappySeqInfo

    _PAGED_TYPES: ClassVar[tuple[type, ...]] = (
        PagedBlockDiagonalGappyKeysMask,
        PagedBlockDiagonalCausalWithOffsetGappyKeysMask,
    )

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        *,
        device: Any = None,
    ) -> Any:
        """kv_seqstarts: where the keys of each block start, and last how many keys there are."""
        return cls(*_gappy(q_seqlen, kv_seqstarts, kv_seqlen, device))

    def make_paged(
        self, block_tables: Tensor, page_size: int, notional_padding: int, paged_type: type
    ) -> Any:
        """The same blocks in pages, where block i has the keys from i * notional_padding on.

        notional_padding: a multiple of page_size. paged_type: as in BlockDiagonalPaddedKeysMask.
        """
        self._check_paged_type(paged_type)
        lengths = self.k_seqinfo.seqlen_py
        row = row_length(block_tables, page_size, len(lengths))
        if as_size("notional_padding", notional_padding) % page_size:
            raise ValueError(
                f"notional_padding: got {notional_padding}, expected a multiple of {page_size}"
            )
        starts = [
            start - block * notional_padding
            for block, start in enumerate(self.k_seqinfo.seqstart_py[:-1])
        ]
        if min(starts, default=0) < 0:
            raise ValueError(
                f"notional_padding: got {notional_padding}, but a block starts {-min(starts)} keys "
                "before its own"
            )
        k_seqinfo = _GappySeqInfo.from_seqlens_gappy(
            starts, lengths, True, device=block_tables.device
        )
        check_ends(k_seqinfo.seqlen_py, row)
        return paged_type(self.q_seqinfo, k_seqinfo, block_tables, page_size)


@dataclass
class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    """Each block causal from bottom right."""


@dataclass
class BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask(BlockDiagonalGappyKeysMask):
    """Each block a band from bottom right; window_left and window_right count besides the place."""

    window_left: int
    window_right: int

    _PAGED_TYPES: ClassVar[tuple[type, ...]] = ()

    def __post_init__(self) -> None:
        check_window_sides(self.window_left, self.window_right)

    @classmethod
    def from_seqlens_local_gappy(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        window_left: int,
        window_right: int,
        device: Any = None,
    ) -> Any:
        infos = _gappy(q_seqlen, kv_seqstarts, kv_seqlen, device)
        return cls(*infos, window_left, window_right)


def _padded(
    q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int], device: Any
) -> tuple[_SeqLenInfo, _PaddedSeqLenInfo]:
    check_as_many(q_seqlen, kv_seqlen)
    return (
        _SeqLenInfo.from_seqlens(q_seqlen, device=device),
        _PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, kv_padding, device=device),
    )


def _gappy(
    q_seqlen: Sequence[int], kv_seqstarts: Sequence[int], kv_seqlen: Sequence[int], device: Any
) -> tuple[_SeqLenInfo, _GappySeqInfo]:
    check_as_many(q_seqlen, kv_seqlen)
    return (
        _SeqLenInfo.from_seqlens(q_seqlen, device=device),
        _GappySeqInfo.from_seqlens_gappy(kv_seqstarts, kv_seqlen, False, device=device),
    )
