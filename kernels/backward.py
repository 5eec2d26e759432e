"""Backward attention: dQ (and delta) by query tiles, then dK and dV by key tiles. No atomics."""

import torch
import triton
import triton.language as tl

from .configs import tile_config
from .launch import Problem
from .score import (
    base2_bias,
    drop_unseen,
    edge_keys,
    first_masked_key,
    key_bias,
    load_rows,
    probabilities,
    sequence_ptr,
    shown,
    store_rows,
)
from .tiles import key_tile, query_tile, visible, visited_keys, visiting_queries


@triton.jit
def _accumulate_dq(
    dq, q, do, shift, delta, k_ptr, v_ptr, mask_ptr, stride_kn, stride_vn, stride_mm, stride_mn,
    begin, end, key_lo, key_hi, first_query, num_q, interval, qk_scale,
    MASKED: tl.constexpr, MASK: tl.constexpr, IS_BIAS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq += ds k over the key tiles of [begin, end); shift [BLOCK_M] is the base-2 lse."""
    for n in tl.range(begin, end, BLOCK_N):
        keep = None
        bias = None
        if MASKED:
            keep, seen, values = edge_keys(
                n, key_lo, key_hi, first_query, num_q, interval, mask_ptr, stride_mm, stride_mn,
                MASK, IS_BIAS, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            if IS_BIAS:
                bias = base2_bias(values)
        k = load_rows(k_ptr, n, stride_kn, keep, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)
        v = load_rows(v_ptr, n, stride_vn, keep, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)
        if MASKED and MASK == "pairs":
            k = drop_unseen(k, seen)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = probabilities(s, qk_scale, bias, shift[:, None]) * (dp - delta[:, None])
        if MASKED:
            ds = tl.where(seen, ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(
    do_not_specialize=[
        "num_tiles", "num_heads", "num_seqs", "seqlen_q", "seqlen_k", "window_left", "window_right",
    ]
)  # fmt: skip
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, o_ptr, do_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_ob, stride_oh, stride_on, stride_dob, stride_doh, stride_don,
    num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k, window_left, window_right, qk_scale, scale,
    GROUP: tl.constexpr, IS_PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    MASK: tl.constexpr, IS_BIAS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq = scale ds k, and delta = rowsum(do * o) - dlse for the kernel over keys. dq is laid out
    as o.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
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
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row + offs_m, mask=sees, other=0.0)
    tl.store(delta_ptr + row + offs_m, delta, mask=offs_m < rows)
    shift = tl.where(sees, lse * LOG2E, 0.0)

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
                dq, q, do, shift, delta, k_ptr, v_ptr, mask_ptr,
                stride_kn, stride_vn, stride_mm, stride_mn,
                begin, full_begin, key_lo, key_hi, first_query, num_q, interval, qk_scale,
                True, MASK, IS_BIAS, ALIGN, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        if MASK == "keys":
            masked = first_masked_key(mask_ptr, stride_mn, full_begin, full_end, IS_BIAS)
            full_end = full_begin + (masked - full_begin) // BLOCK_N * BLOCK_N
        dq = _accumulate_dq(
            dq, q, do, shift, delta, k_ptr, v_ptr, mask_ptr,
            stride_kn, stride_vn, stride_mm, stride_mn,
            full_begin, full_end, key_lo, key_hi, first_query, num_q, interval, qk_scale,
            False, MASK, IS_BIAS, ALIGN, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        begin = full_end
    dq = _accumulate_dq(
        dq, q, do, shift, delta, k_ptr, v_ptr, mask_ptr,
        stride_kn, stride_vn, stride_mm, stride_mn,
        begin, end, key_lo, key_hi, first_query, num_q, interval, qk_scale,
        True, MASK, IS_BIAS, ALIGN, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    store_rows(
        dq_ptr, first_query, stride_on, dq * scale, offs_m < rows,
        ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _accumulate_dkdv(
    dk, dv, k, v, bias, q_ptr, do_ptr, lse_ptr, delta_ptr, mask_ptr,
    stride_qn, stride_don, stride_mm, stride_mn,
    begin, end, first_key, num_q, interval, qk_scale,
    MASKED: tl.constexpr, MASK: tl.constexpr, IS_BIAS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dv += p^T do and dk += ds^T q over the query tiles of [begin, end).

    Scores are computed transposed, s^T = k q^T: a product transposed in registers and fed to
    another product is miscompiled for Hopper by Triton 3.4 to 3.7.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    for m in tl.range(begin, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        sees = None
        if MASKED:
            sees = (offs_m >= 0) & (offs_m < num_q)
            lse = tl.load(lse_ptr + offs_m, mask=sees, other=float("-inf"))
            sees = lse != float("-inf")
            delta = tl.load(delta_ptr + offs_m, mask=sees, other=0.0)
            offs_n = first_key + tl.arange(0, BLOCK_N)
            seen = sees[None, :] & visible(offs_m[None, :], offs_n[:, None], interval)
            if MASK == "pairs":
                rows = offs_m.to(tl.int64)[None, :] * stride_mm
                cols = offs_n.to(tl.int64)[:, None] * stride_mn
                values = tl.load(mask_ptr + rows + cols, mask=seen, other=0)
                seen = seen & shown(values, IS_BIAS)
                if IS_BIAS:
                    bias = base2_bias(values)
        else:
            lse = tl.load(lse_ptr + offs_m)
            delta = tl.load(delta_ptr + offs_m)
        q = load_rows(q_ptr, m, stride_qn, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)
        s_t = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p_t = probabilities(s_t, qk_scale, bias, (lse * LOG2E)[None, :])
        if MASKED:
            p_t = tl.where(seen, p_t, 0.0)
        do = load_rows(do_ptr, m, stride_don, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)
        dv = tl.dot(p_t.to(do.dtype), do, dv, input_precision=PRECISION)
        dp_t = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds_t = p_t * (dp_t - delta[None, :])
        if MASKED:
            ds_t = tl.where(seen, ds_t, 0.0)
        dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(
    do_not_specialize=[
        "num_tiles", "num_heads", "num_seqs", "seqlen_q", "seqlen_k", "window_left", "window_right",
    ]
)  # fmt: skip
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_dob, stride_doh, stride_don, stride_dkb, stride_dkh, stride_dkn,
    num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k, window_left, window_right, qk_scale, scale,
    GROUP: tl.constexpr, IS_PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    ANCHORED: tl.constexpr,
    MASK: tl.constexpr, IS_BIAS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
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

    k_ptr = sequence_ptr(k_ptr, batch, kv_head, k_start, stride_kb, stride_kh, stride_kn, ALIGN)
    v_ptr = sequence_ptr(v_ptr, batch, kv_head, k_start, stride_vb, stride_vh, stride_vn, ALIGN)
    dk_ptr = sequence_ptr(
        dk_ptr, batch, kv_head, k_start, stride_dkb, stride_dkh, stride_dkn, ALIGN
    )
    dv_ptr = sequence_ptr(
        dv_ptr, batch, kv_head, k_start, stride_dkb, stride_dkh, stride_dkn, ALIGN
    )
    interval = (
        (kv_end - num_q) if BOTTOM_RIGHT else 0, kv_begin, kv_end, window_left, window_right
    )  # fmt: skip
    begin, full_begin, full_end, end = visiting_queries(
        first_key, num_q, interval, ANCHORED, BLOCK_M, BLOCK_N
    )
    offs_n = first_key + tl.arange(0, BLOCK_N)
    keep = (offs_n >= kv_begin) & (offs_n < kv_end)
    if MASK == "keys":
        # read the keys that some head of the group sees
        inside = keep
        keep = offs_n < first_key
        for g in tl.range(0, GROUP):
            column = key_bias(
                mask_ptr, batch, kv_head * GROUP + g, offs_n, inside,
                stride_mb, stride_mh, stride_mn, IS_BIAS,
            )  # fmt: skip
            keep = keep | (column != float("-inf"))
    k = load_rows(k_ptr, first_key, stride_kn, keep, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)
    v = load_rows(v_ptr, first_key, stride_vn, keep, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for g in tl.range(0, GROUP):
        head = kv_head * GROUP + g
        q_head = sequence_ptr(q_ptr, batch, head, q_start, stride_qb, stride_qh, stride_qn, ALIGN)
        do_head = sequence_ptr(
            do_ptr, batch, head, q_start, stride_dob, stride_doh, stride_don, ALIGN
        )
        row = (tl.cast(batch, tl.int64) * num_heads * GROUP + head) * seqlen_q + q_start
        mask_head = mask_ptr
        bias = None
        stop = end
        if MASK == "keys":
            column = key_bias(
                mask_ptr, batch, head, offs_n, keep, stride_mb, stride_mh, stride_mn, IS_BIAS
            )
            bias = column[:, None]
            # a full tile has no query without a visible key, if the mask leaves it one key
            stop = tl.where(tl.max(column, 0) != float("-inf"), end, begin)
        if MASK == "pairs":
            mask_head = sequence_ptr(mask_ptr, batch, head, 0, stride_mb, stride_mh, 0, 1)
            full_begin = end
            full_end = end
        if MASK == "pairs" or window_right is not None or ANCHORED:
            dk, dv = _accumulate_dkdv(
                dk, dv, k, v, bias, q_head, do_head, lse_ptr + row, delta_ptr + row, mask_head,
                stride_qn, stride_don, stride_mm, stride_mn,
                begin, tl.minimum(full_begin, stop), first_key, num_q, interval, qk_scale,
                True, MASK, IS_BIAS, ALIGN, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        if MASK != "pairs":
            dk, dv = _accumulate_dkdv(
                dk, dv, k, v, bias, q_head, do_head, lse_ptr + row, delta_ptr + row, mask_head,
                stride_qn, stride_don, stride_mm, stride_mn,
                full_begin, tl.minimum(full_end, stop), first_key, num_q, interval, qk_scale,
                False, MASK, IS_BIAS, ALIGN, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            dk, dv = _accumulate_dkdv(
                dk, dv, k, v, bias, q_head, do_head, lse_ptr + row, delta_ptr + row, mask_head,
                stride_qn, stride_don, stride_mm, stride_mn,
                full_end, stop, first_key, num_q, interval, qk_scale,
                True, MASK, IS_BIAS, ALIGN, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
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
    delta = problem.empty_lse()
    gradient = dict(
        do_ptr=do,
        lse_ptr=lse,
        delta_ptr=delta,
        scale=scale,
        **problem.stride_arguments("do", do),
    )
    if dq.numel() > 0:
        config = tile_config("dq", problem.capability, problem.head_dim, q.dtype)
        num_tiles = problem.num_tiles(problem.seqlen_q, config.block_m)
        with problem.on_device():
            _dq_kernel[(num_tiles * problem.num_heads * problem.batch,)](
                o_ptr=o,
                dq_ptr=dq,
                dlse_ptr=None if dlse is None else dlse.contiguous(),
                num_tiles=num_tiles,
                num_heads=problem.num_heads,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                **gradient,
                **problem.stride_arguments("o", o),
                **problem.arguments,
            )
    if dk.numel() > 0:
        config = tile_config("dkdv", problem.capability, problem.head_dim, q.dtype)
        num_tiles = problem.num_tiles(problem.seqlen_k, config.block_n)
        if kv_start is not None:
            num_tiles += 1  # tiles start at kv_start, and one more covers what lies before it
        with problem.on_device():
            _dkdv_kernel[(num_tiles * problem.num_kv_heads * problem.batch,)](
                dk_ptr=dk,
                dv_ptr=dv,
                num_tiles=num_tiles,
                num_heads=problem.num_kv_heads,
                ANCHORED=problem.anchored,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                **gradient,
                **problem.stride_arguments("dk", dk),
                **problem.arguments,
            )
    return dq.neg_() if negative else dq, dk, dv
