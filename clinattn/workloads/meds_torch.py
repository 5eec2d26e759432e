"""Batches of meds-torch-data (mmcdermott/meds-torch-data 0.6) as the encoder takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clinattn.packing import mask_from_lengths

PAD_INDEX = 0  # of its codes, static ones too
FORM = "a batch in SM mode: code (B, N), padded on the right"


def from_meds_torch(batch: Any, cls: int | None = None) -> dict[str, Tensor]:
    """What Encoder.encode takes for a MEDSTorchBatch, or a mapping with its fields.

    input_ids (B, N) int64, lengths (B,), and positions (B, N) fp64, days since the first event of
    each sequence, for rotary encoders. Static codes, where they are apart, stand before the events
    on day 0; cls, if given, before both. NaN in time_delta_days is no time passed, and what lies in
    the padding is not looked at. Ids are those of the batch, whose vocabulary has neither [CLS] nor
    [MASK]: give the encoder a larger vocab_size for them. The encoder has no place for
    numeric_value, which stays where it is.
    Raises ValueError for a batch of another form.
    """
    code = _field(batch, "code")
    if code is None or code.dim() != 2:
        shape = None if code is None else tuple(code.shape)
        raise ValueError(f"code has shape {shape}: expected {FORM}")
    lengths = _lengths("code", code)
    delta = _field(batch, "time_delta_days")
    if delta is None or delta.shape != code.shape:
        shape = None if delta is None else tuple(delta.shape)
        raise ValueError(f"time_delta_days has shape {shape}: expected {tuple(code.shape)}")
    real = mask_from_lengths(lengths, code.shape[1])
    days = torch.where(real & ~delta.isnan(), delta.double(), 0.0)
    if bool((days < 0).any()):
        raise ValueError("time_delta_days has negative days: expected at least 0")
    days = days.cumsum(1)
    days = days - days[:, :1]

    parts = [(code.long(), days, lengths)]
    static = _field(batch, "static_code")
    if static is not None:
        if static.dim() != 2 or len(static) != len(code):
            raise ValueError(
                f"static_code has shape {tuple(static.shape)}: expected ({len(code)}, static codes)"
            )
        parts.insert(
            0,
            (
                static.long(),
                torch.zeros_like(static, dtype=torch.float64),
                _lengths("static_code", static),
            ),
        )
    if cls is not None:
        column = code.new_full((len(code), 1), cls, dtype=torch.int64)
        parts.insert(
            0,
            (column, column.new_zeros(column.shape, dtype=torch.float64), torch.ones_like(lengths)),
        )
    ids, days, lengths = _joined(parts)
    return {"input_ids": ids, "lengths": lengths, "positions": days}


def _field(batch: Any, name: str) -> Tensor | None:
    return batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)


def _lengths(name: str, codes: Tensor) -> Tensor:
    real = codes != PAD_INDEX
    lengths = real.sum(1)
    if not bool((real == mask_from_lengths(lengths, codes.shape[1])).all()):
        raise ValueError(f"{name} has padding before or between its codes: expected {FORM}")
    return lengths


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of (ids, days, lengths) one after the other without the padding between them."""
    total = torch.stack([lengths for _, _, lengths in parts]).sum(0)
    shape = (len(total), int(total.max()) if len(total) else 0)
    ids = total.new_full(shape, PAD_INDEX)
    days = torch.zeros(shape, dtype=torch.float64, device=total.device)
    start = torch.zeros_like(total)
    for part_ids, part_days, lengths in parts:
        row, column = mask_from_lengths(lengths, part_ids.shape[1]).nonzero(as_tuple=True)
        ids[row, start[row] + column] = part_ids[row, column]
        days[row, start[row] + column] = part_days[row, column]
        start = start + lengths
    return ids, days, total
