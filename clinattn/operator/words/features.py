"""The user's words beyond masks, windows and lengths, turned into what the ops take."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from clinattn.operator.timeline import (
    Rows,
    dense_rows,
    packed_rows,
    segment_intervals,
    shifted_times,
    window_intervals,
)
from clinattn.operator.words import feature_checks as checks

SEEDS = 1 << 62


class Words(NamedTuple):
    """Arguments of the public functions, as given."""

    segment_ids: Any
    times: Any
    time_window: Any
    time_decay: Any
    alibi_slopes: Any
    relative_bias: Any
    scalars: dict[str, Any]  # FEATURE_SCALARS by name


def _features(
    words: Words, query: Tensor, heads: int, batch: int, n_keys: int | None, timeline: Any
) -> dict[str, Any]:
    """The fields of Arguments that follow from words."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    scalars = checks.check_scalars(words.scalars, query.dtype, n_keys)
    decay = slopes = relative = seed = None
    if words.alibi_slopes is not None:
        slopes = checks.check_per_head(
            "alibi_slopes", words.alibi_slopes, query, (heads,), (batch, heads), dtype=dtype
        )
        slopes = slopes.view(-1, heads)
    if words.relative_bias is not None:
        relative = checks.check_relative(words.relative_bias, query, heads, dtype)
    if words.time_decay is not None:
        decay = checks.check_per_head("time_decay", words.time_decay, query, (heads,), dtype=dtype)
    lo, hi, since = timeline(dtype)
    if scalars["dropout_p"] > 0:
        seed = torch.randint(0, SEEDS, (1,), device=query.device)
    times = None if decay is None else since
    return {
        "lo": lo,
        "hi": hi,
        "times": times,
        "decay": decay,
        "slopes": slopes,
        "relative": relative,
        "seed": seed,
        **scalars,
    }


def _intervals(
    words: Words, rows: Rows, origin: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(lo, hi, times) of checked segment_ids and times."""
    lo = hi = since = None
    if words.segment_ids is not None:
        checks.check_order("segment_ids", words.segment_ids, rows)
        lo, hi = segment_intervals(words.segment_ids, rows)
    if words.times is not None:
        checks.check_order("times", words.times, rows)
        since = shifted_times(words.times, rows, origin, dtype)
    if since is not None and words.time_window is not None:
        early, late = window_intervals(since, rows, words.time_window)
        lo = early if lo is None else torch.maximum(lo, early)
        hi = late if hi is None else torch.minimum(hi, late)
    return lo, hi, since


def dense_features(
    words: Words,
    query: Tensor,
    n_keys: int,
    lengths: Tensor | None,
    kv_start: Tensor | None,
) -> dict[str, Any]:
    """Fields of Arguments.

    lengths: of the rows of segment_ids and times. kv_start: each row's first key that counts.
    """
    batch, heads, n_queries, _ = query.shape
    window = checks.check_time_words(words.times, words.time_window, words.time_decay)
    words = words._replace(time_window=window)

    def timeline(dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        shape = (batch, n_queries)
        for name, x, check in (
            ("segment_ids", words.segment_ids, checks.check_segment_ids),
            ("times", words.times, checks.check_times),
        ):
            if x is not None:
                checks.check_self_attention(name, n_queries, n_keys)
                check(x, query, shape)
        some = words.segment_ids if words.segment_ids is not None else words.times
        if some is None:
            return None, None, None
        rows = dense_rows(some, lengths)
        origin = rows.first
        if kv_start is not None:  # left padding
            origin = origin + kv_start.clamp(0, max(n_keys - 1, 0))[:, None]
        return _intervals(words, rows, origin, dtype)

    return _features(words, query, heads, batch, n_keys, timeline)


def packed_features(
    words: Words,
    query: Tensor,
    n_keys: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen: int,
) -> dict[str, Any]:
    """Fields of Arguments."""
    window = checks.check_time_words(words.times, words.time_window, words.time_decay)
    words = words._replace(time_window=window)

    def timeline(dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if words.times is None:
            return None, None, None
        same = cu_seqlens_k is cu_seqlens_q or checks.same_values(cu_seqlens_q, cu_seqlens_k)
        total = query.shape[0]
        checks.check_self_attention("times", total, n_keys, same)
        checks.check_times(words.times, query, (total,))
        rows = packed_rows(words.times, cu_seqlens_q, max_seqlen)
        return _intervals(words, rows, rows.first, dtype)

    return _features(words, query, query.shape[1], cu_seqlens_q.shape[0] - 1, None, timeline)
