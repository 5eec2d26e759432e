"""Sums over queries of what the weights of a key are, by key tiles."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .dkdv import KeyTile
from .interval import Interval, seen_keys, unless_hidden, visiting_queries
from .parameters import NOT_SPECIALIZED, Sizes
from .ranges import over_queries
from .score import exact_sum, key_bias, load_by_row, load_low, load_rows, sequence_ptr
from .terms import Dropout, Score, Terms
from .tiles import key_tile
from .weights import log_weights

# The numbers that clinattn.backends.call gives to reductions
RECEIVED, GRADIENT, RELEVANCE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class WeightedRows(NamedTuple):
    """Pointers to the first row of a sequence in a query head.

    weights_ptr: of the rows, None for ones. do_ptr, do_strides: None where dp is not asked for.
    lse_low_ptr: None for zeros.
    """

    q_ptr: Any
    do_ptr: Any
    lse_ptr: Any
    lse_low_ptr: Any
    weights_ptr: Any
    mask_ptr: Any
    strides: Any
    do_strides: Any
    head: Any


@triton.jit
def _add_to_columns(
    sums, rows, keys, begin, end, score,
    REDUCE: tl.constexpr, LARGE_ROWS: tl.constexpr, UNGUARDED: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Returns (total, what rounding took from it) [N] with the query tiles of [begin, end) added: a
    STEP of ranges.py, of natural scores. They are transposed as in _accumulate_dkdv.
    """
    tl.static_assert(not LARGE_ROWS, "natural scores need no rows of their own")
    total, lost = sums
    offs_n = keys.first + tl.arange(0, BLOCK_N)
    for m in tl.range(begin, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        inside = None
        if MASKED:
            inside = (offs_m >= 0) & (offs_m < score.interval.tile.num_q)
        lse = load_by_row(rows.lse_ptr, offs_m, inside, float("-inf"))
        low = None
        if rows.lse_low_ptr is not None:
            low = load_low(rows.lse_low_ptr, offs_m, inside)[None, :]
        keep = None
        if MASKED:
            keep = lse != float("-inf")
        if rows.weights_ptr is not None:
            w = load_by_row(rows.weights_ptr, offs_m, inside, 0.0)
            keep = (lse != float("-inf")) & (w != 0)
        q = load_rows(rows.q_ptr, m, rows.strides.q.n, keep, BLOCK_M, form)
        s_t = tl.dot(keys.k, tl.trans(q), input_precision=form.PRECISION)
        x_t, s_t, _ = log_weights(
            s_t, offs_m[None, :], offs_n[:, None], keys.keep[:, None], keys.bias,
            lse[None, :], low, rows.head, rows.mask_ptr, rows.strides.mask, score,
            MASKED, True, form,
        )  # fmt: skip
        f_t = tl.exp2(x_t)
        # A row that is not read may have an infinite bias, and a row with NaN an lse of NaN.
        if keep is not None:
            f_t = tl.where(keep[None, :], f_t, 0.0)
        if MASKED:
            f_t = tl.where(s_t == float("-inf"), 0.0, f_t)
        if REDUCE != RECEIVED:
            do = load_rows(rows.do_ptr, m, rows.do_strides.n, keep, BLOCK_M, form, VALUES=True)
            dp_t = tl.dot(keys.v, tl.trans(do), input_precision=form.PRECISION)
            f_t = tl.where(f_t == 0, 0.0, f_t * dp_t)
        if REDUCE == RELEVANCE:
            f_t = tl.where(f_t < 0, 0.0, f_t)
        if rows.weights_ptr is not None:
            f_t *= w[None, :]
        total, rounded = exact_sum(total, tl.sum(f_t, 1))
        lost += rounded
    return total, lost


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def summary_columns_kernel(
    inputs, do_ptr, lse_ptr, lse_low_ptr, weights_ptr, sums_ptr, strides, do_strides,
    num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k,
    window_left, window_right, stride_slopes, relative_far, global_prefix, dropout_bits, factors,
    REDUCE: tl.constexpr, ANCHORED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Writes sum_i w_i f(p_ij, dp_ij) for each key of each query head, f by REDUCE.

    num_heads: query heads. sums_ptr: fp32, (B, H, Nk) or (H, Tk). do_ptr is read for GRADIENT and
    RELEVANCE, and so are the values.
    """
    sizes = Sizes(num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k)
    tile = key_tile(tl.program_id(0), inputs, sizes, BLOCK_N, form)
    batch = tile.batch
    head = tile.head
    first_key = tile.first
    if first_key >= tile.rows:
        return

    kv_head = head // form.GROUP
    q_ptr = sequence_ptr(inputs.q, batch, head, tile.q_start, strides.q, form.ALIGN)
    k_ptr = sequence_ptr(inputs.k, batch, kv_head, tile.k_start, strides.k, form.ALIGN)
    plane = tl.cast(batch, tl.int64) * num_heads + head
    row = plane * seqlen_q + tile.q_start
    lse_ptr += row
    if lse_low_ptr is not None:
        lse_low_ptr += row
    if weights_ptr is not None:
        weights_ptr += row
    mask_ptr = None
    if form.MASK is not None:
        mask_ptr = sequence_ptr(inputs.mask, batch, head, 0, strides.mask, 1)

    interval = Interval(
        tile, window_left, window_right, inputs.lo, inputs.hi, global_prefix, form.UNIT
    )
    terms = Terms(inputs, tile.sequence, relative_far, stride_slopes)
    dropout = Dropout(inputs.seed, tile.sequence, dropout_bits, factors.kept_scale)
    score = Score(interval, terms, dropout, factors)
    visit = visiting_queries(first_key, interval, ANCHORED, BLOCK_M, BLOCK_N)
    offs_n = first_key + tl.arange(0, BLOCK_N)
    seen_lo, seen_hi = seen_keys(interval)
    keep = (offs_n >= seen_lo) & (offs_n < seen_hi)
    bias = None
    if form.MASK == "keys":
        column = key_bias(mask_ptr, offs_n, strides.mask.n, keep, form.IS_BIAS, True)
        keep = column != float("-inf")
        if form.IS_BIAS:
            bias = tl.where(keep, column, 0.0)[:, None]
        visit = unless_hidden(visit, column)
    k = load_rows(k_ptr, first_key, strides.k.n, keep, BLOCK_N, form)
    v = None
    if REDUCE != RECEIVED:
        do_ptr = sequence_ptr(do_ptr, batch, head, tile.q_start, do_strides, form.ALIGN)
        v_ptr = sequence_ptr(inputs.v, batch, kv_head, tile.k_start, strides.v, form.ALIGN)
        v = load_rows(v_ptr, first_key, strides.v.n, keep, BLOCK_N, form, VALUES=True)
    keys = KeyTile(k, v, bias, keep, first_key)
    rows = WeightedRows(
        q_ptr, do_ptr, lse_ptr, lse_low_ptr, weights_ptr, mask_ptr, strides, do_strides, head
    )
    zero = tl.zeros([BLOCK_N], tl.float32)
    total, lost = over_queries(
        (zero, zero), rows, keys, visit, score,
        _add_to_columns, REDUCE, ANCHORED, BLOCK_M, BLOCK_N, form,
    )  # fmt: skip
    # A key that is not kept was read as 0, which does not make its p 0.
    total = tl.where(keep, total + lost, 0.0)
    inside = (offs_n >= 0) & (offs_n < tile.rows)
    tl.store(sums_ptr + plane * seqlen_k + tile.k_start + offs_n, total, mask=inside)
