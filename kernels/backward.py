"""Backward attention: dQ (and delta) by query tiles, then dK and dV by key tiles. No atomics."""

import torch
import triton
import triton.language as tl

from .configs import tile_config
from .launch import Problem
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
from .tiles import (
    key_interval,
    key_tile,
    query_tile,
    seen_keys,
    visited_keys,
    visiting_queries,
)


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
def _dq_kernel(
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
    q = load_rows(q_ptr, first_query, stride_qn, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)
    do = load_rows(do_ptr, first_query, stride_don, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)
    o = load_rows(o_ptr, first_query, stride_on, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)
    lse = tl.where(sees, score_units(lse, EXACT), float("inf"))  # e^(s - inf) = 0
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row + offs_m, mask=sees, other=0.0)
    tl.store(shift_ptr + row + offs_m, lse, mask=offs_m < rows)
    tl.store(delta_ptr + row + offs_m, delta, mask=offs_m < rows)

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


@triton.jit
def _accumulate_dkdv(
    dk, dv, k, v, column_bias, q_ptr, do_ptr, shift_ptr, delta_ptr, mask_ptr,
    stride_qh, stride_qn, stride_doh, stride_don, stride_mh, stride_mm, stride_mn,
    begin, end, offs_n, keep, num_q, seqlen_q, interval, qk_scale,
    MASKED: tl.constexpr, IS_WINDOWED: tl.constexpr, GROUP: tl.constexpr,
    MASK: tl.constexpr, IS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dv += p^T do and dk += ds^T q over the query tiles of [begin, end) in each head of the group.

    Scores are computed transposed, s^T = k q^T: a product transposed in registers and fed to
    another product is miscompiled for Hopper by Triton 3.4 to 3.7.
    """
    tiles = tl.cdiv(end - begin, BLOCK_M)
    if tiles > 0:
        # Under this condition the loop runs, and its products stay in flight until it ends. A path
        # around the loop that also defined dk and dv would make ptxas wait for each one on Hopper.
        for t in tl.range(0, tiles * GROUP):
            head = 0
            m = begin + t * BLOCK_M
            if GROUP > 1:
                head = t // tiles
                m = begin + (t - head * tiles) * BLOCK_M
            row = tl.cast(head, tl.int64) * seqlen_q
            offs_m = m + tl.arange(0, BLOCK_M)
            sees = None
            bias = column_bias
            if MASKED:
                sees = (offs_m >= 0) & (offs_m < num_q)
                if IS_WINDOWED:
                    lo, hi = key_interval(offs_m, interval)
                    sees = sees & (lo < hi)
                shift = tl.load(shift_ptr + row + offs_m, mask=sees, other=float("inf"))
                delta = tl.load(delta_ptr + row + offs_m, mask=sees, other=0.0)
                if MASK is not None:
                    sees = shift != float("inf")
            else:
                shift = tl.load(shift_ptr + row + offs_m)
                delta = tl.load(delta_ptr + row + offs_m)
            q_head = sequence_ptr(q_ptr, 0, head, 0, 0, stride_qh, 0, ALIGN)
            q = load_rows(q_head, m, stride_qn, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)
            s_t = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            if MASKED and (MASK == "pairs" or IS_WINDOWED):
                mask_head = mask_ptr
                if MASK == "pairs":
                    mask_head = sequence_ptr(mask_ptr, 0, head, 0, 0, stride_mh, 0, 1)
                s_t, values = mask_scores(
                    s_t, offs_m[None, :], offs_n[:, None], keep[:, None], num_q, interval,
                    mask_head, stride_mm, stride_mn, MASK, IS_BIAS,
                )  # fmt: skip
                if MASK == "pairs" and IS_BIAS:
                    bias = pair_bias(values, EXACT)
            p_t = exponential(s_t, qk_scale, bias, shift[None, :], EXACT)
            do_head = sequence_ptr(do_ptr, 0, head, 0, 0, stride_doh, 0, ALIGN)
            do = load_rows(do_head, m, stride_don, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)
            dv = tl.dot(p_t.to(do.dtype), do, dv, input_precision=PRECISION)
            dp_t = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            ds_t = p_t * (dp_t - delta[None, :])
            if MASKED and MASK == "pairs":
                ds_t = tl.where(s_t == float("-inf"), 0.0, ds_t)
            dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(
    do_not_specialize=[
        "num_tiles", "num_heads", "num_seqs", "seqlen_q", "seqlen_k", "window_left", "window_right",
    ]
)  # fmt: skip
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, do_ptr, shift_ptr, delta_ptr, dk_ptr, dv_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_dob, stride_doh, stride_don, stride_dkb, stride_dkh, stride_dkn,
    num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k, window_left, window_right, qk_scale, scale,
    GROUP: tl.constexpr, IS_PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    ANCHORED: tl.constexpr,
    MASK: tl.constexpr, IS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk = scale ds^T q and dv = p^T do, summed over the GROUP query heads of a key head. num_heads
    counts key heads; dk and dv are laid out alike.
    """
    batch, kv_head, first_key, q_start, k_start, rows, num_q, kv_begin, kv_end = key_tile(
        tl.program_id(0), num_tiles, num_heads,
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr,
        num_seqs, seqlen_q, seqlen_k, IS_PACKED, BLOCK_N,
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
    shift_ptr += row
    delta_ptr += row
    if MASK is not None:
        mask_ptr = sequence_ptr(mask_ptr, batch, head, 0, stride_mb, stride_mh, 0, 1)

    IS_WINDOWED: tl.constexpr = window_left is not None or window_right is not None
    interval = (
        (kv_end - num_q) if BOTTOM_RIGHT else 0, kv_begin, kv_end, window_left, window_right
    )  # fmt: skip
    begin, full_begin, full_end, end = visiting_queries(
        first_key, num_q, interval, ANCHORED, BLOCK_M, BLOCK_N
    )
    offs_n = first_key + tl.arange(0, BLOCK_N)
    seen_lo, seen_hi = seen_keys(num_q, interval)
    keep = (offs_n >= seen_lo) & (offs_n < seen_hi)
    bias = None
    if MASK == "keys":
        column = key_bias(mask_ptr, offs_n, stride_mn, keep, IS_BIAS, EXACT)
        keep = column != float("-inf")
        if IS_BIAS:
            bias = tl.where(keep, column, 0.0)[:, None]
        # In a full tile every query sees a key, unless the mask hides all of them.
        end = tl.where(tl.max(column, 0) != float("-inf"), end, begin)
        full_begin = tl.minimum(full_begin, end)
        full_end = tl.minimum(full_end, end)
    k = load_rows(k_ptr, first_key, stride_kn, keep, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)
    v = load_rows(v_ptr, first_key, stride_vn, keep, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # Half tiles at the edges: fewer hidden pairs, and registers for the masks. Which tiles are
    # edges depends on the sequence alone, and so do the order of the sums and the bits.
    EDGE_M: tl.constexpr = BLOCK_M // 2 if BLOCK_M > 16 else BLOCK_M
    if MASK != "pairs":
        if window_right is not None or ANCHORED:
            dk, dv = _accumulate_dkdv(
                dk, dv, k, v, bias, q_ptr, do_ptr, shift_ptr, delta_ptr, mask_ptr,
                stride_qh, stride_qn, stride_doh, stride_don, stride_mh, stride_mm, stride_mn,
                begin, full_begin, offs_n, keep, num_q, seqlen_q, interval, qk_scale,
                True, IS_WINDOWED, GROUP, MASK, IS_BIAS, EXACT, ALIGN, PRECISION,
                HEAD_DIM, EDGE_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        dk, dv = _accumulate_dkdv(
            dk, dv, k, v, bias, q_ptr, do_ptr, shift_ptr, delta_ptr, mask_ptr,
            stride_qh, stride_qn, stride_doh, stride_don, stride_mh, stride_mm, stride_mn,
            full_begin, full_end, offs_n, keep, num_q, seqlen_q, interval, qk_scale,
            False, IS_WINDOWED, GROUP, MASK, IS_BIAS, EXACT, ALIGN, PRECISION,
            HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        begin = full_end
    dk, dv = _accumulate_dkdv(
        dk, dv, k, v, bias, q_ptr, do_ptr, shift_ptr, delta_ptr, mask_ptr,
        stride_qh, stride_qn, stride_doh, stride_don, stride_mh, stride_mm, stride_mn,
        begin, end, offs_n, keep, num_q, seqlen_q, interval, qk_scale,
        True, IS_WINDOWED, GROUP, MASK, IS_BIAS, EXACT, ALIGN, PRECISION,
        HEAD_DIM, EDGE_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    # A key that is not kept was read as 0, which does not make its p 0.
    dk = tl.where(keep[:, None], dk * scale, 0.0)
    dv = tl.where(keep[:, None], dv, 0.0)
    inside = (offs_n >= 0) & (offs_n < rows)
    store_rows(dk_ptr, first_key, stride_dkn, dk, inside, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_rows(dv_ptr, first_key, stride_dkn, dv, inside, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)


def attention_backward(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    q_lengths: torch.Tensor | None,
    kv_start: torch.Tensor | None,
    kv_end: torch.Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of attention_forward with respect to q, k and v, contiguous, in their types.

    do and dlse are the gradients of its outputs o and lse; dlse can be None.
    """
    negative = scale < 0
    if negative:
        q, scale = -q, -scale
    if do.stride(-1) != 1:
        do = do.contiguous()
    o, lse = o.contiguous(), lse.contiguous()
    problem = Problem(
        q, k, v, mask, cu_seqlens_q, cu_seqlens_k, q_lengths, kv_start, kv_end,
        scale, window_left, window_right, bottom_right, others=(do,),
    )  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    shift, delta = problem.empty_lse(), problem.empty_lse()
    gradient = dict(
        do_ptr=do,
        shift_ptr=shift,
        delta_ptr=delta,
        scale=scale,
        **problem.stride_arguments("do", do),
    )
    if dq.numel() > 0:
        config = tile_config("dq", *problem.config_key)
        num_tiles = problem.num_tiles(problem.seqlen_q, config.block_m)
        problem.launch(
            _dq_kernel,
            config,
            num_tiles,
            problem.num_heads,
            o_ptr=o,
            lse_ptr=lse,
            dq_ptr=dq,
            dlse_ptr=None if dlse is None else dlse.contiguous(),
            **gradient,
            **problem.stride_arguments("o", o),
        )
    if dk.numel() > 0:
        config = tile_config("dkdv", *problem.config_key)
        num_tiles = problem.num_tiles(problem.seqlen_k, config.block_n)
        if kv_start is not None:
            num_tiles += 1  # tiles start at kv_start, and one more covers what lies before it
        problem.launch(
            _dkdv_kernel,
            config,
            num_tiles,
            problem.num_kv_heads,
            dk_ptr=dk,
            dv_ptr=dv,
            ANCHORED=problem.anchored,
            **gradient,
            **problem.stride_arguments("dk", dk),
        )
    return dq.neg_() if negative else dq, dk, dv
