"""Backward attention by query tiles: dQ, and the delta that the kernel over keys reads."""

import triton
import triton.language as tl

from .score import (
    drop_unseen,
    exponential,
    first_masked_key,
    key_bias,
    load_rows,
    mask_scores,
    pair_bias,
    score_units,
    sequence_ptr,
    store_rows,
)
from .tiles import query_tile, visited_keys


@triton.jit
def _accumulate_dq(
    dq, q, do, lse, delta, k_ptr, v_ptr, mask_ptr, stride_kn, stride_vn, stride_mm, stride_mn,
    begin, end, key_lo, key_hi, first_query, num_q, interval, qk_scale,
    MASKED: tl.constexpr, MASK: tl.constexpr, IS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq += ds k over the key tiles of [begin, end); a query that sees nothing has lse = inf."""
    offs_m = first_query + tl.arange(0, BLOCK_M)
    if begin < end:  # see _accumulate_dkdv
        for n in tl.range(begin, end, BLOCK_N):
            keep = None
            bias = None
            if MASKED:
                offs_n = n + tl.arange(0, BLOCK_N)
                inside = (offs_n >= key_lo) & (offs_n < key_hi)
                if MASK == "keys":
                    column = key_bias(mask_ptr, offs_n, stride_mn, inside, IS_BIAS, EXACT)
                    inside = column != float("-inf")
                    if IS_BIAS:
                        bias = column[None, :]
                keep = inside
            k = load_rows(k_ptr, n, stride_kn, keep, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)
            v = load_rows(v_ptr, n, stride_vn, keep, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            if MASKED:
                s, values = mask_scores(
                    s, offs_m[:, None], offs_n[None, :], inside[None, :], num_q, interval,
                    mask_ptr, stride_mm, stride_mn, MASK, IS_BIAS,
                )  # fmt: skip
                if MASK == "pairs" and IS_BIAS:
                    bias = pair_bias(values, EXACT)
            ds = exponential(s, qk_scale, bias, lse[:, None], EXACT) * (dp - delta[:, None])
            if MASKED and MASK == "pairs":
                ds = tl.where(s == float("-inf"), 0.0, ds)
                k = drop_unseen(k, s)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(
    do_not_specialize=[
        "num_tiles", "num_heads", "num_seqs", "seqlen_q", "seqlen_k", "window_left", "window_right",
    ]
)  # fmt: skip
def dq_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, o_ptr, do_ptr, lse_ptr, dlse_ptr, shift_ptr, delta_ptr, dq_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_ob, stride_oh, stride_on, stride_dob, stride_doh, stride_don,
    num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k, window_left, window_right, qk_scale, scale,
    GROUP: tl.constexpr, IS_PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    MASK: tl.constexpr, IS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq = scale ds k; and for the kernel over keys, delta = rowsum(do * o) - dlse and shift, the
    lse in the units of the scores, inf where a query sees nothing. dq is laid out as o.
    """
    batch, head, first_query, q_start, k_start, rows, num_q, kv_begin, kv_end = query_tile(
        tl.program_id(0), num_tiles, num_heads,
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr,
        num_seqs, seqlen_q, seqlen_k, IS_PACKED, window_right is not None, BLOCK_M,
    )  # fmt: skip
    if first_query >= rows:
        return

    kv_head = head // GROUP
    q_ptr = sequence_ptr(q_ptr, batch, head, q_start, stride_qb, stride_qh, stride_qn, ALIGN)
    k_ptr = sequence_ptr(k_ptr, batch, kv_head, k_start, stride_kb, stride_kh, stride_kn, ALIGN)
    v_ptr = sequence_ptr(v_ptr, batch, kv_head, k_start, stride_vb, stride_vh, stride_vn, ALIGN)
    o_ptr = sequence_ptr(o_ptr, batch, head, q_start, stride_ob, stride_oh, stride_on, ALIGN)
    dq_ptr = sequence_ptr(dq_ptr, batch, head, q_start, stride_ob, stride_oh, stride_on, ALIGN)
    do_ptr = sequence_ptr(do_ptr, batch, head, q_start, stride_dob, stride_doh, stride_don, ALIGN)
    row = (tl.cast(batch, tl.int64) * num_heads + head) * seqlen_q + q_start
    if MASK is not None:
        mask_ptr = sequence_ptr(mask_ptr, batch, head, 0, stride_mb, stride_mh, 0, 1)

    offs_m = first_query + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + row + offs_m, mask=offs_m < num_q, other=float("-inf"))
    sees = lse != float("-inf")
    do = load_rows(do_ptr, first_query, stride_don, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)
    o = load_rows(o_ptr, first_query, stride_on, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)
    lse = tl.where(sees, score_units(lse, EXACT), float("inf"))  # e^(s - inf) = 0
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row + offs_m, mask=sees, other=0.0)
    tl.store(shift_ptr + row + offs_m, lse, mask=offs_m < rows)
    tl.store(delta_ptr + row + offs_m, delta, mask=offs_m < rows)
    q = load_rows(q_ptr, first_query, stride_qn, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)

    interval = (
        (kv_end - num_q) if BOTTOM_RIGHT else 0, kv_begin, kv_end, window_left, window_right
    )  # fmt: skip
    begin, full_begin, full_end, end, key_lo, key_hi = visited_keys(
        first_query, num_q, interval, BLOCK_M, BLOCK_N
    )
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if MASK != "pairs":
        if window_left is not None:
            dq = _accumulate_dq(
                dq, q, do, lse, delta, k_ptr, v_ptr, mask_ptr,
                stride_kn, stride_vn, stride_mm, stride_mn,
                begin, full_begin, key_lo, key_hi, first_query, num_q, interval, qk_scale,
                True, MASK, IS_BIAS, EXACT, ALIGN, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        if MASK == "keys":
            masked = first_masked_key(mask_ptr, stride_mn, full_begin, full_end, IS_BIAS)
            full_end = full_begin + (masked - full_begin) // BLOCK_N * BLOCK_N
        dq = _accumulate_dq(
            dq, q, do, lse, delta, k_ptr, v_ptr, mask_ptr,
            stride_kn, stride_vn, stride_mm, stride_mn,
            full_begin, full_end, key_lo, key_hi, first_query, num_q, interval, qk_scale,
            False, MASK, IS_BIAS, EXACT, ALIGN, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        begin = full_end
    dq = _accumulate_dq(
        dq, q, do, lse, delta, k_ptr, v_ptr, mask_ptr,
        stride_kn, stride_vn, stride_mm, stride_mn,
        begin, end, key_lo, key_hi, first_query, num_q, interval, qk_scale,
        True, MASK, IS_BIAS, EXACT, ALIGN, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    store_rows(
        dq_ptr, first_query, stride_on, dq * scale, offs_m < rows,
        ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip
