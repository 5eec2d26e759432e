"""Gradients of what is added to the scores: of a mask, by its tiles, and of relative biases."""

from typing import Any

import torch
import triton
import triton.language as tl

from .configs import TileConfig
from .launch import NOT_SPECIALIZED, Problem
from .score import (
    exponential,
    key_bias,
    load_low,
    load_rows,
    mask_scores,
    pair_bias,
    sequence_ptr,
)
from .terms import dropped, kept_pairs, softcapped, with_terms
from .tiles import dense_lengths, query_tile, visited_keys

# Which sides of a mask broadcast, as the kernel's switches.
SHARES = ("BATCHES_SHARE", "HEADS_SHARE", "QUERIES_SHARE", "KEYS_SHARE")
# One size for all: the scores are computed anew for one number of each pair, so these kernels are
# bound by loads. Small enough that nothing spills at D 256.
TILE = TileConfig(32, 32, 4, 1)
COPIES = 16  # of a table of relative biases in which tiles of queries sum what they have by turns


@triton.jit
def _score_gradients(
    q, do, shift, low, delta, k_ptr, v_ptr, mask_ptr, stride_kn, stride_vn, stride_mm, stride_mn,
    first_query, first_key, key_lo, key_hi, num_q, interval, terms, dropout, qk_scale, cap_scale,
    MASK: tl.constexpr, IS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    NATURAL: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ds [BLOCK_M, BLOCK_N] of one tile, 0 for the pairs that are not seen."""
    offs_m = first_query + tl.arange(0, BLOCK_M)
    offs_n = first_key + tl.arange(0, BLOCK_N)
    inside = (offs_n >= key_lo) & (offs_n < key_hi)
    bias = None
    if MASK == "keys":
        column = key_bias(mask_ptr, offs_n, stride_mn, inside, IS_BIAS, NATURAL)
        inside = column != float("-inf")
        if IS_BIAS:
            bias = column[None, :]
    k = load_rows(k_ptr, first_key, stride_kn, inside, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)
    v = load_rows(v_ptr, first_key, stride_vn, inside, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if cap_scale is not None:
        s = softcapped(s, cap_scale)
    s, values = mask_scores(
        s, offs_m[:, None], offs_n[None, :], inside[None, :], num_q, interval,
        mask_ptr, stride_mm, stride_mn, MASK, IS_BIAS,
    )  # fmt: skip
    if MASK == "pairs" and IS_BIAS:
        bias = pair_bias(values, NATURAL)
    if terms[2] is not None or terms[4] is not None or terms[6] is not None:
        bias = with_terms(bias, offs_m[:, None], offs_n[None, :], terms, interval, NATURAL)
    if dropout[0] is not None:
        dp = dropped(dp, kept_pairs(first_query, first_key, dropout, BLOCK_M, BLOCK_N), dropout)
    p = exponential(s, qk_scale, bias, shift[:, None], low[:, None], NATURAL)
    return tl.where(s == float("-inf"), 0.0, p * (dp - delta[:, None]))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def mask_gradient_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, do_ptr, shift_ptr, lse_low_ptr, delta_ptr, dmask_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr, lo_ptr, hi_ptr,
    times_ptr, decay_ptr, slopes_ptr, relative_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_dob, stride_doh, stride_don, stride_slopes,
    num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k, window_left, window_right, qk_scale,
    cap_scale, relative_far, global_prefix, dropout_bits, kept_scale,
    batches, num_q_tiles, num_k_tiles,
    BATCHES_SHARE: tl.constexpr, HEADS_SHARE: tl.constexpr,
    QUERIES_SHARE: tl.constexpr, KEYS_SHARE: tl.constexpr,
    GROUP: tl.constexpr, IS_PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    MASK: tl.constexpr, IS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    NATURAL: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dmask, contiguous (B or 1, H or 1, Nq or 1, Nk or 1), in fp32: a program owns a tile of it
    and sums ds over all that shares the tile, in a fixed order.
    """
    tile = tl.program_id(0) % num_tiles
    plane = tl.program_id(0) // num_tiles
    own_head = 0
    own_batch = plane
    if not HEADS_SHARE:
        own_head = plane % num_heads
        own_batch = plane // num_heads
    own_q = 0
    own_k = tile
    if not QUERIES_SHARE:
        own_q = tile
        own_k = 0
        if not KEYS_SHARE:
            own_q = tile // num_k_tiles
            own_k = tile % num_k_tiles
    tiles_here = num_q_tiles if QUERIES_SHARE else 1
    steps_here = num_k_tiles if KEYS_SHARE else 1
    heads_here = num_heads if HEADS_SHARE else 1
    batches_here = batches if BATCHES_SHARE else 1
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(0, batches_here * heads_here * tiles_here):
        batch = own_batch + at // (heads_here * tiles_here)
        head = own_head + at // tiles_here % heads_here
        first_query = (own_q + at % tiles_here) * BLOCK_M
        num_q, kv_begin, kv_end = dense_lengths(
            batch, q_lengths_ptr, kv_start_ptr, kv_end_ptr, seqlen_q, seqlen_k
        )
        if first_query < num_q:
            kv_head = head // GROUP
            q_head = sequence_ptr(q_ptr, batch, head, 0, stride_qb, stride_qh, 0, ALIGN)
            k_head = sequence_ptr(k_ptr, batch, kv_head, 0, stride_kb, stride_kh, 0, ALIGN)
            v_head = sequence_ptr(v_ptr, batch, kv_head, 0, stride_vb, stride_vh, 0, ALIGN)
            do_head = sequence_ptr(do_ptr, batch, head, 0, stride_dob, stride_doh, 0, ALIGN)
            mask_head = sequence_ptr(mask_ptr, batch, head, 0, stride_mb, stride_mh, 0, 1)
            row = (tl.cast(batch, tl.int64) * num_heads + head) * seqlen_q
            first_row = tl.cast(batch, tl.int64) * seqlen_q
            interval = (
                (kv_end - num_q) if BOTTOM_RIGHT else 0, kv_begin, kv_end,
                window_left, window_right,
                lo_ptr, hi_ptr, first_row, num_q, global_prefix,
                16 if seed_ptr is not None and kv_start_ptr is not None else None,
            )  # fmt: skip
            terms = (
                batch, head, relative_ptr, relative_far, slopes_ptr, stride_slopes,
                decay_ptr, times_ptr,
            )  # fmt: skip
            dropout = (seed_ptr, batch, head, dropout_bits, kept_scale)
            begin, _, _, end, key_lo, key_hi = visited_keys(
                first_query, num_q, interval, BLOCK_M, BLOCK_N
            )
            if global_prefix is not None:
                begin = 0
                end = kv_end
            offs_m = first_query + tl.arange(0, BLOCK_M)
            in_range = offs_m < num_q
            shift = tl.load(shift_ptr + row + offs_m, mask=in_range, other=float("inf"))
            delta = tl.load(delta_ptr + row + offs_m, mask=in_range, other=0.0)
            low = load_low(lse_low_ptr + row, offs_m, in_range)
            sees = shift != float("inf")
            q = load_rows(q_head, first_query, stride_qn, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)
            do = load_rows(
                do_head, first_query, stride_don, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D
            )
            for step in range(0, steps_here):
                first_key = (own_k + step) * BLOCK_N
                if (first_key < end) & (first_key + BLOCK_N > begin):
                    total += _score_gradients(
                        q, do, shift, low, delta, k_head, v_head, mask_head,
                        stride_kn, stride_vn, stride_mm, stride_mn,
                        first_query, first_key, key_lo, key_hi, num_q, interval, terms, dropout,
                        qk_scale, cap_scale, MASK, IS_BIAS, EXACT, NATURAL, ALIGN, PRECISION,
                        HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
                    )  # fmt: skip
    rows = 1 if QUERIES_SHARE else seqlen_q
    columns = 1 if KEYS_SHARE else seqlen_k
    i = tl.zeros([1], tl.int32) if QUERIES_SHARE else own_q * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.zeros([1], tl.int32) if KEYS_SHARE else own_k * BLOCK_N + tl.arange(0, BLOCK_N)
    if QUERIES_SHARE:
        total = tl.sum(total, 0, keep_dims=True)
    if KEYS_SHARE:
        total = tl.sum(total, 1, keep_dims=True)
    dmask_ptr += tl.cast(plane, tl.int64) * rows * columns
    at = i[:, None].to(tl.int64) * columns + j[None, :]
    tl.store(dmask_ptr + at, total, mask=(i < rows)[:, None] & (j < columns)[None, :])


def mask_gradient(problem: Problem, gradient: dict[str, Any]) -> torch.Tensor:
    """Gradient of the mask in its shape and type; dense layout. Memory: one more mask, in fp32."""
    mask = problem.call.mask
    share = [n == 1 for n in mask.shape]
    q_tiles = -(-problem.layout.seqlen_q // TILE.block_m)
    k_tiles = -(-problem.layout.seqlen_k // TILE.block_n)
    total = torch.empty(mask.shape, dtype=torch.float32, device=mask.device)
    planes = mask.shape[0] * mask.shape[1]
    num_tiles = (1 if share[2] else q_tiles) * (1 if share[3] else k_tiles)
    arguments = dict(zip(SHARES, share, strict=True))
    problem.launch(
        mask_gradient_kernel,
        TILE,
        num_tiles,
        problem.layout.num_heads,
        programs=num_tiles * planes,
        dmask_ptr=total,
        batches=problem.layout.batch,
        num_q_tiles=q_tiles,
        num_k_tiles=k_tiles,
        **arguments,
        **gradient,
    )
    return total.to(mask.dtype)


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "num_buckets", "sums_far", "batches"])
def relative_gradient_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, do_ptr, shift_ptr, lse_low_ptr, delta_ptr, sums_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr, lo_ptr, hi_ptr,
    times_ptr, decay_ptr, slopes_ptr, relative_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_dob, stride_doh, stride_don, stride_slopes,
    num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k, window_left, window_right, qk_scale,
    cap_scale, relative_far, global_prefix, dropout_bits, kept_scale, num_buckets, sums_far,
    batches,
    GROUP: tl.constexpr, IS_PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    MASK: tl.constexpr, IS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    NATURAL: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of ds for each bucket of distances, in a row of sums (copies, heads, buckets) that the
    program owns and that starts as 0, over every copies-th tile of queries of a head, in their
    order; sums_far is the L that they reach to.
    """
    SIDE: tl.constexpr = BLOCK_N
    tl.static_assert(BLOCK_M == BLOCK_N, "diagonals wrap around a square")
    ring = tl.arange(0, SIDE)
    turned = (tl.arange(0, BLOCK_M)[:, None] + ring[None, :]) % SIDE
    wraps = tl.arange(0, BLOCK_M)[:, None] + ring[None, :] >= SIDE
    sums_ptr += tl.cast(tl.program_id(0), tl.int64) * num_buckets
    of_head = tl.program_id(0) % num_heads
    copies = tl.num_programs(0) // num_heads
    before = 0.0
    after = 0.0
    for slot in range(tl.program_id(0) // num_heads, batches * num_tiles, copies):
        (
            batch, sequence, head, first_query, q_start, k_start, rows, num_q, kv_begin, kv_end
        ) = query_tile(
            (slot // num_tiles * num_heads + of_head) * num_tiles + slot % num_tiles,
            num_tiles, num_heads,
            cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr,
            num_seqs, seqlen_q, seqlen_k, IS_PACKED, False, BOTTOM_RIGHT, False, BLOCK_M,
        )  # fmt: skip
        if first_query < num_q:
            kv_head = head // GROUP
            q_rows = sequence_ptr(
                q_ptr, batch, head, q_start, stride_qb, stride_qh, stride_qn, ALIGN
            )
            k_rows = sequence_ptr(
                k_ptr, batch, kv_head, k_start, stride_kb, stride_kh, stride_kn, ALIGN
            )
            v_rows = sequence_ptr(
                v_ptr, batch, kv_head, k_start, stride_vb, stride_vh, stride_vn, ALIGN
            )
            do_rows = sequence_ptr(
                do_ptr, batch, head, q_start, stride_dob, stride_doh, stride_don, ALIGN
            )
            row = (tl.cast(batch, tl.int64) * num_heads + head) * seqlen_q + q_start
            mask_rows = mask_ptr
            if MASK is not None:
                mask_rows = sequence_ptr(mask_ptr, batch, head, 0, stride_mb, stride_mh, 0, 1)
            first_row = tl.cast(batch, tl.int64) * seqlen_q + q_start
            interval = (
                (kv_end - num_q) if BOTTOM_RIGHT else 0, kv_begin, kv_end,
                window_left, window_right,
                lo_ptr, hi_ptr, first_row, num_q, global_prefix,
                16 if seed_ptr is not None and kv_start_ptr is not None else None,
            )  # fmt: skip
            terms = (
                sequence, head, relative_ptr, relative_far, slopes_ptr, stride_slopes,
                decay_ptr, times_ptr,
            )  # fmt: skip
            dropout = (seed_ptr, sequence, head, dropout_bits, kept_scale)
            begin, _, _, end, key_lo, key_hi = visited_keys(
                first_query, num_q, interval, BLOCK_M, BLOCK_N
            )
            if global_prefix is not None:
                begin = kv_begin
                end = kv_end
            offs_m = first_query + tl.arange(0, BLOCK_M)
            in_range = offs_m < num_q
            shift = tl.load(shift_ptr + row + offs_m, mask=in_range, other=float("inf"))
            delta = tl.load(delta_ptr + row + offs_m, mask=in_range, other=0.0)
            low = load_low(lse_low_ptr + row, offs_m, in_range)
            sees = shift != float("inf")
            q = load_rows(q_rows, first_query, stride_qn, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)
            do = load_rows(
                do_rows, first_query, stride_don, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D
            )
            for n in range(begin // 16 * 16, end, BLOCK_N):  # kept_pairs wants multiples of 16
                ds = _score_gradients(
                    q, do, shift, low, delta, k_rows, v_rows, mask_rows,
                    stride_kn, stride_vn, stride_mm, stride_mn, first_query, n, key_lo, key_hi,
                    num_q, interval, terms, dropout, qk_scale, cap_scale,
                    MASK, IS_BIAS, EXACT, NATURAL, ALIGN, PRECISION,
                    HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                # Row i turned left by i has the diagonals of the tile as columns: c where it did
                # not wrap around, else c - SIDE.
                skewed = tl.gather(ds, turned, 1)
                distance = n - first_query - interval[0]
                for wrapped in tl.static_range(2):
                    of_diagonal = tl.sum(tl.where(wraps == (wrapped == 1), skewed, 0.0), 0)
                    d = distance + ring - wrapped * SIDE
                    before += tl.sum(tl.where(d <= -sums_far, of_diagonal, 0.0), 0)
                    beyond = (d >= sums_far) & (d > -sums_far)
                    after += tl.sum(tl.where(beyond, of_diagonal, 0.0), 0)
                    near = (d > -sums_far) & (d < sums_far)
                    at = sums_ptr + d + sums_far
                    tl.debug_barrier()  # another thread can have written here in the turn before
                    tl.store(at, tl.load(at, mask=near, other=0.0) + of_diagonal, mask=near)
    tl.debug_barrier()
    if sums_far == 0:
        tl.store(sums_ptr, before + after)
    else:
        tl.store(sums_ptr, before)
        tl.store(sums_ptr + 2 * sums_far, after)


def relative_gradient(problem: Problem, gradient: dict[str, Any]) -> torch.Tensor:
    """Gradient of the relative biases (H, 2 L + 1), with no L beyond the longest sequence.

    Memory for partial sums: COPIES of it, or as many as q takes in fp32 if those are more.
    """
    call, layout = problem.call, problem.layout
    num_tiles = layout.num_tiles(layout.seqlen_q, TILE.block_m)
    far = call.relative.shape[1] // 2
    longest = max(call.max_seqlen_q, call.max_seqlen_k) or max(layout.seqlen_q, layout.seqlen_k)
    reached = min(far, longest)
    buckets = 2 * reached + 1
    like_q = layout.batch * layout.seqlen_q * layout.head_dim // buckets
    copies = min(max(COPIES, like_q), layout.batch * num_tiles)
    shape = (copies, layout.num_heads, buckets)
    sums = torch.zeros(shape, dtype=torch.float32, device=call.relative.device)
    problem.launch(
        relative_gradient_kernel,
        TILE,
        num_tiles,
        layout.num_heads,
        programs=copies * layout.num_heads,
        sums_ptr=sums,
        num_buckets=buckets,
        sums_far=reached,
        batches=layout.batch,
        **gradient,
    )
    return torch.nn.functional.pad(sums.sum(0), (far - reached, far - reached))
