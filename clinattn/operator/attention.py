"""The public functions: they check their arguments and turn them into those of the ops."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from clinattn.operator import bare, split
from clinattn.operator.assemble import dense_call, packed_call
from clinattn.operator.functions import attend
from clinattn.operator.jagged import is_jagged, jagged_attention
from clinattn.operator.visibility import PreparedMask, Window
from clinattn.operator.words import checks
from clinattn.operator.words.scalars import as_flag


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | PreparedMask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
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
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Exact softmax attention in O(N) memory.

    query: (B, H, Nq, D); key: (B, Hkv, Nk, D); value: (B, Hkv, Nk, Dv), of one device and dtype:
    fp32, bf16, fp16, or on the CPU fp64. Any strides; a last stride of 1 avoids a copy. A D or Dv
    above 256 is served by the reference, with a warning. As in torch, two or more dimensions are
    taken, and those before the last two broadcast; B below is then the product of all but the last
    of these, and arguments per sequence or head need at least four dimensions.
    attn_mask: bool (True = visible) or floating (added to the scores), broadcasts to
    (B, H, Nq, Nk). It is never expanded; a mask that is the same for all queries is read as Nk
    values. Together with is_causal, a key is visible where both allow it. A floating mask may
    require a gradient, which has the shape of the mask (for a view made by expand(), torch
    allocates the expanded size).
    dropout_p: probability to drop a pair after the softmax, rounded to a multiple of 2^-24; the
    other pairs are scaled up.
    Drawn by Philox4x32-7 (Salmon et al., 2011) from (seed, index in the batch, head, query, key),
    the seed from torch's generator of the device: nothing is stored, and the same batch dense,
    padded or packed drops the same pairs. lse is that of the full softmax.
    is_causal: query i sees the keys j <= i, aligned at the top left as in torch.
    scale: factor of the scores; default D ** -0.5.
    enable_gqa: allows H to be a multiple of Hkv; query head h uses kv head h // (H // Hkv).
    window: w or (left, right), each >= 0 or None for no bound: query i sees i - left <= j <=
    i + right, counted in positions of the tensors.
    bottom_right: is_causal, window and alibi_slopes see query i at the position i + nk - nq of the
    keys, as in flash-attn, where nq and nk are the lengths of the sequence.
    kv_lengths, q_lengths: (B,) int32 or int64: tokens beyond them are not read, and queries beyond
    q_lengths return 0. On a GPU values out of range are clamped, on the CPU they are refused.
    segment_ids: (B, N) int32 or int64, Nq = Nk = N, never decreasing along a row: visits, notes or
    documents, each of which sees only itself.
    times: (B, N) fp32, fp64 or int64, Nq = Nk = N, never decreasing, in any unit. Differences are
    formed in fp32 after the time of the row's first valid key was subtracted in the type of times.
    time_window: query i sees the keys with |t_i - t_j| <= time_window, in the unit of times.
    time_decay: (H,); time_decay[h] |t_i - t_j| is subtracted from the scores. Has a gradient.
    alibi_slopes: (H,) or (B, H); alibi_slopes[h] |i - j| is subtracted from the scores (Press et
    al., 2022). Has a gradient.
    relative_bias: (H, 2 L + 1); relative_bias[h, L + min(max(j - i, -L), L)] is added to the
    scores. Has a gradient. t5_relative_bias makes one from T5's table.
    softcap: scores are softcap tanh(s / softcap) before anything is added; None for none.
    global_prefix: all queries see the first global_prefix valid keys, and the first global_prefix
    queries see all valid keys, whatever causal, window, segments and times say; at most Nk.
    backend: "triton", "cuda", "cpu" or "reference"; None chooses (see clinattn.backends()).

    With segment_ids or times, tokens from min(q_lengths, kv_lengths) on are padding in queries and
    keys alike, and may hold any value. The order is checked on the CPU, except in a traced call. On
    a GPU a check would stop the host, so values out of order give results without meaning.

    query, key and value may be jagged nested tensors, (B, H, j, D) and (B, Hkv, k, D or Dv): this
    is attention over their packed tokens. times is (B, j) then, o and lse are jagged like query.
    They take no attn_mask, lengths and segment_ids, as they hold no padding.

    Returns o (B, H, Nq, Dv), and with return_lse also the natural log of the softmax normaliser,
    (B, H, Nq), in fp32 (fp64 for fp64 inputs); both have gradients. A query that sees no key
    returns o = 0 and lse = -inf, and zero gradients. Follows Dao, FlashAttention-2 (2023).
    Raises TypeError or ValueError for wrong or meaningless arguments, NotImplementedError for those
    that the backend asked for does not compute (docs/operator.md has the table; with backend=None
    the reference computes them), RuntimeError where the backend asked for cannot run.
    """
    if split.active is not None:
        return split.active.dense(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal,
            scale=scale, enable_gqa=enable_gqa, window=window, bottom_right=bottom_right,
            kv_lengths=kv_lengths, q_lengths=q_lengths, segment_ids=segment_ids, times=times,
            time_window=time_window, time_decay=time_decay, alibi_slopes=alibi_slopes,
            relative_bias=relative_bias, softcap=softcap, global_prefix=global_prefix,
            return_lse=return_lse, backend=backend,
        )  # fmt: skip
    if (
        attn_mask is window is kv_lengths is q_lengths is segment_ids is times is None
        and time_window is time_decay is alibi_slopes is relative_bias is softcap is backend is None
        and enable_gqa is bottom_right is return_lse is False
        and dropout_p == 0 and global_prefix == 0
    ):  # fmt: skip
        o = bare.attend(query, key, value, is_causal, scale)
        if o is not None:
            return o
    if type(query) is not Tensor and is_jagged(query):
        of_pairs = {
            "attn_mask": attn_mask, "kv_lengths": kv_lengths, "q_lengths": q_lengths,
            "segment_ids": segment_ids,
        }  # fmt: skip
        return jagged_attention(
            fused_attention, fused_attention_varlen, query, key, value, of_pairs,
            dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
            window=window, bottom_right=bottom_right, times=times, time_window=time_window,
            time_decay=time_decay, alibi_slopes=alibi_slopes, relative_bias=relative_bias,
            softcap=softcap, global_prefix=global_prefix, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    call, form = dense_call(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, bottom_right,
        kv_lengths, q_lengths, segment_ids, times, time_window, time_decay, alibi_slopes,
        relative_bias, softcap, global_prefix,
    )  # fmt: skip
    backend, return_lse = checks.check_backend(backend), as_flag("return_lse", return_lse)
    o, lse = attend(call, backend)
    if form is not None:
        o, lse = form.as_given(o, 2), form.as_given(lse, 2)
    return (o, lse) if return_lse else o


def fused_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
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
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Exact softmax attention over sequences packed one after the other, without padding.

    query: (Tq, H, D); key: (Tk, Hkv, D); value: (Tk, Hkv, Dv). cu_seqlens_q: int32 (S + 1,),
    sequence s has the rows [cu_seqlens_q[s], cu_seqlens_q[s + 1]); starts at 0, never decreases,
    ends at most at Tq.
    cu_seqlens_k: the same for the keys; default cu_seqlens_q. Rows past the last end see nothing.
    max_seqlen_q, max_seqlen_k: upper bounds of the lengths. Left out, they are read from
    cu_seqlens, which stops the host until a GPU has them; torch.compile takes the totals Tq and Tk.
    is_causal, window, global_prefix: count positions within a sequence, from its start.
    bottom_right: moves the queries of a sequence to the end of its keys, as in flash-attn.
    times: (T,), with the same cu_seqlens for queries and keys; the first of a sequence is its
    origin.
    alibi_slopes: (H,) or (S, H). The other arguments are those of fused_attention.

    Returns o (Tq, H, Dv), and with return_lse also lse (H, Tq). Raises as fused_attention does.
    """
    if split.active is not None:
        return split.active.packed(
            query, key, value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, dropout_p=dropout_p,
            is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, window=window,
            bottom_right=bottom_right, times=times, time_window=time_window, time_decay=time_decay,
            alibi_slopes=alibi_slopes, relative_bias=relative_bias, softcap=softcap,
            global_prefix=global_prefix, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    call = packed_call(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        is_causal, scale, enable_gqa, window, bottom_right, times, time_window, time_decay,
        alibi_slopes, relative_bias, softcap, global_prefix,
    )  # fmt: skip
    backend, return_lse = checks.check_backend(backend), as_flag("return_lse", return_lse)
    o, lse = attend(call, backend)
    return (o, lse) if return_lse else o
