"""Windows of time over whole sequences, whose times are split as the tokens are."""

from __future__ import annotations

import torch
from torch import Tensor

from clinattn.operator.timeline import dense_rows, packed_rows, shifted_times, window_intervals
from clinattn.operator.words.feature_checks import check_order


def time_sides(
    times: Tensor, window: float, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns the first key and one past the last that each token sees, by place in its row.

    times: of whole rows, (B, N); or (T,) of packed documents with cu_seqlens, which are one row.
    dtype: that of lse. Returns int64 (B, N) twice, on the CPU. Raises ValueError for a decrease.
    """
    if cu_seqlens is None:
        rows = dense_rows(times, None)
    else:
        rows = packed_rows(times, cu_seqlens, len(times))
    check_order("times", times, rows)
    since = shifted_times(times, rows, rows.first, dtype)
    first = rows.first if cu_seqlens is not None else torch.zeros_like(rows.first)
    early, late = (
        (first + x).long().cpu().view(-1, times.shape[-1])
        for x in window_intervals(since, rows, window)
    )
    return early, late
