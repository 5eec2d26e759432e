"""Biases of sequences one after the other, with a block of keys for each block of queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from clinattn.integrations.xformers.dense_biases import AttentionBias, check_window_size
from clinattn.integrations.xformers.seqlens import _SeqLenInfo, checked_lengths

B = TypeVar("B", bound="BlockDiagonalMask")


@dataclass
class BlockDiagonalMask(AttentionBias):
    """Sequences one after the other in a batch of 1, each of which sees only itself."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo
    _batch_sizes: Sequence[int] | None = None

    def to(self: B, device: Any) -> B:
        q_seqinfo = self.q_seqinfo.to(device)
        same = self.k_seqinfo is self.q_seqinfo
        k_seqinfo = q_seqinfo if same else self.k_seqinfo.to(device)
        return replace(self, q_seqinfo=q_seqinfo, k_seqinfo=k_seqinfo)

    def _blocks(
        self, n_queries: int, n_keys: int
    ) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        expected = (self.q_seqinfo.seqstart_py[-1], self.k_seqinfo.seqstart_py[-1])
        if (n_queries, n_keys) != expected:
            raise ValueError(f"shape: got {n_queries} x {n_keys}, expected {expected}")
        return zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True)

    @classmethod
    def from_seqlens(
        cls: type[B],
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int] | None = None,
        *,
        device: Any = None,
    ) -> B:
        """Lengths of the sequences; kv_seqlen defaults to q_seqlen. device: default the CPU."""
        q_seqinfo = _SeqLenInfo.from_seqlens(q_seqlen, device=device)
        k_seqinfo = q_seqinfo
        if kv_seqlen is not None and checked_lengths(kv_seqlen) != checked_lengths(q_seqlen):
            check_as_many(q_seqlen, kv_seqlen)
            k_seqinfo = _SeqLenInfo.from_seqlens(kv_seqlen, device=device)
        return cls(q_seqinfo=q_seqinfo, k_seqinfo=k_seqinfo)

    @classmethod
    def from_tensor_list(cls: type[B], tensors: Sequence[Tensor]) -> tuple[B, Tensor]:
        """The bias of tensors (b, seqlen, ...), and these as one, (1, total, ...)."""
        bias = cls.from_seqlens(lengths_of(tensors), device=tensors[0].device)
        return replace(bias, _batch_sizes=[len(x) for x in tensors]), joined(tensors)

    @classmethod
    def from_tensor_lists_qkv(
        cls: type[B],
        tensors_q: Sequence[Tensor],
        tensors_k: Sequence[Tensor],
        tensors_v: Sequence[Tensor] | None = None,
    ) -> tuple[B, Tensor, Tensor, Tensor | None]:
        """(bias, q, k, v), the tensors joined as in from_tensor_list; v None without tensors_v."""
        check_as_many(tensors_q, tensors_k)
        for q, k in zip(tensors_q, tensors_k, strict=True):
            if len(q) != len(k):
                raise ValueError(f"tensors_k: got batch size {len(k)}, expected {len(q)}, as in q")
        if tensors_v is not None and lengths_of(tensors_v) != lengths_of(tensors_k):
            raise ValueError("tensors_v: got other lengths than tensors_k, expected the same")
        device = tensors_q[0].device
        bias = cls.from_seqlens(lengths_of(tensors_q), lengths_of(tensors_k), device=device)
        bias = replace(bias, _batch_sizes=[len(x) for x in tensors_q])
        values = None if tensors_v is None else joined(tensors_v)
        return bias, joined(tensors_q), joined(tensors_k), values

    @classmethod
    def from_tensor_lists_qk(
        cls: type[B], tensors_q: Sequence[Tensor], tensors_k: Sequence[Tensor]
    ) -> tuple[B, Tensor, Tensor]:
        """(bias, q, k) of from_tensor_lists_qkv."""
        bias, q, k, _ = cls.from_tensor_lists_qkv(tensors_q, tensors_k)
        return bias, q, k

    def split_queries(self, tensor: Tensor) -> list[Tensor]:
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def split_kv(self, tensor: Tensor) -> list[Tensor]:
        return self.k_seqinfo.split(tensor, self._batch_sizes)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The inverse of from_tensor_list, for queries and keys of the same lengths."""
        if self.q_seqinfo.seqstart_py != self.k_seqinfo.seqstart_py:
            raise ValueError("split: got queries and keys of other lengths; use split_queries")
        return self.split_queries(tensor)

    def make_causal(self) -> BlockDiagonalCausalMask:
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        return BlockDiagonalCausalFromBottomRightMask(
            self.q_seqinfo, self.k_seqinfo, self._batch_sizes
        )

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        return BlockDiagonalCausalLocalAttentionMask(
            self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size
        )

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> BlockDiagonalCausalLocalAttentionFromBottomRightMask:
        return BlockDiagonalCausalLocalAttentionFromBottomRightMask(
            self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size
        )


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Each block causal."""


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Each block causal from bottom right."""


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """Each block causal, and of that the nearest _window_size keys."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        check_window_size(self._window_size)


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """Each block causal from bottom right, and of that the nearest _window_size keys."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        check_window_size(self._window_size)


def check_as_many(queries: Sequence[Any], keys: Sequence[Any]) -> None:
    for name, x in (("queries", queries), ("keys", keys)):
        if not hasattr(x, "__len__") or getattr(x, "ndim", 1) != 1:
            raise TypeError(f"{name}: got {type(x).__name__}, expected a list of lengths")
    if len(queries) != len(keys):
        raise ValueError(f"keys: got {len(keys)} sequences, expected those of q, {len(queries)}")


def lengths_of(tensors: Sequence[Tensor]) -> list[int]:
    """Lengths of all sequences in tensors (b, seqlen, ...)."""
    return [x.shape[1] for x in tensors for _ in range(len(x))]


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors (b, seqlen, ...) as one, (1, total, ...)."""
    return torch.cat([x.flatten(0, 1) for x in tensors])[None]
