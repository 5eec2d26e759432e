"""flash-attn's arguments as the record of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clinattn.backends.call import Arguments
from clinattn.integrations.flash_attn.words import (
    DENSE,
    PACKED,
    band,
    check_qkv,
    check_softcap,
)
from clinattn.operator.visibility import fold_window
from clinattn.operator.words import checks, feature_checks
from clinattn.operator.words.features import SEEDS
from clinattn.operator.words.scalars import as_float


def dense_call(q: Any, k: Any, v: Any, *words: Any, **more: Any) -> Arguments:
    """The call of dense q, k, v (batch, seqlen, heads, head_dim); words: those of _shared."""
    check_qkv(q, k, v, DENSE)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    checks.check_dense(q, k, v, enable_gqa=True)
    return Arguments(
        q, k, v,
        max_seqlen_q=q.shape[2],
        max_seqlen_k=k.shape[2],
        **_shared(q, q.shape[0], *words, **more),
    )  # fmt: skip


def packed_call(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *words: Any,
    **more: Any,
) -> Arguments:
    """The call of packed q, k, v (total, heads, head_dim)."""
    check_qkv(q, k, v, PACKED)
    checks.check_packed(q, k, v, enable_gqa=True)
    longest_q = checks.check_cu_seqlens("q", cu_seqlens_q, max_seqlen_q, q.shape[0], q.device)
    longest_k = checks.check_cu_seqlens("k", cu_seqlens_k, max_seqlen_k, k.shape[0], k.device)
    batch = len(cu_seqlens_q) - 1
    if len(cu_seqlens_k) - 1 != batch:
        raise ValueError(
            f"cu_seqlens_k: got {len(cu_seqlens_k) - 1} sequences, expected the {batch} of "
            "cu_seqlens_q"
        )
    return Arguments(
        q, k, v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
        **_shared(q, batch, *words, **more),
    )  # fmt: skip


def _shared(
    q: Tensor,
    batch: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None = None,
) -> dict[str, Any]:
    if softmax_scale is not None:
        softmax_scale = as_float("softmax_scale", softmax_scale)
    left, right = fold_window(checks.check_window(band(causal, window_size)), False)
    dropout_p = feature_checks.check_dropout(dropout_p)
    heads, slopes, seed = q.shape[1], None, None
    if alibi_slopes is not None:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        slopes = feature_checks.check_per_head(
            "alibi_slopes", alibi_slopes, q, (heads,), (batch, heads), dtype=dtype
        ).view(-1, heads)
    if dropout_p > 0:
        seed = torch.randint(0, SEEDS, (1,), device=q.device) if rng_state is None else rng_state
    return {
        "slopes": slopes,
        "seed": seed,
        "scale": checks.check_scale(softmax_scale, q.shape[-1], q.dtype),
        "window_left": left,
        "window_right": right,
        "bottom_right": True,
        "softcap": feature_checks.check_softcap(check_softcap(softcap), q.dtype),
        "dropout_p": dropout_p,
    }
