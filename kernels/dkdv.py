"""Backward attention by key tiles: dK and dV."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .interval import Interval, seen_keys, unless_hidden, visiting_queries
from .parameters import NOT_SPECIALIZED, Sizes
from .ranges import over_queries
from .score import (
    accumulate,
    has_large_scores,
    key_bias,
    load_low,
    load_rows,
    sequence_ptr,
    store_rows,
)
from .terms import Dropout, Score, Terms, dropped, kept_pairs
from .tiles import key_tile
from .weights import log_weights


class KeyTile(NamedTuple):
    """A tile of keys, by row.

    bias: [N, 1], of a mask by key, or None. keep: bool, the keys that are read. first: a key.
    """

    k: Any
    v: Any
    bias: Any
    keep: Any
    first: Any


class QueryRows(NamedTuple):
    """Pointers to the first row of a sequence in the first query head of a key head.

    shift_ptr: of dq_kernel. strides: InputStrides. stride_h: from a head to the next in lse_ptr,
    shift_ptr, lse_low_ptr and delta_ptr.
    """

    q_ptr: Any
    do_ptr: Any
    lse_ptr: Any
    shift_ptr: Any
    lse_low_ptr: Any
    delta_ptr: Any
    mask_ptr: Any
    strides: Any
    do_strides: Any
    stride_h: Any
    first_head: Any


DK, DV = tl.constexpr(1), tl.constexpr(2)  # bits of GRADIENTS


@triton.jit
def _accumulate_dkdv(
    sums, queries, keys, begin, end, score,
    GRADIENTS: tl.constexpr, LARGE_ROWS: tl.constexpr, UNGUARDED: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Returns (dk, dv) with ds^T q and p^T do added, as far as they are among GRADIENTS, over the
    query tiles of [begin, end) in each head of the group: a STEP of ranges.py.

    Scores are computed transposed, s^T = k q^T: a product transposed in registers and fed to
    another product is miscompiled for Hopper by Triton 3.4 to 3.7.
    """
    NATURAL: tl.constexpr = form.NATURAL or LARGE_ROWS
    dk, dv = sums
    interval = score.interval
    HIDES: tl.constexpr = (  # more than lengths and a key mask
        form.MASK == "pairs"
        or interval.window_left is not None
        or interval.window_right is not None
        or interval.lo_ptr is not None
        or interval.prefix is not None
    )
    dropout = score.dropout
    shift_ptr = queries.shift_ptr
    if LARGE_ROWS:
        shift_ptr = queries.lse_ptr
    tiles = tl.cdiv(end - begin, BLOCK_M)
    offs_n = keys.first + tl.arange(0, BLOCK_N)
    runs = tiles > 0
    if UNGUARDED:
        runs = True
    if runs:
        # The condition is there for ptxas on Hopper. Without it a path around the loop also defines
        # dk and dv, and ptxas waits for each product; with it products stay in flight until the
        # loop ends. In the first loop of a kernel the condition itself makes ptxas wait, so that
        # loop is UNGUARDED. (The first loop is that over rows of large scores, unless scores are
        # NATURAL.) On other cards ptxas never waits, and a condition around the first loop leaves
        # more registers to later loops: GUARDED.
        for t in tl.range(0, tiles * form.GROUP, num_stages=1 if LARGE_ROWS else None):
            in_group = 0
            m = begin + t * BLOCK_M
            if form.GROUP > 1:
                in_group = t // tiles
                m = begin + (t - in_group * tiles) * BLOCK_M
            head = queries.first_head + in_group
            row = tl.cast(in_group, tl.int64) * queries.stride_h
            offs_m = m + tl.arange(0, BLOCK_M)
            sees = None
            low = None
            if MASKED:
                sees = (offs_m >= 0) & (offs_m < interval.tile.num_q)
                shift = tl.load(shift_ptr + row + offs_m, mask=sees, other=float("inf"))
                if LARGE_ROWS:
                    shift = tl.where(sees & has_large_scores(shift), shift, float("inf"))
                delta = tl.load(queries.delta_ptr + row + offs_m, mask=sees, other=0.0)
                if NATURAL:
                    low = load_low(queries.lse_low_ptr + row, offs_m, sees)[None, :]
                if form.MASK is not None or HIDES or LARGE_ROWS:
                    sees = shift != float("inf")
            else:
                shift = tl.load(shift_ptr + row + offs_m)
                delta = tl.load(queries.delta_ptr + row + offs_m)
                if NATURAL:
                    low = load_low(queries.lse_low_ptr + row, offs_m, None)[None, :]
            q_head = sequence_ptr(queries.q_ptr, 0, in_group, 0, queries.strides.q, form.ALIGN)
            q = load_rows(q_head, m, queries.strides.q.n, sees, BLOCK_M, form)
            s_t = tl.dot(keys.k, tl.trans(q), input_precision=form.PRECISION)
            mask_head = queries.mask_ptr
            if form.MASK == "pairs":
                mask_head = sequence_ptr(mask_head, 0, in_group, 0, queries.strides.mask, 1)
            x_t, s_t, gain = log_weights(
                s_t, offs_m[None, :], offs_n[:, None], keys.keep[:, None], keys.bias,
                shift[None, :], low, head, mask_head, queries.strides.mask, score,
                MASKED and HIDES, NATURAL, form,
            )  # fmt: skip
            p_t = tl.exp2(x_t)
            do_head = sequence_ptr(queries.do_ptr, 0, in_group, 0, queries.do_strides, form.ALIGN)
            do = load_rows(do_head, m, queries.do_strides.n, sees, BLOCK_M, form, VALUES=True)
            kept_t = p_t
            if dropout.seed_ptr is not None:
                is_kept = kept_pairs(m, keys.first, head, dropout, BLOCK_M, BLOCK_N)
                is_kept = tl.trans(is_kept)
                kept_t = dropped(p_t, is_kept, dropout)
            if DV & GRADIENTS:
                dv = accumulate(dv, kept_t.to(do.dtype), do, form)
            if DK & GRADIENTS:
                dp_t = tl.dot(keys.v, tl.trans(do), input_precision=form.PRECISION)
                if dropout.seed_ptr is not None:
                    dp_t = dropped(dp_t, is_kept, dropout)
                ds_t = p_t * (dp_t - delta[None, :])
                if MASKED and form.MASK == "pairs":
                    ds_t = tl.where(s_t == float("-inf"), 0.0, ds_t)
                ds_t *= gain
                dk = accumulate(dk, ds_t.to(q.dtype), q, form)
    return dk, dv


