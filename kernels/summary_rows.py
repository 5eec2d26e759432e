"""Numbers by query of its weights, by query tiles: the entropy, the largest, the k largest."""

import triton
import triton.language as tl

from .interval import Interval, visited_keys
from .parameters import NOT_SPECIALIZED, Sizes
from .ranges import over_keys
from .score import Keys, Queries, exact_sum, key_bias, load_low, load_rows, sequence_ptr
from .terms import Dropout, Score, Terms
from .tiles import query_tile, rows_before
from .weights import log_weights

# The numbers that clinattn.backends.call gives to reductions
ENTROPY, MAX, TOPK = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
NOWHERE = tl.constexpr(2**31 - 1)  # after every place


@triton.jit
def _insert_largest(best, places, x, offs_n):
    """Returns (best, places) [M, K], in no order, of the K largest of before and of 2^x [M, N].

    offs_n: the places of x, all after those in `places`. Of equal weights the first stay.
    """
    least = tl.min(best, 1)
    if tl.max((tl.exp2(tl.max(x, 1)) > least).to(tl.int32), 0) != 0:
        p = tl.exp2(x)
        largest = tl.max(p, 1)
        rises = largest > least
        while tl.max(rises.to(tl.int32), 0) != 0:
            # The first place of `largest`, and the last slot of the least of `best`, which it takes
            at = tl.min(tl.where(p == largest[:, None], offs_n[None, :], NOWHERE), 1)
            last = tl.max(tl.where(best == least[:, None], places, -1), 1)
            slot = (places == last[:, None]) & rises[:, None]
            best = tl.where(slot, largest[:, None], best)
            places = tl.where(slot, at[:, None], places)
            p = tl.where(offs_n[None, :] == at[:, None], 0.0, p)
            least = tl.min(best, 1)
            largest = tl.max(p, 1)
            rises = largest > least
    return best, places


@triton.jit
def _fold_keys(
    sums, queries, keys, begin, end, score,
    REDUCE: tl.constexpr, LARGE_ROWS: tl.constexpr, UNGUARDED: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Returns `sums` with the key tiles of [begin, end) added: a STEP of ranges.py, of natural
    scores.

    sums: for ENTROPY (the sum of p log2 p, what rounding took from it); for MAX (the largest log2
    p, zeros); for TOPK those of _insert_largest.
    """
    tl.static_assert(not LARGE_ROWS, "natural scores need no rows of their own")
    first, second = sums
    offs_m = queries.first + tl.arange(0, BLOCK_M)
    low = None
    if queries.low is not None:
        low = queries.low[:, None]
    for n in tl.range(begin, end, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        keep = None
        seen = None
        bias = None
        if MASKED:
            keep = (offs_n >= keys.lo) & (offs_n < keys.hi)
            if form.MASK == "keys":
                column = key_bias(
                    keys.mask_ptr, offs_n, keys.strides.mask.n, keep, form.IS_BIAS, True
                )
                keep = column != float("-inf")
                if form.IS_BIAS:
                    bias = column[None, :]
            seen = keep[None, :]
        k = load_rows(keys.k_ptr, n, keys.strides.k.n, keep, BLOCK_N, form)
        s = tl.dot(queries.q, tl.trans(k), input_precision=form.PRECISION)
        x, _, _ = log_weights(
            s, offs_m[:, None], offs_n[None, :], seen, bias, queries.shift[:, None], low,
            queries.head, keys.mask_ptr, keys.strides.mask, score, MASKED, True, form,
        )  # fmt: skip
        if REDUCE == ENTROPY:
            p = tl.exp2(x)
            first, lost = exact_sum(first, tl.sum(tl.where(p == 0, 0.0, p * x), 1))
            second += lost
        elif REDUCE == MAX:
            first = tl.maximum(first, tl.max(x, 1))
        else:
            first, second = _insert_largest(first, second, x, offs_n)
    return first, second


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "top"])
def summary_rows_kernel(
    inputs, lse_ptr, lse_low_ptr, values_ptr, places_ptr, strides,
    num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k,
    window_left, window_right, stride_slopes, relative_far, global_prefix, dropout_bits, factors,
    top,
    REDUCE: tl.constexpr, SLOTS: tl.constexpr, ANCHORED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Writes a number for each query, or its `top` <= SLOTS largest weights and their keys' places.

    values_ptr: fp32, laid out as lse, with `top` in a last dimension for TOPK. places_ptr: int64,
    like it, or None.
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
    row = (tl.cast(batch, tl.int64) * num_heads + head) * seqlen_q + tile.q_start
    mask_ptr = None
    if form.MASK is not None:
        mask_ptr = sequence_ptr(inputs.mask, batch, head, 0, strides.mask, 1)

    offs_m = first_query + tl.arange(0, BLOCK_M)
    is_query = rows_before(offs_m, tile.num_q, ANCHORED)
    lse = tl.load(lse_ptr + row + offs_m, mask=is_query, other=float("-inf"))
    sees = lse != float("-inf")
    shift = tl.where(sees, lse, float("inf"))  # e^(s - inf) = 0
    low = None
    if lse_low_ptr is not None:
        low = load_low(lse_low_ptr + row, offs_m, sees)
    q = load_rows(q_ptr, first_query, strides.q.n, sees, BLOCK_M, form)

    interval = Interval(
        tile, window_left, window_right, inputs.lo, inputs.hi, global_prefix, form.UNIT
    )
    terms = Terms(inputs, tile.sequence, relative_far, stride_slopes)
    dropout = Dropout(inputs.seed, tile.sequence, dropout_bits, factors.kept_scale)
    score = Score(interval, terms, dropout, factors)
    visit = visited_keys(first_query, interval, BLOCK_M, BLOCK_N)
    keys = Keys(k_ptr, None, mask_ptr, strides, visit.lo, visit.hi)
    queries = Queries(q, None, shift, low, None, first_query, head)
    if REDUCE == TOPK:
        # Places of slots without a weight differ, so that one is filled at a time.
        slots = tl.zeros([BLOCK_M, 1], tl.int32) + tl.arange(0, SLOTS)[None, :]
        first = tl.zeros([BLOCK_M, SLOTS], tl.float32)
        second = NOWHERE - SLOTS + slots
    else:
        first = tl.zeros([BLOCK_M], tl.float32)
        second = tl.zeros([BLOCK_M], tl.float32)
        if REDUCE == MAX:
            first += float("-inf")
    first, second = over_keys(
        (first, second), queries, keys, lse, lse_low_ptr, row, visit, score,
        _fold_keys, REDUCE, BLOCK_M, BLOCK_N, form,
    )  # fmt: skip

    is_row = rows_before(offs_m, tile.rows, ANCHORED)
    at = row + offs_m
    if REDUCE == ENTROPY:
        LN2: tl.constexpr = 0.6931471805599453
        tl.store(values_ptr + at, -LN2 * (first + second), mask=is_row)
    elif REDUCE == MAX:
        largest = tl.where(lse == lse, tl.exp2(first), lse)  # reductions leave NaN out
        tl.store(values_ptr + at, largest, mask=is_row)
    else:
        for i in range(top):
            largest = tl.max(first, 1)
            place = tl.min(tl.where(first == largest[:, None], second, NOWHERE), 1)
            taken = second == place[:, None]
            tl.store(values_ptr + at * top + i, tl.where(lse == lse, largest, lse), mask=is_row)
            place = tl.where(largest > 0, place, -1).to(tl.int64)
            tl.store(places_ptr + at * top + i, place, mask=is_row)
            first = tl.where(taken, -1.0, first)
