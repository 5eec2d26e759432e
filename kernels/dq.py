"""Backward attention by query tiles: dQ, and the delta that the kernel over keys reads."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .interval import Interval, visited_keys
from .parameters import NOT_SPECIALIZED, Sizes
from .ranges import over_keys
from .score import (
    Keys,
    Queries,
    accumulate,
    drop_unseen,
    has_large_scores,
    key_bias,
    load_low,
    load_rows,
    score_units,
    sequence_ptr,
    store_rows,
)
from .terms import Dropout, Score, Terms, dropped, kept_pairs, position_distance, time_distance
from .tiles import query_tile, rows_before
from .weights import log_weights


class Sums(NamedTuple):
    """Sums over keys: dq, and by query ds times the distance in positions, and in time."""

    dq: Any
    dslope: Any
    ddecay: Any


DSLOPE, DDECAY = tl.constexpr(1), tl.constexpr(2)  # bits of DISTANCES


@triton.constexpr_function
def distances(of_slopes, of_decay):
    """Returns DISTANCES."""
    return of_slopes * DSLOPE.value + of_decay * DDECAY.value


@triton.jit
def _accumulate_dq(
    sums, queries, keys, begin, end, score,
    DISTANCES: tl.constexpr, LARGE_ROWS: tl.constexpr, UNGUARDED: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Returns the Sums with the key tiles of [begin, end) added, of the last two those that are
    among DISTANCES: a STEP of ranges.py.
    """
    NATURAL: tl.constexpr = form.NATURAL or LARGE_ROWS
    dq = sums.dq
    dslope = sums.dslope
    ddecay = sums.ddecay
    interval = score.interval
    dropout = score.dropout
    head = queries.head
    offs_m = queries.first + tl.arange(0, BLOCK_M)
    column_low = None
    if NATURAL:
        column_low = queries.low[:, None]
    runs = begin < end
    if UNGUARDED:
        runs = True
    if runs:  # see _accumulate_dkdv
        for n in tl.range(begin, end, BLOCK_N, num_stages=1 if LARGE_ROWS else None):
            keep = None
            seen = None
            bias = None
            offs_n = n + tl.arange(0, BLOCK_N)
            if MASKED:
                inside = (offs_n >= keys.lo) & (offs_n < keys.hi)
                if form.MASK == "keys":
                    column = key_bias(
                        keys.mask_ptr, offs_n, keys.strides.mask.n, inside, form.IS_BIAS, NATURAL
                    )
                    inside = column != float("-inf")
                    if form.IS_BIAS:
                        bias = column[None, :]
                keep = inside
                seen = inside[None, :]
            k = load_rows(keys.k_ptr, n, keys.strides.k.n, keep, BLOCK_N, form)
            v = load_rows(keys.v_ptr, n, keys.strides.v.n, keep, BLOCK_N, form, VALUES=True)
            s = tl.dot(queries.q, tl.trans(k), input_precision=form.PRECISION)
            dp = tl.dot(queries.do, tl.trans(v), input_precision=form.PRECISION)
            x, s, gain = log_weights(
                s, offs_m[:, None], offs_n[None, :], seen, bias, queries.shift[:, None],
                column_low, head, keys.mask_ptr, keys.strides.mask, score, MASKED, NATURAL, form,
            )  # fmt: skip
            p = tl.exp2(x)
            if dropout.seed_ptr is not None:
                is_kept = kept_pairs(queries.first, n, head, dropout, BLOCK_M, BLOCK_N)
                dp = dropped(dp, is_kept, dropout)
            ds = p * (dp - queries.delta[:, None])
            if MASKED and form.MASK == "pairs":
                ds = tl.where(s == float("-inf"), 0.0, ds)
                k = drop_unseen(k, s)
            if DSLOPE & DISTANCES:
                distance = position_distance(offs_m[:, None], offs_n[None, :], interval)
                dslope += tl.sum(ds * distance, 1)
            if DDECAY & DISTANCES:
                times_ptr = score.terms.inputs.times
                distance = time_distance(offs_m[:, None], offs_n[None, :], times_ptr, interval)
                ddecay += tl.sum(ds * distance, 1)
            ds *= gain
            dq = accumulate(dq, ds.to(k.dtype), k, form)
    return Sums(dq, dslope, ddecay)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def dq_kernel(
    inputs, o_ptr, do_ptr, lse_ptr, lse_low_ptr, dlse_ptr,
    shift_ptr, delta_ptr, dq_ptr, dslope_ptr, ddecay_ptr,
    strides, o_strides, do_strides, dq_strides,
    num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k,
    window_left, window_right, stride_slopes, relative_far, global_prefix, dropout_bits, factors,
    ANCHORED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Writes dq = scale ds k and, for dkdv_kernel, delta = rowsum(do * o) - dlse and shift.

    shift: lse in the units of the scores, inf where a query sees nothing or where scores are large,
    for which each kernel has a loop of its own. dslope_ptr, ddecay_ptr: None, or where these Sums
    go, laid out as lse.
    """
    sizes = Sizes(num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k)
    tile = query_tile(
        tl.program_id(0), inputs, sizes, window_right is not None, ANCHORED, BLOCK_M, form
    )
    batch = tile.batch
    head = tile.head
    first_query = tile.first
    if first_query >= tile.rows:
        return

    kv_head = head // form.GROUP
    q_ptr = sequence_ptr(inputs.q, batch, head, tile.q_start, strides.q, form.ALIGN)
    k_ptr = sequence_ptr(inputs.k, batch, kv_head, tile.k_start, strides.k, form.ALIGN)
    v_ptr = sequence_ptr(inputs.v, batch, kv_head, tile.k_start, strides.v, form.ALIGN)
    o_ptr = sequence_ptr(o_ptr, batch, head, tile.q_start, o_strides, form.ALIGN)
    dq_ptr = sequence_ptr(dq_ptr, batch, head, tile.q_start, dq_strides, form.ALIGN)
    do_ptr = sequence_ptr(do_ptr, batch, head, tile.q_start, do_strides, form.ALIGN)
    row = (tl.cast(batch, tl.int64) * num_heads + head) * seqlen_q + tile.q_start
    mask_ptr = None
    if form.MASK is not None:
        mask_ptr = sequence_ptr(inputs.mask, batch, head, 0, strides.mask, 1)

    offs_m = first_query + tl.arange(0, BLOCK_M)
    is_query = rows_before(offs_m, tile.num_q, ANCHORED)
    lse = tl.load(lse_ptr + row + offs_m, mask=is_query, other=float("-inf"))
    sees = lse != float("-inf")
    do = load_rows(do_ptr, first_query, do_strides.n, sees, BLOCK_M, form, VALUES=True)
    o = load_rows(o_ptr, first_query, o_strides.n, sees, BLOCK_M, form, VALUES=True)
    natural = lse
    shift = tl.where(sees, score_units(lse, form.NATURAL), float("inf"))  # e^(s - inf) = 0
    if not form.NATURAL:
        large = has_large_scores(natural)
        shift = tl.where(large, float("inf"), shift)
    low = None
    if form.NATURAL:
        low = load_low(lse_low_ptr + row, offs_m, is_query)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row + offs_m, mask=sees, other=0.0)
    is_row = rows_before(offs_m, tile.rows, ANCHORED)
    tl.store(shift_ptr + row + offs_m, shift, mask=is_row)
    tl.store(delta_ptr + row + offs_m, delta, mask=is_row)
    q = load_rows(q_ptr, first_query, strides.q.n, sees, BLOCK_M, form)

    interval = Interval(
        tile, window_left, window_right, inputs.lo, inputs.hi, global_prefix, form.UNIT
    )
    terms = Terms(inputs, tile.sequence, relative_far, stride_slopes)
    dropout = Dropout(inputs.seed, tile.sequence, dropout_bits, factors.kept_scale)
    score = Score(interval, terms, dropout, factors)
    visit = visited_keys(first_query, interval, BLOCK_M, BLOCK_N)
    keys = Keys(k_ptr, v_ptr, mask_ptr, strides, visit.lo, visit.hi)
    queries = Queries(q, do, shift, low, delta, first_query, head)
    BLOCK_D: tl.constexpr = form.BLOCK_D
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dslope = tl.zeros([BLOCK_M], tl.float32)
    ddecay = tl.zeros([BLOCK_M], tl.float32)
    sums = Sums(dq, dslope, ddecay)
    DISTANCES: tl.constexpr = distances(dslope_ptr is not None, ddecay_ptr is not None)
    sums = over_keys(
        sums, queries, keys, natural, lse_low_ptr, row, visit, score,
        _accumulate_dq, DISTANCES, BLOCK_M, BLOCK_N, form,
    )  # fmt: skip
    dq = sums.dq * factors.scale
    store_rows(dq_ptr, first_query, dq_strides.n, dq, is_row, BLOCK_M, form)
    if dslope_ptr is not None:
        tl.store(dslope_ptr + row + offs_m, sums.dslope, mask=is_row)
    if ddecay_ptr is not None:
        tl.store(ddecay_ptr + row + offs_m, sums.ddecay, mask=is_row)