@triton.jit
def _zeros(BLOCK_N: tl.constexpr, form: tl.constexpr):
    """Returns (dk, dv) before the first tile."""
    BLOCK_D: tl.constexpr = form.BLOCK_D
    BLOCK_V: tl.constexpr = form.BLOCK_V
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    return dk, dv


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def dkdv_kernel(
    inputs, do_ptr, lse_ptr, shift_ptr, lse_low_ptr, delta_ptr, dk_ptr, dv_ptr,
    strides, do_strides, dk_strides, dv_strides,
    num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k,
    window_left, window_right, stride_slopes, relative_far, global_prefix, dropout_bits, factors,
    ANCHORED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Writes dk = scale ds^T q and dv = p^T do, summed over the GROUP query heads of a key head.

    num_heads: key heads.
    """
    sizes = Sizes(num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k)
    tile = key_tile(tl.program_id(0), inputs, sizes, BLOCK_N, form)
    batch = tile.batch
    kv_head = tile.head
    first_key = tile.first
    if first_key >= tile.rows:
        return

    head = kv_head * form.GROUP
    q_ptr = sequence_ptr(inputs.q, batch, head, tile.q_start, strides.q, form.ALIGN)
    k_ptr = sequence_ptr(inputs.k, batch, kv_head, tile.k_start, strides.k, form.ALIGN)
    v_ptr = sequence_ptr(inputs.v, batch, kv_head, tile.k_start, strides.v, form.ALIGN)
    do_ptr = sequence_ptr(do_ptr, batch, head, tile.q_start, do_strides, form.ALIGN)
    dk_ptr = sequence_ptr(dk_ptr, batch, kv_head, tile.k_start, dk_strides, form.ALIGN)
    dv_ptr = sequence_ptr(dv_ptr, batch, kv_head, tile.k_start, dv_strides, form.ALIGN)
    row = (tl.cast(batch, tl.int64) * num_heads * form.GROUP + head) * seqlen_q + tile.q_start
    lse_ptr += row
    shift_ptr += row
    lse_low_ptr += row
    delta_ptr += row
    mask_ptr = None
    if form.MASK is not None:
        mask_ptr = sequence_ptr(inputs.mask, batch, head, 0, strides.mask, 1)

    interval = Interval(
        tile, window_left, window_right, inputs.lo, inputs.hi, global_prefix, form.UNIT
    )
    terms = Terms(inputs, tile.sequence, relative_far, stride_slopes)
    dropout = Dropout(inputs.seed, tile.sequence, dropout_bits, factors.kept_scale)
    score = Score(interval, terms, dropout, factors)
    queries = QueryRows(
        q_ptr, do_ptr, lse_ptr, shift_ptr, lse_low_ptr, delta_ptr, mask_ptr,
        strides, do_strides, seqlen_q, head,
    )  # fmt: skip
    visit = visiting_queries(first_key, interval, ANCHORED, BLOCK_M, BLOCK_N)
    offs_n = first_key + tl.arange(0, BLOCK_N)
    seen_lo, seen_hi = seen_keys(interval)
    keep = (offs_n >= seen_lo) & (offs_n < seen_hi)
    bias = None
    if form.MASK == "keys":
        column = key_bias(mask_ptr, offs_n, strides.mask.n, keep, form.IS_BIAS, form.NATURAL)
        keep = column != float("-inf")
        if form.IS_BIAS:
            bias = tl.where(keep, column, 0.0)[:, None]
        visit = unless_hidden(visit, column)
    k = load_rows(k_ptr, first_key, strides.k.n, keep, BLOCK_N, form)
    v = load_rows(v_ptr, first_key, strides.v.n, keep, BLOCK_N, form, VALUES=True)
    keys = KeyTile(k, v, bias, keep, first_key)
    # With wide heads the registers of a warp group hold one sum of 64 rows, not two. So dv comes
    # first, then dk with the scores computed again: five products instead of four, at full rate.
    AT_ONCE: tl.constexpr = (form.BLOCK_D <= 128 and form.BLOCK_V <= 128) or form.EXACT
    FIRST: tl.constexpr = DK | DV if AT_ONCE else DV
    dk, dv = over_queries(
        _zeros(BLOCK_N, form), queries, keys, visit, score,
        _accumulate_dkdv, FIRST, ANCHORED, BLOCK_M, BLOCK_N, form,
    )  # fmt: skip
    inside = (offs_n >= 0) & (offs_n < tile.rows)
    # A key that is not kept was read as 0, which does not make its p 0.
    dv = tl.where(keep[:, None], dv, 0.0)
    store_rows(dv_ptr, first_key, dv_strides.n, dv, inside, BLOCK_N, form, VALUES=True)
    if not AT_ONCE:
        dk, _ = over_queries(
            _zeros(BLOCK_N, form), queries, keys, visit, score,
            _accumulate_dkdv, DK, ANCHORED, BLOCK_M, BLOCK_N, form,
        )  # fmt: skip
    dk = tl.where(keep[:, None], dk * factors.scale, 0.0)
    store_rows(dk_ptr, first_key, dk_strides.n, dk, inside, BLOCK_N, form)
