"""Backward attention by key tiles: dK and dV."""

import triton
import triton.language as tl

from .launch import NOT_SPECIALIZED
from .score import (
    NARROW,
    accumulate,
    any_large_scores,
    exponential,
    has_large_scores,
    key_bias,
    load_low,
    load_rows,
    mask_scores,
    pair_bias,
    sequence_ptr,
    store_rows,
)
from .terms import dropped, kept_pairs, softcapped, with_terms
from .tiles import (
    edge_block,
    key_tile,
    prefix_queries_end,
    seen_keys,
    visiting_queries,
)


@triton.jit
def _accumulate_dkdv(
    dk, dv, k, v, column_bias, q_ptr, do_ptr, shift_ptr, lse_low_ptr, delta_ptr, mask_ptr,
    stride_qh, stride_qn, stride_doh, stride_don, stride_mh, stride_mm, stride_mn,
    begin, end, first_key, keep, num_q, seqlen_q, interval, rich, qk_scale, cap_scale,
    LARGE_ROWS: tl.constexpr, UNGUARDED: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    MASKED: tl.constexpr, IS_BOUNDED: tl.constexpr, GROUP: tl.constexpr,
    MASK: tl.constexpr, IS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    NATURAL: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dv += p^T do and dk += ds^T q over the query tiles of [begin, end) in each head of the group;
    DK and DV say which of the two. rich: the numbers of `terms` and `dropout`, for the first head.
    LARGE_ROWS: over the rows of large scores alone, and shift_ptr is that of their lse.

    Scores are computed transposed, s^T = k q^T: a product transposed in registers and fed to
    another product is miscompiled for Hopper by Triton 3.4 to 3.7.
    """
    tiles = tl.cdiv(end - begin, BLOCK_M)
    (
        sequence, first_head, relative_ptr, relative_far, slopes_ptr, stride_slopes,
        decay_ptr, times_ptr, seed_ptr, dropout_bits, kept_scale,
    ) = rich  # fmt: skip
    offs_n = first_key + tl.arange(0, BLOCK_N)
    runs = tiles > 0
    if UNGUARDED:
        runs = True
    if runs:
        # Under this condition the loop runs, and its products stay in flight until it ends. A path
        # around the loop that also defined dk and dv would make ptxas wait for each one on Hopper.
        # UNGUARDED: in the first loop it is the condition that makes ptxas wait. The first is that
        # over rows of large scores unless scores are NATURAL. Other cards do not wait, and have
        # more registers for the loops after it where it is GUARDED.
        for t in tl.range(0, tiles * GROUP, num_stages=1 if LARGE_ROWS else None):
            head = 0
            m = begin + t * BLOCK_M
            if GROUP > 1:
                head = t // tiles
                m = begin + (t - head * tiles) * BLOCK_M
            row = tl.cast(head, tl.int64) * seqlen_q
            offs_m = m + tl.arange(0, BLOCK_M)
            sees = None
            low = None
            bias = column_bias
            if MASKED:
                sees = (offs_m >= 0) & (offs_m < num_q)
                shift = tl.load(shift_ptr + row + offs_m, mask=sees, other=float("inf"))
                if LARGE_ROWS:
                    shift = tl.where(sees & has_large_scores(shift), shift, float("inf"))
                delta = tl.load(delta_ptr + row + offs_m, mask=sees, other=0.0)
                if NATURAL:
                    low = load_low(lse_low_ptr + row, offs_m, sees)[None, :]
                if MASK is not None or IS_BOUNDED or LARGE_ROWS:
                    sees = shift != float("inf")
            else:
                shift = tl.load(shift_ptr + row + offs_m)
                delta = tl.load(delta_ptr + row + offs_m)
                if NATURAL:
                    low = load_low(lse_low_ptr + row, offs_m, None)[None, :]
            q_head = sequence_ptr(q_ptr, 0, head, 0, 0, stride_qh, 0, ALIGN)
            q = load_rows(q_head, m, stride_qn, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)
            s_t = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            if cap_scale is not None:
                s_t = softcapped(s_t, cap_scale)
                gain = 1.0 - s_t * s_t
            if MASKED and (MASK == "pairs" or IS_BOUNDED):
                mask_head = mask_ptr
                if MASK == "pairs":
                    mask_head = sequence_ptr(mask_ptr, 0, head, 0, 0, stride_mh, 0, 1)
                s_t, values = mask_scores(
                    s_t, offs_m[None, :], offs_n[:, None], keep[:, None], num_q, interval,
                    mask_head, stride_mm, stride_mn, MASK, IS_BIAS,
                )  # fmt: skip
                if MASK == "pairs" and IS_BIAS:
                    bias = pair_bias(values, NATURAL)
            terms = (
                sequence, first_head + head, relative_ptr, relative_far, slopes_ptr, stride_slopes,
                decay_ptr, times_ptr,
            )  # fmt: skip
            if terms[2] is not None or terms[4] is not None or terms[6] is not None:
                bias = with_terms(bias, offs_m[None, :], offs_n[:, None], terms, interval, NATURAL)
            p_t = exponential(s_t, qk_scale, bias, shift[None, :], low, NATURAL)
            do_head = sequence_ptr(do_ptr, 0, head, 0, 0, stride_doh, 0, ALIGN)
            do = load_rows(do_head, m, stride_don, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)
            kept_t = p_t
            if seed_ptr is not None:
                dropout = (seed_ptr, sequence, first_head + head, dropout_bits, kept_scale)
                is_kept = tl.trans(kept_pairs(m, first_key, dropout, BLOCK_M, BLOCK_N))
                kept_t = dropped(p_t, is_kept, dropout)
            if DV:
                dv = accumulate(dv, kept_t.to(do.dtype), do, EXACT, PRECISION)
            if DK:
                dp_t = tl.dot(v, tl.trans(do), input_precision=PRECISION)
                if seed_ptr is not None:
                    dp_t = dropped(dp_t, is_kept, dropout)
                ds_t = p_t * (dp_t - delta[None, :])
                if MASKED and MASK == "pairs":
                    ds_t = tl.where(s_t == float("-inf"), 0.0, ds_t)
                if cap_scale is not None:
                    ds_t *= gain
                dk = accumulate(dk, ds_t.to(q.dtype), q, EXACT, PRECISION)
    return dk, dv


@triton.jit
def _accumulate_over_ranges(
    k, v, column_bias, q_ptr, do_ptr, lse_ptr, shift_ptr, lse_low_ptr, delta_ptr, mask_ptr,
    stride_qh, stride_qn, stride_doh, stride_don, stride_mh, stride_mm, stride_mn,
    origin, begin, full_begin, full_end, end, first_key, keep, num_q, seqlen_q, interval, rich,
    qk_scale, natural_scale, cap_scale,
    GUARDED: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, HAS_PREFIX: tl.constexpr,
    STARTS_MASKED: tl.constexpr, IS_BOUNDED: tl.constexpr, GROUP: tl.constexpr,
    MASK: tl.constexpr, IS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    NATURAL: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(dk, dv) over the queries of [begin, end), those of [full_begin, full_end) without masks, and
    before them over those of a global prefix.
    """
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    EDGE_M: tl.constexpr = edge_block(BLOCK_M, None)
    FULL_FIRST: tl.constexpr = (
        (NATURAL or GUARDED) and not EXACT and not STARTS_MASKED and not HAS_PREFIX
    )
    if not NATURAL:
        first = begin
        last = end
        if HAS_PREFIX:
            first = origin
            last = tl.maximum(end, prefix_queries_end(begin, end, interval))
        last = tl.where(any_large_scores(lse_ptr, first, last, seqlen_q, GROUP), last, first)
        dk, dv = _accumulate_dkdv(
            dk, dv, k, v, column_bias, q_ptr, do_ptr, lse_ptr, lse_low_ptr, delta_ptr, mask_ptr,
            stride_qh, stride_qn, stride_doh, stride_don, stride_mh, stride_mm, stride_mn,
            first, last, first_key, keep, num_q, seqlen_q, interval, rich,
            natural_scale, cap_scale,
            True, not GUARDED, DK, DV, True, IS_BOUNDED, GROUP, MASK, IS_BIAS, EXACT, True,
            ALIGN, PRECISION, HEAD_DIM, NARROW, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if HAS_PREFIX:
        dk, dv = _accumulate_dkdv(
            dk, dv, k, v, column_bias, q_ptr, do_ptr, shift_ptr, lse_low_ptr, delta_ptr, mask_ptr,
            stride_qh, stride_qn, stride_doh, stride_don, stride_mh, stride_mm, stride_mn,
            origin, prefix_queries_end(begin, end, interval), first_key, keep, num_q, seqlen_q,
            interval, rich, qk_scale, cap_scale,
            False, False, DK, DV, True, IS_BOUNDED, GROUP, MASK, IS_BIAS, EXACT, NATURAL,
            ALIGN, PRECISION, HEAD_DIM, EDGE_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if MASK != "pairs":
        if STARTS_MASKED:
            dk, dv = _accumulate_dkdv(
                dk, dv, k, v, column_bias,
                q_ptr, do_ptr, shift_ptr, lse_low_ptr, delta_ptr, mask_ptr,
                stride_qh, stride_qn, stride_doh, stride_don, stride_mh, stride_mm, stride_mn,
                begin, full_begin, first_key, keep, num_q, seqlen_q, interval, rich,
                qk_scale, cap_scale,
                False, False, DK, DV, True, IS_BOUNDED, GROUP, MASK, IS_BIAS, EXACT, NATURAL,
                ALIGN, PRECISION,
                HEAD_DIM, EDGE_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        dk, dv = _accumulate_dkdv(
            dk, dv, k, v, column_bias, q_ptr, do_ptr, shift_ptr, lse_low_ptr, delta_ptr, mask_ptr,
            stride_qh, stride_qn, stride_doh, stride_don, stride_mh, stride_mm, stride_mn,
            full_begin, full_end, first_key, keep, num_q, seqlen_q, interval, rich,
            qk_scale, cap_scale,
            False, FULL_FIRST, DK, DV, False, IS_BOUNDED, GROUP, MASK, IS_BIAS, EXACT, NATURAL,
            ALIGN, PRECISION,
            HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        begin = full_end
    dk, dv = _accumulate_dkdv(
        dk, dv, k, v, column_bias, q_ptr, do_ptr, shift_ptr, lse_low_ptr, delta_ptr, mask_ptr,
        stride_qh, stride_qn, stride_doh, stride_don, stride_mh, stride_mm, stride_mn,
        begin, end, first_key, keep, num_q, seqlen_q, interval, rich, qk_scale, cap_scale,
        False, False, DK, DV, True, IS_BOUNDED, GROUP, MASK, IS_BIAS, EXACT, NATURAL,
        ALIGN, PRECISION, HEAD_DIM, EDGE_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, do_ptr, lse_ptr, shift_ptr, lse_low_ptr, delta_ptr,
    dk_ptr, dv_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr, lo_ptr, hi_ptr,
    times_ptr, decay_ptr, slopes_ptr, relative_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_dob, stride_doh, stride_don, stride_dkb, stride_dkh, stride_dkn, stride_slopes,
    num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k, window_left, window_right, qk_scale,
    natural_scale, scale, cap_scale, relative_far, global_prefix, dropout_bits, kept_scale,
    GROUP: tl.constexpr, IS_PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    ANCHORED: tl.constexpr, GUARDED: tl.constexpr,
    MASK: tl.constexpr, IS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    NATURAL: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk = scale ds^T q and dv = p^T do, summed over the GROUP query heads of a key head. num_heads
    counts key heads; dk and dv are laid out alike.
    """
    (
        batch, sequence, kv_head, first_key, q_start, k_start, rows, num_q, kv_begin, kv_end
    ) = key_tile(
        tl.program_id(0), num_tiles, num_heads,
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr,
        num_seqs, seqlen_q, seqlen_k, IS_PACKED, seed_ptr is not None, BLOCK_N,
    )  # fmt: skip
    if first_key >= rows:
        return

    head = kv_head * GROUP
    q_ptr = sequence_ptr(q_ptr, batch, head, q_start, stride_qb, stride_qh, stride_qn, ALIGN)
    k_ptr = sequence_ptr(k_ptr, batch, kv_head, k_start, stride_kb, stride_kh, stride_kn, ALIGN)
    v_ptr = sequence_ptr(v_ptr, batch, kv_head, k_start, stride_vb, stride_vh, stride_vn, ALIGN)
    do_ptr = sequence_ptr(do_ptr, batch, head, q_start, stride_dob, stride_doh, stride_don, ALIGN)
    dk_ptr = sequence_ptr(
        dk_ptr, batch, kv_head, k_start, stride_dkb, stride_dkh, stride_dkn, ALIGN
    )
    dv_ptr = sequence_ptr(
        dv_ptr, batch, kv_head, k_start, stride_dkb, stride_dkh, stride_dkn, ALIGN
    )
    row = (tl.cast(batch, tl.int64) * num_heads * GROUP + head) * seqlen_q + q_start
    lse_ptr += row
    shift_ptr += row
    lse_low_ptr += row
    delta_ptr += row
    if MASK is not None:
        mask_ptr = sequence_ptr(mask_ptr, batch, head, 0, stride_mb, stride_mh, 0, 1)

    IS_BOUNDED: tl.constexpr = (
        window_left is not None or window_right is not None
        or lo_ptr is not None or global_prefix is not None
    )  # fmt: skip
    first_row = tl.cast(batch, tl.int64) * seqlen_q + q_start
    interval = (
        (kv_end - num_q) if BOTTOM_RIGHT else 0, kv_begin, kv_end, window_left, window_right,
        lo_ptr, hi_ptr, first_row, num_q, global_prefix,
        16 if seed_ptr is not None and kv_start_ptr is not None else None,
    )  # fmt: skip
    rich = (
        sequence, head, relative_ptr, relative_far, slopes_ptr, stride_slopes,
        decay_ptr, times_ptr, seed_ptr, dropout_bits, kept_scale,
    )  # fmt: skip
    origin, begin, full_begin, full_end, end = visiting_queries(
        first_key, num_q, interval, ANCHORED, BLOCK_M, BLOCK_N
    )
    offs_n = first_key + tl.arange(0, BLOCK_N)
    seen_lo, seen_hi = seen_keys(num_q, interval)
    keep = (offs_n >= seen_lo) & (offs_n < seen_hi)
    bias = None
    if MASK == "keys":
        column = key_bias(mask_ptr, offs_n, stride_mn, keep, IS_BIAS, NATURAL)
        keep = column != float("-inf")
        if IS_BIAS:
            bias = tl.where(keep, column, 0.0)[:, None]
        # In a full tile every query sees a key, unless the mask hides all of them.
        end = tl.where(tl.max(column, 0) != float("-inf"), end, begin)
        full_begin = tl.minimum(full_begin, end)
        full_end = tl.minimum(full_end, end)
    k = load_rows(k_ptr, first_key, stride_kn, keep, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)
    v = load_rows(v_ptr, first_key, stride_vn, keep, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)
    HAS_PREFIX: tl.constexpr = global_prefix is not None
    STARTS_MASKED: tl.constexpr = window_right is not None or lo_ptr is not None or ANCHORED
    # With wide heads the registers of a warp group hold one sum of 64 rows and not two: dv first,
    # then the scores once more for dk. Five products instead of four, on tensor cores at full rate.
    AT_ONCE: tl.constexpr = BLOCK_D <= 128 or EXACT
    dk, dv = _accumulate_over_ranges(
        k, v, bias, q_ptr, do_ptr, lse_ptr, shift_ptr, lse_low_ptr, delta_ptr, mask_ptr,
        stride_qh, stride_qn, stride_doh, stride_don, stride_mh, stride_mm, stride_mn,
        origin, begin, full_begin, full_end, end, first_key, keep, num_q, seqlen_q, interval, rich,
        qk_scale, natural_scale, cap_scale,
        GUARDED, AT_ONCE, True, HAS_PREFIX, STARTS_MASKED, IS_BOUNDED, GROUP,
        MASK, IS_BIAS, EXACT, NATURAL, ALIGN, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    inside = (offs_n >= 0) & (offs_n < rows)
    # A key that is not kept was read as 0, which does not make its p 0.
    dv = tl.where(keep[:, None], dv, 0.0)
    store_rows(dv_ptr, first_key, stride_dkn, dv, inside, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)
    if not AT_ONCE:
        dk, _ = _accumulate_over_ranges(
            k, v, bias, q_ptr, do_ptr, lse_ptr, shift_ptr, lse_low_ptr, delta_ptr, mask_ptr,
            stride_qh, stride_qn, stride_doh, stride_don, stride_mh, stride_mm, stride_mn,
            origin, begin, full_begin, full_end, end, first_key, keep, num_q, seqlen_q, interval,
            rich, qk_scale, natural_scale, cap_scale,
            GUARDED, True, False, HAS_PREFIX, STARTS_MASKED, IS_BOUNDED, GROUP,
            MASK, IS_BIAS, EXACT, NATURAL, ALIGN, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    dk = tl.where(keep[:, None], dk * scale, 0.0)
    store_rows(dk_ptr, first_key, stride_dkn, dk, inside, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)
