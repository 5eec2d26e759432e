"""Turns the arguments of the public functions into the record of a call: checked, in one form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.amp import is_autocast_available

from clinattn.backends.call import Arguments
from clinattn.operator.visibility import PreparedMask, Window, fold_window, prepare_mask, shorter
from clinattn.operator.words import checks, forms
from clinattn.operator.words.features import Words, dense_features, packed_features
from clinattn.operator.words.scalars import as_flag

# Asked here, as torch.compile of torch 2.11 cannot trace the question.
AUTOCAST = tuple(x for x in ("cpu", "cuda", "xpu", "mps", "hpu") if is_autocast_available(x))


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Casts as autocast does for torch's own attention: all but fp64 to the lower precision."""
    if not torch._C._is_any_autocast_enabled():  # the device's own question takes 0.3 us more
        return query, key, value
    device_type = query.device.type
    if device_type in AUTOCAST and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = (
            x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
            for x in (query, key, value)
        )
    return query, key, value


def dense_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | PreparedMask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window = None,
    bottom_right: bool = False,
    kv_lengths: Tensor | None = None,
    q_lengths: Tensor | None = None,
    segment_ids: Tensor | None = None,
    times: Tensor | None = None,
    time_window: float | None = None,
    time_decay: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    softcap: float | None = None,
    global_prefix: int = 0,
) -> tuple[Arguments, forms.DenseForm | None]:
    """Returns the call of fused_attention's arguments, checked; and the form of those not 4-D."""
    checks.check_tensors(query, key, value)
    query, key, value = _autocast(query, key, value)
    enable_gqa = as_flag("enable_gqa", enable_gqa)
    form = None
    if not checks.has_checked_form(query, key, value, enable_gqa):
        form = forms.dense_form(query, key, value, attn_mask, enable_gqa)
        form.refuse(
            kv_lengths=kv_lengths, q_lengths=q_lengths, segment_ids=segment_ids, times=times,
            time_decay=time_decay, alibi_slopes=alibi_slopes, relative_bias=relative_bias,
        )  # fmt: skip
        query, key, value, attn_mask, _ = form
        checks.check_dense(query, key, value, True)
    batch, heads, n_queries, head_dim = query.shape
    n_keys = key.shape[2]
    is_causal, bottom_right = as_flag("is_causal", is_causal), as_flag("bottom_right", bottom_right)
    left, right = fold_window(checks.check_window(window), is_causal)
    kv_start = kv_end = None
    if isinstance(attn_mask, PreparedMask):
        attn_mask, kv_start, kv_end = attn_mask
    elif attn_mask is not None:
        checks.check_mask(attn_mask, (batch, heads, n_queries, n_keys), query.device)
        attn_mask, kv_start, kv_end = prepare_mask(
            attn_mask, batch, n_keys, query.dtype, keep_end=bottom_right
        )
    if kv_lengths is not None:
        kv_lengths = checks.check_lengths("kv_lengths", kv_lengths, batch, n_keys, query.device)
        kv_end = shorter(kv_end, kv_lengths)
    if q_lengths is not None:
        q_lengths = checks.check_lengths("q_lengths", q_lengths, batch, n_queries, query.device)
    scale = checks.check_scale(scale, head_dim, query.dtype)
    lengths = None
    if segment_ids is not None or times is not None:
        lengths = shorter(q_lengths, kv_lengths)
        q_lengths, kv_end = lengths, shorter(kv_end, lengths)
    call = Arguments(
        query,
        key,
        value,
        attn_mask,
        q_lengths=q_lengths,
        kv_start=kv_start,
        kv_end=kv_end,
        scale=scale,
        window_left=left,
        window_right=right,
        bottom_right=bottom_right,
        max_seqlen_q=n_queries,
        max_seqlen_k=n_keys,
    )
    if not (
        segment_ids is times is time_window is time_decay is alibi_slopes is relative_bias is None
        and softcap is None and global_prefix == 0 and dropout_p == 0
    ):  # fmt: skip
        words = Words(
            segment_ids, times, time_window, time_decay, alibi_slopes, relative_bias,
            {"softcap": softcap, "global_prefix": global_prefix, "dropout_p": dropout_p},
        )  # fmt: skip
        call = call._replace(**dense_features(words, query, n_keys, lengths, kv_start))
    return call, form


def packed_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window = None,
    bottom_right: bool = False,
    times: Tensor | None = None,
    time_window: float | None = None,
    time_decay: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    softcap: float | None = None,
    global_prefix: int = 0,
) -> Arguments:
    """Returns the call of fused_attention_varlen's arguments, checked."""
    checks.check_tensors(query, key, value)
    query, key, value = _autocast(query, key, value)
    checks.check_packed(query, key, value, as_flag("enable_gqa", enable_gqa))
    is_causal, bottom_right = as_flag("is_causal", is_causal), as_flag("bottom_right", bottom_right)
    left, right = fold_window(checks.check_window(window), is_causal)
    max_seqlen_q = checks.check_cu_seqlens(
        "q", cu_seqlens_q, max_seqlen_q, query.shape[0], query.device
    )
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    max_seqlen_k = checks.check_cu_seqlens(
        "k", cu_seqlens_k, max_seqlen_k, key.shape[0], key.device
    )
    if cu_seqlens_k.shape[0] != cu_seqlens_q.shape[0]:
        raise ValueError(
            f"cu_seqlens_k: got {cu_seqlens_k.shape[0] - 1} sequences, "
            f"expected the {cu_seqlens_q.shape[0] - 1} of cu_seqlens_q"
        )
    scale = checks.check_scale(scale, query.shape[2], query.dtype)
    call = Arguments(
        query,
        key,
        value,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        scale=scale,
        window_left=left,
        window_right=right,
        bottom_right=bottom_right,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    if not (
        times is time_window is time_decay is alibi_slopes is relative_bias is softcap is None
        and global_prefix == 0 and dropout_p == 0
    ):  # fmt: skip
        words = Words(
            None, times, time_window, time_decay, alibi_slopes, relative_bias,
            {"softcap": softcap, "global_prefix": global_prefix, "dropout_p": dropout_p},
        )  # fmt: skip
        more = packed_features(words, query, key.shape[0], cu_seqlens_q, cu_seqlens_k, max_seqlen_q)
        call = call._replace(**more)
    return call
