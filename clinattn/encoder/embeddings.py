"""Embeddings: from token ids, events or signals of clinical data to the first hidden states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clinattn.operator.packing import mask_from_lengths
from clinattn.operator.words.checks import check_tensor
from clinattn.operator.words.scalars import as_size

from .config import EncoderConfig


class BiaslessLayerNorm(nn.LayerNorm):
    """A type of its own: Opacus takes a bias for granted in nn.LayerNorm, and vmaps what is not."""


def make_norm(config: EncoderConfig) -> nn.Module:
    if config.norm_kind == "rms":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    kind = nn.LayerNorm if config.norm_bias else BiaslessLayerNorm
    return kind(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


class Embeddings(nn.Module):
    """The sum of what is known of each token, normalised."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        size = config.hidden_size
        learned = config.positions == "learned"
        self.tokens: nn.Embedding | nn.Linear = (
            nn.Linear(config.channels, size)
            if config.channels
            else nn.Embedding(config.vocab_size, size)
        )
        self.values = nn.Linear(2, size, bias=False) if config.numeric_values else None
        self.positions = nn.Embedding(config.max_positions, size) if learned else None
        self.types = nn.Embedding(config.token_types, size) if config.token_types else None
        self.norm = make_norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.offset = config.position_offset
        self.sinusoidal_base = config.rotary_base if config.positions == "sinusoidal" else None

    def forward(
        self,
        inputs: Tensor,
        positions: Tensor,
        token_types: Tensor | None,
        values: Tensor | None = None,
    ) -> Tensor:
        """Every table is read by its module and for each sample: per-sample gradients need both."""
        x = self.tokens(inputs)
        if self.values is not None:
            assert values is not None
            x = x + self.values(value_and_presence(values, x.dtype))
        if self.positions is not None:
            positions = positions.expand(x.shape[:-1]).contiguous()
            x = x + self.positions(positions + self.offset if self.offset else positions)
        if self.sinusoidal_base is not None:
            x = x + sinusoids(positions, x.shape[-1], self.sinusoidal_base).to(x.dtype)
        if self.types is not None:
            if token_types is None:
                token_types = torch.zeros((*x.shape[:-2], 1), dtype=torch.long, device=x.device)
            x = x + self.types(token_types)
        return self.dropout(self.norm(x))


def value_and_presence(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values (...), NaN where there is none -> (..., 2): the value or 0, and 1 or 0."""
    present = ~values.isnan()
    return torch.stack((values.where(present, 0), present), -1).to(dtype)


def sinusoids(positions: Tensor, size: int, base: float) -> Tensor:
    """sin and cos of position * base ** (-2 i / size), pairwise (Vaswani et al., 2017), in fp64.

    positions: (...), integers or real times, as they are. Returns (..., size).
    """
    pair = torch.arange(0, size, 2, device=positions.device, dtype=torch.float64)
    angles = positions.double()[..., None] * base ** (-pair / size)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)


def patches(signal: Tensor, size: int, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cut signals into tokens of `size` samples, for an encoder of size * leads channels.

    signal: (B, samples, leads). lengths: (B,) samples, default all. What lies beyond is not read,
    and the rest of a sequence's last patch is zero.
    Returns (B, ceil(samples / size), size * leads) and the lengths (B,) in patches.
    Raises ValueError for another shape, a size below 1 or lengths out of range.
    """
    check_tensor("signal", signal)
    size = as_size("size", size)
    if lengths is not None:
        check_tensor("lengths", lengths)
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"lengths has dtype {lengths.dtype}: expected int32 or int64")
    if signal.dim() != 3:
        raise ValueError(f"signal has shape {tuple(signal.shape)}: expected (B, samples, leads)")
    if size < 1:
        raise ValueError(f"size={size}: expected at least 1")
    batch, samples, leads = signal.shape
    if lengths is None:
        lengths = torch.full((batch,), samples, device=signal.device)
    if lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}: expected ({batch},)")
    if lengths.device != signal.device:
        raise ValueError(f"lengths is on {lengths.device}: expected {signal.device}")
    if bool(((lengths < 0) | (lengths > samples)).any()):
        raise ValueError(f"lengths={lengths.tolist()}: expected 0 to {samples} samples")
    signal = signal.where(mask_from_lengths(lengths, samples)[..., None], 0)
    signal = nn.functional.pad(signal, (0, 0, 0, -samples % size))
    return signal.unflatten(1, (-1, size)).flatten(2), (lengths + size - 1) // size
