"""Tokens of a batch: which are real, and where they stand in what the caller gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from clinattn.backends.call import Arguments
from clinattn.operator.words.scalars import as_int

MEAN = "mean"


@runtime_checkable
class Layout(Protocol):
    """The layout of a batch in an encoder of clinattn.encoder."""

    def pack(self, x: Tensor) -> Tensor: ...

    def restore(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Tokens:
    """Tokens as attention has them, (B, N), or packed (T,).

    real: bool, False for padding. cu_seqlens: (S + 1,) of packed ones. layout: between them and
    what the caller gave; without one, that is the same, or for packed ones of the shape `given`.
    """

    real: Tensor
    cu_seqlens: Tensor | None
    layout: Layout | None
    given: tuple[int, ...] | None

    @classmethod
    def of(
        cls,
        calls: Sequence[Arguments],
        layout: Layout | None,
        attention_mask: Tensor | None,
        given: tuple[int, ...] | None,
    ) -> Tokens:
        """calls: of all layers, whose tokens are the same. attention_mask: of the model, or None.
        """
        first = calls[0]
        if first.is_packed():
            assert first.cu_seqlens_q is not None
            ends = first.cu_seqlens_q.to(first.q.device)
            total = first.q.shape[0]
            real = torch.arange(total, device=ends.device) < ends[-1]
            return cls(real, ends, layout, given if given and _size(given) == total else None)
        real = seen(first)
        for call in calls[1:]:
            real = real & seen(call)
        if layout is None and attention_mask is not None and attention_mask.shape == real.shape:
            real = real & attention_mask.to(real.device).ne(0)
        return cls(real, None, layout, None)

    def as_given(self, x: Tensor) -> Tensor:
        """x (B, N, ...), or packed (T, ...), as the caller lays out tokens, with zeros in padding.
        """
        x = x.where(self.real.view(*self.real.shape, *(1,) * (x.dim() - self.real.dim())), 0)
        if self.layout is not None:
            return self.layout.restore(x)
        return x if self.given is None else x.view(*self.given, *x.shape[1:])

    def as_attended(self, name: str, x: Any) -> Tensor:
        """x as the caller lays out tokens, as attention has them, with zeros in padding."""
        expected = tuple(self.as_given(self.real.double()).shape)
        if not isinstance(x, Tensor) or tuple(x.shape) != expected:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: got {got}, expected a tensor of shape {expected}")
        x = x.to(self.real.device)
        x = x.flatten() if self.given is not None else x
        x = x if self.layout is None else self.layout.pack(x)
        return x.where(self.real, 0)

    def ranks(self) -> tuple[Tensor, Tensor]:
        """The place of each token among the real ones of its sequence, and their number."""
        if self.cu_seqlens is None:
            count = self.real.sum(1, keepdim=True)
            return self.real.cumsum(1) - 1, count.expand_as(self.real)
        ends = self.cu_seqlens.long()
        of = self.sequence_of().clamp(max=len(ends) - 2)
        at = torch.arange(len(self.real), device=ends.device)
        return at - ends[of], ends.diff()[of]

    def sequence_of(self) -> Tensor:
        """The sequence of each token; for packed ones past the end the number of sequences."""
        if self.cu_seqlens is None:
            rows = torch.arange(len(self.real), device=self.real.device)
            return rows[:, None].expand_as(self.real)
        at = torch.arange(len(self.real), device=self.real.device)
        return torch.bucketize(at, self.cu_seqlens[1:].long(), right=True)

    @property
    def sequences(self) -> int:
        return len(self.real) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def chosen(self, token: Any, dtype: torch.dtype) -> Tensor:
        """1 at the chosen token of each sequence, or with "mean" 1 / n at its n real tokens.

        token: an int, or one for each sequence; counts the real tokens, from the end if negative.
        A sequence without tokens has none. Raises ValueError or TypeError for others.
        """
        ranks, counts = self.ranks()
        if isinstance(token, str) and token == MEAN:
            return self.real.to(dtype) / counts.clamp(min=1)
        at = self._places(token)
        lengths = self._lengths()
        bad = ((at < -lengths) | (at >= lengths)) & (lengths > 0)
        if bool(bad.any()):
            s = int(bad.nonzero()[0])
            raise ValueError(
                f"token: got {int(at[s])}, and sequence {s} has {int(lengths[s])} tokens"
            )
        at = torch.where(at < 0, at + lengths, at)
        of = self.sequence_of().clamp(max=max(self.sequences - 1, 0))
        return ((ranks == at[of]) & self.real).to(dtype)

    def summed(self, x: Tensor) -> Tensor:
        """The sum over the real tokens of each sequence, (S,), of x like the tokens."""
        sums = x.new_zeros(self.sequences)
        return sums.index_add(0, self.sequence_of()[self.real], x[self.real])

    def _places(self, token: Any) -> Tensor:
        device = self.real.device
        if isinstance(token, (Tensor, list, tuple)) and not (
            isinstance(token, Tensor) and token.dim() == 0
        ):
            at = torch.as_tensor(token, device=device)
            if at.is_floating_point() or at.dtype == torch.bool:
                raise TypeError(f"token: got {at.dtype}, expected integers")
            if tuple(at.shape) != (self.sequences,):
                raise ValueError(
                    f"token: got shape {tuple(at.shape)}, expected ({self.sequences},), one for "
                    "each sequence"
                )
            return at.long()
        one = as_int("token", token, "an int, one for each sequence, or 'mean'")
        return torch.full((self.sequences,), one, device=device)

    def _lengths(self) -> Tensor:
        if self.cu_seqlens is None:
            return self.real.sum(1)
        return self.cu_seqlens.long().diff()

    def places(self, x: Tensor, places: Tensor) -> Tensor:
        """Places of keys within their sequences, as the caller counts them; -1 stays.

        x: the token of each row of places, an index into the flattened tokens. places: (R, ...).
        """
        origin = self._origin().flatten()
        if self.cu_seqlens is None:
            starts = x // self.real.shape[1] * self.real.shape[1]
        else:
            starts = self.cu_seqlens.long()[self.sequence_of()[x]]
        at = starts.view(-1, *(1,) * (places.dim() - 1)) + places.clamp(min=0)
        return torch.where(places < 0, places, origin[at])

    def _origin(self) -> Tensor:
        """The place of each token in its row or sequence, as the caller gave it."""
        shape = getattr(self.layout, "batch_shape", None)
        if self.cu_seqlens is not None and shape is None:
            return self.ranks()[0]
        batch, length = self.real.shape if shape is None else shape
        at = torch.arange(length, device=self.real.device).expand(batch, length)
        return at if self.layout is None else self.layout.pack(at)

    def split(self, x: Tensor) -> list[Tensor]:
        """x as the caller lays out tokens, one tensor for each sequence, without padding."""
        x = self.as_attended("x", x)
        of = self.sequence_of()
        return [x[self.real & (of == s)] for s in range(self.sequences)]


def seen(call: Arguments) -> Tensor:
    """Tokens (B, N) of dense self-attention that lengths and masks do not hide from all queries."""
    batch, _, tokens, _ = call.k.shape
    device = call.k.device
    at = torch.arange(tokens, device=device)
    real = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    for ends in (call.q_lengths, call.kv_end):
        if ends is not None:
            real &= at < ends.to(device)[:, None]
    if call.kv_start is not None:
        real &= at >= call.kv_start.to(device)[:, None]
    if call.mask is not None:
        mask = call.mask.detach()
        if mask.dtype == torch.bool:
            real &= mask.any(2).any(1)
        else:
            real &= mask.amax((1, 2)) > torch.finfo(mask.dtype).min
    return real


def _size(shape: Sequence[int]) -> int:
    size = 1
    for x in shape:
        size *= x
    return size
