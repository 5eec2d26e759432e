"""Batches of meds-torch-data (mmcdermott/meds-torch-data 0.6) as the encoder takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clinattn.operator.packing import mask_from_lengths

PAD_INDEX = 0  # of its codes, static ones too
FORM = "a batch in SM mode: code (B, N), padded on the right"


class Events(NamedTuple):
    """ids (B, N) int64; days (B, N) fp64; values (B, N) fp32, NaN without one; lengths (B,)."""

    ids: Tensor
    days: Tensor
    values: Tensor
    lengths: Tensor


def from_meds_torch(
    batch: Any, *, cls: int | None = None, values: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Token ids (B, N), and Encoder.encode's other arguments, for a MEDSTorchBatch.

    batch: one, or a mapping with its fields. Static codes, where they are apart, stand before the
    events, on day 0; cls, if given, before both. Ids are those of the batch, whose vocabulary has
    neither [CLS] nor [MASK]: give the encoder a larger vocab_size for them.
    The arguments are lengths (B,) and positions (B, N) fp64, days since the first event of each
    sequence, which rotary encoders take; a time_delta_days of NaN is no time passed. values=True
    adds values (B, N) fp32, NaN where there is none, for encoders of numeric values.
    What lies in the padding is not looked at.
    Raises ValueError for a batch of another form.
    """
    parts = [_dynamic(batch)]
    if _field(batch, "static_code") is not None:
        parts.insert(0, _static(batch, len(parts[0].ids)))
    if cls is not None:
        parts.insert(0, _constant(cls, parts[0].lengths))
    events = _joined(parts)
    arguments = {"lengths": events.lengths, "positions": events.days}
    return events.ids, arguments | ({"values": events.values} if values else {})


def _field(batch: Any, name: str) -> Tensor | None:
    return batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)


def _shaped(batch: Any, name: str, shape: torch.Size) -> Tensor:
    found = _field(batch, name)
    if found is None or found.shape != shape:
        given = None if found is None else tuple(found.shape)
        raise ValueError(f"{name} has shape {given}: expected {tuple(shape)}")
    return found


def _dynamic(batch: Any) -> Events:
    code = _field(batch, "code")
    if code is None or code.dim() != 2:
        shape = None if code is None else tuple(code.shape)
        raise ValueError(f"code has shape {shape}: expected {FORM}")
    lengths = _lengths("code", code)
    delta = _shaped(batch, "time_delta_days", code.shape)
    real = mask_from_lengths(lengths, code.shape[1])
    passed = torch.where(real & ~delta.isnan(), delta.double(), 0.0)
    if bool((passed < 0).any()):
        raise ValueError("time_delta_days has negative days: expected at least 0")
    days = passed.cumsum(1)
    return Events(code.long(), days - days[:, :1], _values(batch, "", code), lengths)


def _static(batch: Any, subjects: int) -> Events:
    code = _field(batch, "static_code")
    assert code is not None
    if code.dim() != 2 or len(code) != subjects:
        raise ValueError(
            f"static_code has shape {tuple(code.shape)}: expected ({subjects}, static codes)"
        )
    days = torch.zeros_like(code, dtype=torch.float64)
    return Events(code.long(), days, _values(batch, "static_", code), _lengths("static_code", code))


def _constant(token: int, like: Tensor) -> Events:
    """Events of a single token for each sequence, on day 0 without a value."""
    ids = torch.full_like(like, token)[:, None]
    values = torch.full_like(ids, float("nan"), dtype=torch.float32)
    return Events(ids, torch.zeros_like(ids, dtype=torch.float64), values, torch.ones_like(like))


def _values(batch: Any, prefix: str, code: Tensor) -> Tensor:
    """Values of events: NaN where the mask is off, all NaN where the batch has no values."""
    if _field(batch, f"{prefix}numeric_value") is None:
        return torch.full_like(code, float("nan"), dtype=torch.float32)
    values = _shaped(batch, f"{prefix}numeric_value", code.shape)
    known = _shaped(batch, f"{prefix}numeric_value_mask", code.shape)
    return torch.where(known.bool(), values.float(), float("nan"))


def _lengths(name: str, codes: Tensor) -> Tensor:
    real = codes != PAD_INDEX
    lengths = real.sum(1)
    if not bool((real == mask_from_lengths(lengths, codes.shape[1])).all()):
        raise ValueError(f"{name} has padding before or between its codes: expected {FORM}")
    return lengths


def _joined(parts: list[Events]) -> Events:
    """The parts of each sequence one after the other, without the padding between them."""
    lengths = torch.stack([part.lengths for part in parts]).sum(0)
    shape = len(lengths), int(lengths.max()) if len(lengths) else 0
    ids = lengths.new_full(shape, PAD_INDEX)
    days = torch.zeros_like(ids, dtype=torch.float64)
    values = torch.full_like(ids, float("nan"), dtype=torch.float32)
    start = torch.zeros_like(lengths)
    for part in parts:
        real = mask_from_lengths(part.lengths, part.ids.shape[1])
        row, column = real.nonzero(as_tuple=True)
        at = row, start[row] + column
        ids[at], days[at], values[at] = part.ids[real], part.days[real], part.values[real]
        start = start + part.lengths
    return Events(ids, days, values, lengths)
