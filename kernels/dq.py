"""Backward attention by query tiles: dQ, and the delta that the kernel over keys reads."""

import triton
import triton.language as tl

from .launch import NOT_SPECIALIZED
from .score import (
    NARROW,
    accumulate,
    drop_unseen,
    exponential,
    first_masked_key,
    has_large_scores,
    key_bias,
    load_low,
    load_rows,
    mask_scores,
    pair_bias,
    score_units,
    sequence_ptr,
    store_rows,
)
from .terms import (
    dropped,
    kept_pairs,
    position_distance,
    softcapped,
    time_distance,
    with_terms,
)
from .tiles import (
    edge_block,
    first_tile,
    prefix_keys_end,
    query_tile,
    rows_before,
    visited_keys,
)


@triton.jit
def _accumulate_dq(
    dq, dslope, ddecay, q, do, lse, low, delta, k_ptr, v_ptr, mask_ptr,
    stride_kn, stride_vn, stride_mm, stride_mn,
    begin, end, key_lo, key_hi, first_query, num_q, interval, terms, dropout, qk_scale, cap_scale,
    LARGE_ROWS: tl.constexpr, UNGUARDED: tl.constexpr, DSLOPE: tl.constexpr, DDECAY: tl.constexpr,
    MASKED: tl.constexpr, MASK: tl.constexpr, IS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    NATURAL: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq += ds k over the key tiles of [begin, end); a query that sees nothing has lse = inf.
    LARGE_ROWS: where this is for rows of large scores alone, and rarely has anything to do.

    dslope and ddecay: by query, the sums of ds times the distance in positions and in time.
    """
    offs_m = first_query + tl.arange(0, BLOCK_M)
    column_low = None
    if NATURAL:
        column_low = low[:, None]
    runs = begin < end
    if UNGUARDED:
        runs = True
    if runs:  # see _accumulate_dkdv
        for n in tl.range(begin, end, BLOCK_N, num_stages=1 if LARGE_ROWS else None):
            keep = None
            bias = None
            offs_n = n + tl.arange(0, BLOCK_N)
            if MASKED:
                inside = (offs_n >= key_lo) & (offs_n < key_hi)
                if MASK == "keys":
                    column = key_bias(mask_ptr, offs_n, stride_mn, inside, IS_BIAS, NATURAL)
                    inside = column != float("-inf")
                    if IS_BIAS:
                        bias = column[None, :]
                keep = inside
            k = load_rows(k_ptr, n, stride_kn, keep, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)
            v = load_rows(v_ptr, n, stride_vn, keep, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            if cap_scale is not None:
                s = softcapped(s, cap_scale)
                gain = 1.0 - s * s
            if MASKED:
                s, values = mask_scores(
                    s, offs_m[:, None], offs_n[None, :], inside[None, :], num_q, interval,
                    mask_ptr, stride_mm, stride_mn, MASK, IS_BIAS,
                )  # fmt: skip
                if MASK == "pairs" and IS_BIAS:
                    bias = pair_bias(values, NATURAL)
            if terms[2] is not None or terms[4] is not None or terms[6] is not None:
                bias = with_terms(bias, offs_m[:, None], offs_n[None, :], terms, interval, NATURAL)
            if dropout[0] is not None:
                dp = dropped(dp, kept_pairs(first_query, n, dropout, BLOCK_M, BLOCK_N), dropout)
            p = exponential(s, qk_scale, bias, lse[:, None], column_low, NATURAL)
            ds = p * (dp - delta[:, None])
            if MASKED and MASK == "pairs":
                ds = tl.where(s == float("-inf"), 0.0, ds)
                k = drop_unseen(k, s)
            if DSLOPE:
                distance = position_distance(offs_m[:, None], offs_n[None, :], interval)
                dslope += tl.sum(ds * distance, 1)
            if DDECAY:
                distance = time_distance(offs_m[:, None], offs_n[None, :], terms, interval)
                ddecay += tl.sum(ds * distance, 1)
            if cap_scale is not None:
                ds *= gain
            dq = accumulate(dq, ds.to(k.dtype), k, EXACT, PRECISION)
    return dq, dslope, ddecay


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def dq_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, o_ptr, do_ptr, lse_ptr, lse_low_ptr, dlse_ptr,
    shift_ptr, delta_ptr, dq_ptr, dslope_ptr, ddecay_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr, lo_ptr, hi_ptr,
    times_ptr, decay_ptr, slopes_ptr, relative_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_ob, stride_oh, stride_on, stride_dob, stride_doh, stride_don, stride_slopes,
    num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k, window_left, window_right, qk_scale,
    natural_scale, scale, cap_scale, relative_far, global_prefix, dropout_bits, kept_scale,
    GROUP: tl.constexpr, IS_PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    ANCHORED: tl.constexpr, GUARDED: tl.constexpr,
    MASK: tl.constexpr, IS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    NATURAL: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq = scale ds k; and for the kernel over keys, delta = rowsum(do * o) - dlse and shift, the
    lse in the units of the scores, inf where a query sees nothing or where scores are large, for
    which each kernel has a loop of its own. dq is laid out as o.

    dslope_ptr, ddecay_ptr: None, or where the sums of _accumulate_dq go, laid out as lse.
    """
    (
        batch, sequence, head, first_query, q_start, k_start, rows, num_q, kv_begin, kv_end
    ) = query_tile(
        tl.program_id(0), num_tiles, num_heads,
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr,
        num_seqs, seqlen_q, seqlen_k, IS_PACKED, window_right is not None, BOTTOM_RIGHT, ANCHORED,
        BLOCK_M,
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
    is_query = rows_before(offs_m, num_q, ANCHORED)
    lse = tl.load(lse_ptr + row + offs_m, mask=is_query, other=float("-inf"))
    sees = lse != float("-inf")
    do = load_rows(do_ptr, first_query, stride_don, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)
    o = load_rows(o_ptr, first_query, stride_on, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)
    natural = lse
    lse = tl.where(sees, score_units(lse, NATURAL), float("inf"))  # e^(s - inf) = 0
    if not NATURAL:
        large = has_large_scores(natural)
        lse = tl.where(large, float("inf"), lse)
    low = None
    if NATURAL:
        low = load_low(lse_low_ptr + row, offs_m, is_query)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row + offs_m, mask=sees, other=0.0)
    is_row = rows_before(offs_m, rows, ANCHORED)
    tl.store(shift_ptr + row + offs_m, lse, mask=is_row)
    tl.store(delta_ptr + row + offs_m, delta, mask=is_row)
    q = load_rows(q_ptr, first_query, stride_qn, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)

    first_row = tl.cast(batch, tl.int64) * seqlen_q + q_start
    interval = (
        (kv_end - num_q) if BOTTOM_RIGHT else 0, kv_begin, kv_end, window_left, window_right,
        lo_ptr, hi_ptr, first_row, num_q, global_prefix,
        16 if seed_ptr is not None and kv_start_ptr is not None else None,
    )  # fmt: skip
    terms = (
        sequence, head, relative_ptr, relative_far, slopes_ptr, stride_slopes, decay_ptr, times_ptr
    )  # fmt: skip
    dropout = (seed_ptr, sequence, head, dropout_bits, kept_scale)
    begin, full_begin, full_end, end, key_lo, key_hi = visited_keys(
        first_query, num_q, interval, BLOCK_M, BLOCK_N
    )
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dslope = tl.zeros([BLOCK_M], tl.float32)
    ddecay = tl.zeros([BLOCK_M], tl.float32)
    EDGE_N: tl.constexpr = edge_block(BLOCK_N, MASK)
    STARTS_MASKED: tl.constexpr = (
        window_left is not None or lo_ptr is not None or interval[10] is not None
    )
    FULL_FIRST: tl.constexpr = (
        (NATURAL or GUARDED) and not EXACT and not STARTS_MASKED and global_prefix is None
    )
    DSLOPE: tl.constexpr = dslope_ptr is not None
    DDECAY: tl.constexpr = ddecay_ptr is not None
    if not NATURAL:
        first = begin
        last = end
        if global_prefix is not None:
            first = first_tile(interval)
            last = tl.maximum(end, prefix_keys_end(first_query, begin, end, interval))
        last = tl.where(tl.max(large.to(tl.int32), 0) != 0, last, first)
        dq, dslope, ddecay = _accumulate_dq(
            dq, dslope, ddecay, q, do, tl.where(large, natural, float("inf")),
            load_low(lse_low_ptr + row, offs_m, large), delta, k_ptr, v_ptr, mask_ptr,
            stride_kn, stride_vn, stride_mm, stride_mn, first, last, key_lo, key_hi,
            first_query, num_q, interval, terms, dropout, natural_scale, cap_scale,
            True, not GUARDED, False, False,
            True, MASK, IS_BIAS, EXACT, True,
            ALIGN, PRECISION, HEAD_DIM, BLOCK_M, NARROW, BLOCK_D,
        )  # fmt: skip
    if global_prefix is not None:
        dq, dslope, ddecay = _accumulate_dq(
            dq, dslope, ddecay, q, do, lse, low, delta, k_ptr, v_ptr, mask_ptr,
            stride_kn, stride_vn, stride_mm, stride_mn,
            first_tile(interval), prefix_keys_end(first_query, begin, end, interval),
            key_lo, key_hi, first_query, num_q, interval, terms, dropout, qk_scale, cap_scale,
            False, False, DSLOPE, DDECAY,
            True, MASK, IS_BIAS, EXACT, NATURAL,
            ALIGN, PRECISION, HEAD_DIM, BLOCK_M, EDGE_N, BLOCK_D,
        )  # fmt: skip
    if MASK != "pairs":
        if STARTS_MASKED:
            dq, dslope, ddecay = _accumulate_dq(
                dq, dslope, ddecay, q, do, lse, low, delta, k_ptr, v_ptr, mask_ptr,
                stride_kn, stride_vn, stride_mm, stride_mn, begin, full_begin, key_lo, key_hi,
                first_query, num_q, interval, terms, dropout, qk_scale, cap_scale,
                False, False, DSLOPE, DDECAY,
                True, MASK, IS_BIAS, EXACT, NATURAL,
                ALIGN, PRECISION, HEAD_DIM, BLOCK_M, EDGE_N, BLOCK_D,
            )  # fmt: skip
        if MASK == "keys":
            masked = first_masked_key(mask_ptr, stride_mn, full_begin, full_end, IS_BIAS)
            full_end = full_begin + (masked - full_begin) // BLOCK_N * BLOCK_N
        dq, dslope, ddecay = _accumulate_dq(
            dq, dslope, ddecay, q, do, lse, low, delta, k_ptr, v_ptr, mask_ptr,
            stride_kn, stride_vn, stride_mm, stride_mn, full_begin, full_end, key_lo, key_hi,
            first_query, num_q, interval, terms, dropout, qk_scale, cap_scale,
            False, FULL_FIRST, DSLOPE, DDECAY,
            False, MASK, IS_BIAS, EXACT, NATURAL,
            ALIGN, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        begin = full_end
    dq, dslope, ddecay = _accumulate_dq(
        dq, dslope, ddecay, q, do, lse, low, delta, k_ptr, v_ptr, mask_ptr,
        stride_kn, stride_vn, stride_mm, stride_mn, begin, end, key_lo, key_hi,
        first_query, num_q, interval, terms, dropout, qk_scale, cap_scale,
        False, False, DSLOPE, DDECAY,
        True, MASK, IS_BIAS, EXACT, NATURAL, ALIGN, PRECISION, HEAD_DIM, BLOCK_M, EDGE_N, BLOCK_D,
    )  # fmt: skip
    store_rows(
        dq_ptr, first_query, stride_on, dq * scale, is_row,
        ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    if DSLOPE:
        tl.store(dslope_ptr + row + offs_m, dslope, mask=is_row)
    if DDECAY:
        tl.store(ddecay_ptr + row + offs_m, ddecay, mask=is_row)
