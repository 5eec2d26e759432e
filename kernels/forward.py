"""Forward attention: one program per query tile, online softmax over its key tiles."""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from .configs import TileConfig, tile_config
from .launch import NOT_SPECIALIZED, Problem, empty_like
from .score import (
    LARGE,
    NARROW,
    accumulate,
    drop_unseen,
    first_masked_key,
    first_maximum,
    key_bias,
    load_rows,
    log_sum_exp,
    mask_scores,
    online_softmax,
    pair_bias,
    sequence_ptr,
    store_rows,
)
from .terms import kept_pairs, softcapped, with_terms
from .tiles import (
    edge_block,
    first_tile,
    prefix_keys_end,
    query_tile,
    rows_before,
    visited_keys,
)


@triton.jit
def _attend(
    acc, m_i, l_i, rows, q, k_ptr, v_ptr, mask_ptr, stride_kn, stride_vn, stride_mm, stride_mn,
    begin, end, key_lo, key_hi, first_query, num_q, interval, terms, dropout, qk_scale, cap_scale,
    MASKED: tl.constexpr, MASK: tl.constexpr, IS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    NATURAL: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fold the key tiles of [begin, end) into (acc, m, l), reading no key outside [key_lo, key_hi).

    rows: bool [BLOCK_M], those that are to see anything, or None for all.
    """
    offs_m = first_query + tl.arange(0, BLOCK_M)
    STAGES: tl.constexpr = None if rows is None else 1
    if begin < end:  # see _accumulate_dkdv
        for n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
            offs_n = n + tl.arange(0, BLOCK_N)
            keep = None
            bias = None
            if MASKED:
                keep = (offs_n >= key_lo) & (offs_n < key_hi)
            k = load_rows(k_ptr, n, stride_kn, keep, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if cap_scale is not None:
                s = softcapped(s, cap_scale)
            if MASKED and MASK == "keys":
                # After the product, so that it takes no registers before.
                column = key_bias(mask_ptr, offs_n, stride_mn, keep, IS_BIAS, NATURAL)
                keep = column != float("-inf")
                if IS_BIAS:
                    bias = column[None, :]
            if MASKED:
                s, values = mask_scores(
                    s, offs_m[:, None], offs_n[None, :], keep[None, :],  # type: ignore[index]
                    num_q, interval,
                    mask_ptr, stride_mm, stride_mn, MASK, IS_BIAS,
                )  # fmt: skip
                if MASK == "pairs" and IS_BIAS:
                    bias = pair_bias(values, NATURAL)
            if rows is not None:
                s = tl.where(rows[:, None], s, float("-inf"))
            if terms[2] is not None or terms[4] is not None or terms[6] is not None:
                bias = with_terms(bias, offs_m[:, None], offs_n[None, :], terms, interval, NATURAL)
            p, alpha, m_i = online_softmax(m_i, s, qk_scale, bias, MASKED, NATURAL)
            v = load_rows(v_ptr, n, stride_vn, keep, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)
            if MASKED and MASK == "pairs":
                v = drop_unseen(v, s)
            kept = p
            if dropout[0] is not None:
                kept = tl.where(kept_pairs(first_query, n, dropout, BLOCK_M, BLOCK_N), p, 0.0)
            acc = accumulate(acc * alpha[:, None], kept.to(v.dtype), v, EXACT, PRECISION)
            l_i = l_i * alpha + tl.sum(p, 1)
    return acc, m_i, l_i


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, o_ptr, lse_ptr, lse_low_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr, lo_ptr, hi_ptr,
    times_ptr, decay_ptr, slopes_ptr, relative_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_ob, stride_oh, stride_on, stride_slopes,
    num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k, window_left, window_right, qk_scale,
    natural_scale, cap_scale, relative_far, global_prefix, dropout_bits, kept_scale,
    GROUP: tl.constexpr, IS_PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    ANCHORED: tl.constexpr,
    MASK: tl.constexpr, IS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    NATURAL: tl.constexpr, ONLY_LARGE: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ONLY_LARGE: o and lse are those of forward_gluon.py, which has left some rows, lse NaN."""
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
    if ONLY_LARGE:  # most tiles have no such row, and are not read
        mine = first_query + tl.arange(0, BLOCK_M)
        at = (tl.cast(batch, tl.int64) * num_heads + head) * seqlen_q + mine
        found = tl.load(lse_ptr + at, mask=mine < rows, other=0.0)
        if tl.max((found != found).to(tl.int32), 0) == 0:
            tl.store(lse_low_ptr + at, tl.zeros([BLOCK_M], tl.float32), mask=mine < rows)
            return

    kv_head = head // GROUP
    q_ptr = sequence_ptr(q_ptr, batch, head, q_start, stride_qb, stride_qh, stride_qn, ALIGN)
    k_ptr = sequence_ptr(k_ptr, batch, kv_head, k_start, stride_kb, stride_kh, stride_kn, ALIGN)
    v_ptr = sequence_ptr(v_ptr, batch, kv_head, k_start, stride_vb, stride_vh, stride_vn, ALIGN)
    if MASK is not None:
        mask_ptr = sequence_ptr(mask_ptr, batch, head, 0, stride_mb, stride_mh, 0, 1)

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
    offs_m = first_query + tl.arange(0, BLOCK_M)
    is_query = rows_before(offs_m, num_q, ANCHORED)
    q = load_rows(q_ptr, first_query, stride_qn, is_query, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m_i = first_maximum(BLOCK_M, NATURAL)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    EDGE_N: tl.constexpr = edge_block(BLOCK_N, MASK)
    STARTS_MASKED: tl.constexpr = (
        window_left is not None or lo_ptr is not None or interval[10] is not None
    )
    start = begin
    if not ONLY_LARGE:
        if global_prefix is not None:
            acc, m_i, l_i = _attend(
                acc, m_i, l_i, None, q, k_ptr, v_ptr, mask_ptr,
                stride_kn, stride_vn, stride_mm, stride_mn,
                first_tile(interval), prefix_keys_end(first_query, begin, end, interval),
                key_lo, key_hi, first_query, num_q, interval, terms, dropout, qk_scale, cap_scale,
                True, MASK, IS_BIAS, EXACT, NATURAL,
                ALIGN, PRECISION, HEAD_DIM, BLOCK_M, EDGE_N, BLOCK_D,
            )  # fmt: skip
        if MASK != "pairs":
            if STARTS_MASKED:
                acc, m_i, l_i = _attend(
                    acc, m_i, l_i, None, q, k_ptr, v_ptr, mask_ptr,
                    stride_kn, stride_vn, stride_mm, stride_mn, begin, full_begin, key_lo, key_hi,
                    first_query, num_q, interval, terms, dropout, qk_scale, cap_scale,
                    True, MASK, IS_BIAS, EXACT, NATURAL,
                    ALIGN, PRECISION, HEAD_DIM, BLOCK_M, EDGE_N, BLOCK_D,
                )  # fmt: skip
            if MASK == "keys":
                masked = first_masked_key(mask_ptr, stride_mn, full_begin, full_end, IS_BIAS)
                full_end = full_begin + (masked - full_begin) // BLOCK_N * BLOCK_N
            acc, m_i, l_i = _attend(
                acc, m_i, l_i, None, q, k_ptr, v_ptr, mask_ptr,
                stride_kn, stride_vn, stride_mm, stride_mn,
                full_begin, full_end, key_lo, key_hi,
                first_query, num_q, interval, terms, dropout, qk_scale, cap_scale,
                False, MASK, IS_BIAS, EXACT, NATURAL,
                ALIGN, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            begin = full_end
        acc, m_i, l_i = _attend(
            acc, m_i, l_i, None, q, k_ptr, v_ptr, mask_ptr,
            stride_kn, stride_vn, stride_mm, stride_mn,
            begin, end, key_lo, key_hi, first_query, num_q, interval, terms, dropout,
            qk_scale, cap_scale,
            True, MASK, IS_BIAS, EXACT, NATURAL,
            ALIGN, PRECISION, HEAD_DIM, BLOCK_M, EDGE_N, BLOCK_D,
        )  # fmt: skip

    lse_ptr += (tl.cast(batch, tl.int64) * num_heads + head) * seqlen_q + q_start
    lse_low_ptr += (tl.cast(batch, tl.int64) * num_heads + head) * seqlen_q + q_start
    is_row = rows_before(offs_m, rows, ANCHORED)
    lse, low = log_sum_exp(m_i, l_i, NATURAL)
    if not NATURAL:
        large = is_query & ~((m_i > -LARGE) & (m_i < LARGE))
        if ONLY_LARGE:
            lse = tl.load(lse_ptr + offs_m, mask=is_query, other=0.0)
            large = lse != lse
        if tl.max(large.to(tl.int32), 0) != 0:
            if global_prefix is not None:
                end = tl.maximum(end, prefix_keys_end(first_query, start, end, interval))
                start = first_tile(interval)
            acc, m_i, l_i = _attend(
                tl.where(large[:, None], 0.0, acc), tl.where(large, float("-inf"), 0.0),
                tl.where(large, 0.0, l_i), large, q, k_ptr, v_ptr, mask_ptr,
                stride_kn, stride_vn, stride_mm, stride_mn, start, end, key_lo, key_hi,
                first_query, num_q, interval, terms, dropout, natural_scale, cap_scale,
                True, MASK, IS_BIAS, EXACT, True,
                ALIGN, PRECISION, HEAD_DIM, BLOCK_M, NARROW, BLOCK_D,
            )  # fmt: skip
            natural, natural_low = log_sum_exp(m_i, l_i, True)
            lse = tl.where(large, natural, lse)
            low = tl.where(large, natural_low, low)

    empty = (l_i == 0.0) | ~rows_before(offs_m, num_q, ANCHORED)
    factor = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, l_i))
    if dropout[0] is not None:
        factor *= kept_scale
    o = factor[:, None] * acc
    o_ptr = sequence_ptr(o_ptr, batch, head, q_start, stride_ob, stride_oh, stride_on, ALIGN)
    tl.store(lse_low_ptr + offs_m, tl.where(empty, 0.0, low), mask=is_row)
    if ONLY_LARGE:
        is_row = large
    store_rows(o_ptr, first_query, stride_on, o, is_row, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)
    tl.store(lse_ptr + offs_m, tl.where(empty, float("-inf"), lse), mask=is_row)


def attention_forward(call: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(o, lse, lse_low) of dense (B, H, N, D) or packed (T, H, D) attention.

    call has the fields of backends.call.Arguments. o has q's type and shape, lse is fp32
    (B, H, Nq) or (H, T), natural log; a query that sees no key gives 0 and -inf. lse_low is what
    rounding took from lse, 0 in 16 bits where no score is large.
    """
    problem, q = Problem(call), call.q
    if gains_by_gluon(problem):
        o, lse = gluon_module().launch_forward(problem)
        return o, lse, _launch(problem, LARGE_ROWS, o, lse, only_large=True)
    o, lse = empty_like(q), problem.empty_lse()
    config = tile_config("forward", *problem.layout.config_key)
    return o, lse, _launch(problem, config, o, lse, only_large=False)


def _launch(
    problem: Problem, config: TileConfig, o: torch.Tensor, lse: torch.Tensor, only_large: bool
) -> torch.Tensor:
    """Write o and lse, or the rows of them that forward_gluon.py has left; returns lse_low."""
    layout = problem.layout
    lse_low = empty_like(lse)
    if o.numel() > 0:
        problem.launch(
            _forward_kernel,
            config,
            layout.num_query_tiles(config.block_m),
            layout.num_heads,
            o_ptr=o,
            lse_ptr=lse,
            lse_low_ptr=lse_low,
            natural_scale=layout.natural_scale,
            ANCHORED=layout.anchors_queries,
            ONLY_LARGE=only_large,
            **layout.o_strides,
        )
    return lse_low


# The tile of the launch after forward_gluon.py. Most of its programs end at once, so a small tile
# that lets four or more share a multiprocessor. Rows are spread over warps as in forward_gluon.py,
# so that the bits are the same.
LARGE_ROWS = TileConfig(128, 32, 8, 1)

# FLOP of a call from which forward_gluon.py takes it. To build its descriptors and launch it takes
# the host some 0.25 ms: on an H200 it was 1.14 times as fast at 2^37 (N 1024, full), and at 2^36
# (N 512, full, or N 1024, causal) 0.8 times.
LEAST_WORK = 2**37


def gains_by_gluon(problem: Problem) -> bool:
    """Whether forward_gluon.py takes a call, and is the faster way. Both give the same bits."""
    layout, call = problem.layout, problem.call
    capability, head_dim, dtype, kind = layout.config_key
    if kind != "plain" or layout.packed or head_dim != 128 or dtype.itemsize != 2:
        return False
    pairs = layout.seqlen_q * layout.seqlen_k // (1 if call.window_right < 0 else 2)
    work = 4 * head_dim * pairs * layout.num_heads * layout.batch
    if capability[0] != 9 or work < LEAST_WORK:
        return False
    gluon = gluon_module()
    return gluon is not None and gluon.unsupported(call) is None


@lru_cache
def gluon_module() -> Any:
    """forward_gluon.py; None where Triton is too old for it, or interprets its kernels."""
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < (3, 6) or not isinstance(_forward_kernel, JITFunction):
        return None
    try:
        from . import forward_gluon
    except ImportError:
        return None
    return forward_gluon
