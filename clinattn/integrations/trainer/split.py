"""Results of a packed row, per sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

ENDS = "cu_seq_lens_q"


def per_sequence(outputs: Any, batch: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """Returns the results of each sequence of a packed row, in the order of the row.

    outputs: what the model returned, a mapping of names to tensors, for the batch of a
    PackingCollator. Of each tensor (1, T, ...) a sequence gets its tokens, (N, ...), and of one
    (S, ...) its row. Numbers of the whole row, such as the loss, and tuples are left out. Raises
    ValueError for other shapes.
    """
    ends = batch[ENDS].tolist()
    parts = {
        name: split(name, x, ends)
        for name, x in outputs.items()
        if isinstance(x, Tensor) and x.dim() > 0
    }
    return [{name: x[i] for name, x in parts.items()} for i in range(len(ends) - 1)]


def split(name: str, x: Tensor, ends: list[int]) -> list[Tensor]:
    """Cuts a tensor of a packed row into those of its sequences. ends: cu_seqlens, (S + 1,)."""
    if x.shape[:2] == (1, ends[-1]):
        return [x[0, a:b] for a, b in zip(ends, ends[1:], strict=False)]
    if len(x) == len(ends) - 1:
        return list(x)
    raise ValueError(
        f"{name}: got shape {tuple(x.shape)}, expected (1, {ends[-1]}, ...) of all tokens of the "
        f"row or ({len(ends) - 1}, ...) of its sequences"
    )


def padded(name: str, x: Tensor, ends: list[int]) -> Tensor:
    """Returns a tensor of a packed row as (S, N, ...), filled up with -100, or as (S, ...)."""
    parts = split(name, x, ends)
    if x.shape[:2] != (1, ends[-1]):
        return torch.stack(parts)
    return pad_sequence(parts, batch_first=True, padding_value=-100)
