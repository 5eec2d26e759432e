"""Places of blocks of tokens along a dimension: in a row, padded to one size, or with gaps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from clinattn.operator.words.scalars import as_size, ints_of


@dataclass
class _SeqLenInfo:
    """Blocks without gaps: seqstart, int32 (blocks + 1,), and the same as a list."""

    seqstart: Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: Any = None) -> _SeqLenInfo:
        lengths = checked_lengths(seqlens)
        starts = list(accumulate(lengths, initial=0))
        return cls(
            seqstart=torch.tensor(starts, dtype=torch.int32, device=device),
            max_seqlen=max(lengths, default=0),
            min_seqlen=min(lengths, default=0),
            seqstart_py=starts,
        )

    def from_seqlens_inplace(self, seqlens: Iterable[int]) -> None:
        """Writes other lengths into seqstart and seqstart_py, which stay the same objects.

        max_seqlen and min_seqlen stay, too: the first is an upper bound from then on. Raises
        ValueError for another number of blocks, or one longer than max_seqlen.
        """
        lengths = _checked_update(seqlens, len(self.seqstart_py) - 1, self.max_seqlen)
        self.seqstart_py[:] = accumulate(lengths, initial=0)
        self.seqstart.copy_(torch.tensor(self.seqstart_py, dtype=torch.int32))

    def to(self, device: Any) -> _SeqLenInfo:
        return replace(self, seqstart=self.seqstart.to(device))

    def intervals(self) -> Iterator[tuple[int, int]]:
        """(start, end) of each block."""
        return pairwise(self.seqstart_py)

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        """x (1, total, ...) as one tensor (b, seqlen, ...) for each b of batch_sizes, default 1."""
        if x.shape[:2] != (1, self.seqstart_py[-1]):
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, expected (1, {self.seqstart_py[-1]}, ...)"
            )
        sizes = [1] * (len(self.seqstart_py) - 1) if batch_sizes is None else batch_sizes
        ends = [self.seqstart_py[block] for block in accumulate(sizes, initial=0)]
        return [
            x[:, start:end].reshape(size, (end - start) // size, *x.shape[2:])
            for size, (start, end) in zip(sizes, pairwise(ends), strict=True)
        ]


@dataclass
class _PaddedSeqLenInfo(_SeqLenInfo):
    """Blocks that start at multiples of padding; seqlen is int32 (blocks,), seqlen_py a list."""

    seqlen: Tensor
    seqlen_py: list[int]
    padding: int

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: Any = None) -> _SeqLenInfo:
        raise TypeError("_PaddedSeqLenInfo: expected from_seqlens_padded(seqlens, padding)")

    @classmethod
    def from_seqlens_padded(
        cls, seqlens: Sequence[int], padding: int, *, device: Any = None
    ) -> _PaddedSeqLenInfo:
        lengths, padding = checked_lengths(seqlens), as_size("kv_padding", padding)
        as_size("kv_padding times the number of blocks", padding * len(lengths))
        if max(lengths, default=0) > padding:
            raise ValueError(
                f"seqlens: got {max(lengths)}, expected at most the padding, {padding}"
            )
        starts = [padding * block for block in range(len(lengths) + 1)]
        return cls(
            seqstart=torch.tensor(starts, dtype=torch.int32, device=device),
            max_seqlen=max(lengths, default=0),
            min_seqlen=min(lengths, default=0),
            seqstart_py=starts,
            seqlen=torch.tensor(lengths, dtype=torch.int32, device=device),
            seqlen_py=lengths,
            padding=padding,
        )

    def from_seqlens_padded_inplace(self, seqlens: Sequence[int]) -> None:
        """Writes other lengths into seqlen and seqlen_py; the rest as in from_seqlens_inplace."""
        self.seqlen_py[:] = _checked_update(seqlens, len(self.seqlen_py), self.max_seqlen)
        self.seqlen.copy_(torch.tensor(self.seqlen_py, dtype=torch.int32))

    def from_seqlens_inplace(self, seqlens: Iterable[int]) -> None:
        raise TypeError("_PaddedSeqLenInfo: expected from_seqlens_padded_inplace(seqlens)")

    def to(self, device: Any) -> _PaddedSeqLenInfo:
        return replace(self, seqstart=self.seqstart.to(device), seqlen=self.seqlen.to(device))

    def intervals(self) -> Iterator[tuple[int, int]]:
        return _started(self.seqstart_py, self.seqlen_py)

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        raise NotImplementedError("split: got padded keys, expected keys without padding")


@dataclass
class _GappySeqInfo(_SeqLenInfo):
    """Blocks anywhere; seqlen is int32 (blocks,), seqlen_py the same as a list.

    The last of seqstart is the size of the whole dimension. In pages, each block has a dimension of
    its own: seqstart counts from its start, the last of seqstart means nothing, and seqlen is where
    the block ends.
    """

    seqlen: Tensor
    seqlen_py: Sequence[int]

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: Any = None) -> _SeqLenInfo:
        raise TypeError("_GappySeqInfo: expected from_seqlens_gappy(seqstarts, seqlens, paged)")

    @classmethod
    def from_seqlens_gappy(
        cls, seqstarts: Sequence[int], seqlens: Sequence[int], paged: bool, *, device: Any = None
    ) -> _GappySeqInfo:
        """seqstarts: of each block, and without pages the size of the dimension at the end."""
        lengths, starts = checked_lengths(seqlens), _checked_starts(seqstarts)
        expected = len(lengths) + (not paged)
        if len(starts) != expected:
            raise ValueError(
                f"seqstarts: got {len(starts)}, expected {expected}, as there are {len(lengths)} "
                f"seqlens and {'no' if paged else 'one'} entry for the size of the dimension"
            )
        ends = [start + length for start, length in zip(starts, lengths, strict=False)]
        if not paged and max(ends, default=0) > starts[-1]:
            raise ValueError(f"seqlens: got a block up to {max(ends)}, expected up to {starts[-1]}")
        if paged:
            starts.append(-1)
        return cls(
            seqstart=torch.tensor(starts, dtype=torch.int32, device=device),
            max_seqlen=max(lengths, default=0),
            min_seqlen=min(lengths, default=0),
            seqstart_py=starts,
            seqlen=torch.tensor(ends if paged else lengths, dtype=torch.int32, device=device),
            seqlen_py=ends if paged else lengths,
        )

    def from_seqlens_inplace(self, seqlens: Iterable[int]) -> None:
        raise NotImplementedError("_GappySeqInfo: expected a new one, made by from_seqlens_gappy")

    def to(self, device: Any) -> _GappySeqInfo:
        return replace(self, seqstart=self.seqstart.to(device), seqlen=self.seqlen.to(device))

    def intervals(self) -> Iterator[tuple[int, int]]:
        return _started(self.seqstart_py, self.seqlen_py)

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        raise NotImplementedError("split: got keys with gaps, expected keys without")


def checked_lengths(seqlens: Any) -> list[int]:
    """Returns the lengths of blocks; raises ValueError for one below 0."""
    return ints_of("seqlens", seqlens)


def _checked_starts(seqstarts: Any) -> list[int]:
    """Checks lengths like checked_lengths, but not their sum."""
    is_sequence = hasattr(seqstarts, "__iter__") and getattr(seqstarts, "ndim", 1) == 1
    if isinstance(seqstarts, (str, bytes, dict)) or not is_sequence:
        raise TypeError(f"seqstarts: got {type(seqstarts).__name__}, expected integers in a row")
    return [as_size("seqstarts", start) for start in seqstarts]


def _started(starts: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, end) of blocks; starts has one entry more, which says where the dimension ends."""
    for start, length in zip(starts, lengths, strict=False):
        yield start, start + length


def _checked_update(seqlens: Any, blocks: int, max_seqlen: int) -> list[int]:
    lengths = checked_lengths(seqlens)
    if len(lengths) != blocks:
        raise ValueError(f"seqlens: got {len(lengths)}, expected the {blocks} that are there")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"seqlens: got {max(lengths)}, expected at most max_seqlen, {max_seqlen}")
    return lengths
