"""Places of blocks of tokens along a dimension: one after the other, or padded to one size."""

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

    def to(self, device: Any) -> _PaddedSeqLenInfo:
        return replace(self, seqstart=self.seqstart.to(device), seqlen=self.seqlen.to(device))

    def intervals(self) -> Iterator[tuple[int, int]]:
        for start, length in zip(self.seqstart_py, self.seqlen_py, strict=False):
            yield start, start + length

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        raise NotImplementedError("split: got padded keys, expected keys without padding")


def checked_lengths(seqlens: Any) -> list[int]:
    """Returns the lengths of blocks; raises ValueError for one below 0."""
    return ints_of("seqlens", seqlens)
