"""xformers' attn_bias classes: what is visible, said without an N x N tensor.

Where these say "from bottom right", the last query of a sequence (a block) sees its last key;
otherwise query i is key i. A query may see nothing: its output is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from clinattn.integrations.xformers.bands import band_of
from clinattn.integrations.xformers.seqlens import _PaddedSeqLenInfo, _SeqLenInfo, checked_lengths
from clinattn.operator.words.scalars import as_int

B = TypeVar("B", bound="BlockDiagonalMask")


class AttentionBias:
    """Base of what may be given as attn_bias besides a tensor."""

    def to(self, device: Any) -> Any:
        return self

    def materialize(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
    ) -> Tensor:
        """0 where visible, -inf elsewhere, (..., n_queries, n_keys); for tests and printing."""
        visible = torch.zeros(shape[-2:], dtype=torch.bool, device=device)
        for (start_q, end_q), (start_k, end_k) in self._blocks(*shape[-2:]):
            block = band_of(self).visible(end_q - start_q, end_k - start_k, device)
            visible[start_q:end_q, start_k:end_k] = block
        bias = torch.zeros(shape[-2:], dtype=dtype, device=device)
        return bias.masked_fill(~visible, -float("inf")).expand(shape)

    def _blocks(
        self, n_queries: int, n_keys: int
    ) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        yield (0, n_queries), (0, n_keys)


class LowerTriangularMask(AttentionBias):
    """Causal: query i sees the keys j <= i."""

    def add_bias(self, bias: Tensor) -> LowerTriangularMaskWithTensorBias:
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """Causal, with a tensor added to the scores, which may need a gradient."""

    def __init__(self, bias: Tensor) -> None:
        self._bias = bias

    def to(self, device: Any) -> LowerTriangularMaskWithTensorBias:
        return LowerTriangularMaskWithTensorBias(self._bias.to(device))

    def materialize(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: Any = "cpu"
    ) -> Tensor:
        return super().materialize(shape, dtype, device) + self._bias.to(device, dtype)


class LowerTriangularFromBottomRightMask(AttentionBias):
    """Causal from bottom right."""

    def make_local_attention(
        self, window_size: int
    ) -> LowerTriangularFromBottomRightLocalAttentionMask:
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """Causal from bottom right, and of that the nearest _window_size keys."""

    _window_size: int

    def __post_init__(self) -> None:
        check_window_size(self._window_size)


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """Band from bottom right: window_left keys before a query's place, window_right after it."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        for name in ("window_left", "window_right"):
            if as_int(name, getattr(self, name)) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 0")


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


@dataclass
class BlockDiagonalPaddedKeysMask(AttentionBias):
    """Blocks whose keys start at multiples of kv_padding; what lies between is not seen."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _PaddedSeqLenInfo

    def to(self, device: Any) -> Any:
        return replace(
            self, q_seqinfo=self.q_seqinfo.to(device), k_seqinfo=self.k_seqinfo.to(device)
        )

    _blocks = BlockDiagonalMask._blocks

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
        check_as_many(q_seqlen, kv_seqlen)
        return cls(
            q_seqinfo=_SeqLenInfo.from_seqlens(q_seqlen, device=device),
            k_seqinfo=_PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, kv_padding, device=device),
        )


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Each block causal from bottom right, where the last key is the last that counts."""

    causal_diagonal: Any = None


def check_window_size(window_size: Any) -> None:
    if as_int("window_size", window_size) <= 0:
        raise ValueError(f"window_size: got {window_size}, expected > 0")


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
