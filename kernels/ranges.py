"""The tiles that a kernel goes over, in ranges by what they need: masks, or another arithmetic.

STEP is a kernel's own function, which returns `sums` with the tiles of one range added:

    STEP(sums, queries, keys, begin, end, score,
         WHAT, LARGE_ROWS, UNGUARDED, MASKED, BLOCK_M, BLOCK_N, form)

WHAT is handed on to it. LARGE_ROWS: over the rows of large scores alone, of which there are rarely
any. UNGUARDED: see _accumulate_dkdv. MASKED: some pairs are not seen.
"""

import triton
import triton.language as tl

from .interval import edge_block, first_tile, prefix_keys_end, prefix_queries_end
from .score import NARROW, Queries, any_large_scores, first_masked_key, has_large_scores, load_low


@triton.jit
def over_queries(
    sums, queries, keys, visit, score, STEP: tl.constexpr, WHAT: tl.constexpr,
    ANCHORED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Returns `sums` with the queries of a global prefix, then the QueryRange `visit` added."""
    interval = score.interval
    EDGE_M: tl.constexpr = edge_block(BLOCK_M, None)
    HAS_PREFIX: tl.constexpr = interval.prefix is not None
    STARTS_MASKED: tl.constexpr = (
        interval.window_right is not None or interval.lo_ptr is not None or ANCHORED
    )
    FULL_FIRST: tl.constexpr = (
        (form.NATURAL or form.GUARDED) and not form.EXACT and not STARTS_MASKED and not HAS_PREFIX
    )
    begin = visit.begin
    if not form.NATURAL:
        first = begin
        last = visit.end
        if HAS_PREFIX:
            first = visit.origin
            last = tl.maximum(last, prefix_queries_end(begin, visit.end, interval))
        found = any_large_scores(queries.lse_ptr, first, last, queries.stride_h, form.GROUP)
        last = tl.where(found, last, first)
        sums = STEP(
            sums, queries, keys, first, last, score,
            WHAT, True, not form.GUARDED, True, NARROW, BLOCK_N, form,
        )  # fmt: skip
    if HAS_PREFIX:
        sums = STEP(
            sums, queries, keys,
            visit.origin, prefix_queries_end(begin, visit.end, interval), score,
            WHAT, False, False, True, EDGE_M, BLOCK_N, form,
        )  # fmt: skip
    if form.MASK != "pairs":
        if STARTS_MASKED:
            sums = STEP(
                sums, queries, keys, begin, visit.full_begin, score,
                WHAT, False, False, True, EDGE_M, BLOCK_N, form,
            )  # fmt: skip
        sums = STEP(
            sums, queries, keys, visit.full_begin, visit.full_end, score,
            WHAT, False, FULL_FIRST, False, BLOCK_M, BLOCK_N, form,
        )  # fmt: skip
        begin = visit.full_end
    return STEP(
        sums, queries, keys, begin, visit.end, score,
        WHAT, False, False, True, EDGE_M, BLOCK_N, form,
    )  # fmt: skip


@triton.jit
def over_keys(
    sums, queries, keys, lse, lse_low_ptr, row, visit, score,
    STEP: tl.constexpr, WHAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Returns `sums` with the keys of a global prefix, then the KeyRange `visit` added, in order.

    lse: of the rows of `queries`. lse_low_ptr: to what rounding took from it, at `row` for the
    first row of the sequence.
    """
    interval = score.interval
    first_query = queries.first
    EDGE_N: tl.constexpr = edge_block(BLOCK_N, form.MASK)
    HAS_PREFIX: tl.constexpr = interval.prefix is not None
    STARTS_MASKED: tl.constexpr = (
        interval.window_left is not None or interval.lo_ptr is not None or form.UNIT is not None
    )
    FULL_FIRST: tl.constexpr = (
        (form.NATURAL or form.GUARDED) and not form.EXACT and not STARTS_MASKED and not HAS_PREFIX
    )
    if not form.NATURAL:
        first = visit.begin
        last = visit.end
        if HAS_PREFIX:
            first = first_tile(interval)
            last = tl.maximum(last, prefix_keys_end(first_query, visit, interval))
        large = has_large_scores(lse)
        last = tl.where(tl.max(large.to(tl.int32), 0) != 0, last, first)
        of_large = tl.where(large, lse, float("inf"))
        low_of_large = load_low(lse_low_ptr + row, first_query + tl.arange(0, BLOCK_M), large)
        large_rows = Queries(
            queries.q, queries.do, of_large, low_of_large, queries.delta, first_query, queries.head
        )
        sums = STEP(
            sums, large_rows, keys, first, last, score,
            WHAT, True, not form.GUARDED, True, BLOCK_M, NARROW, form,
        )  # fmt: skip
    if HAS_PREFIX:
        sums = STEP(
            sums, queries, keys,
            first_tile(interval), prefix_keys_end(first_query, visit, interval), score,
            WHAT, False, False, True, BLOCK_M, EDGE_N, form,
        )  # fmt: skip
    begin = visit.begin
    if form.MASK != "pairs":
        if STARTS_MASKED:
            sums = STEP(
                sums, queries, keys, begin, visit.full_begin, score,
                WHAT, False, False, True, BLOCK_M, EDGE_N, form,
            )  # fmt: skip
        full_begin = visit.full_begin
        full_end = visit.full_end
        if form.MASK == "keys":
            masked = first_masked_key(
                keys.mask_ptr, keys.strides.mask.n, full_begin, full_end, form.IS_BIAS
            )
            full_end = full_begin + (masked - full_begin) // BLOCK_N * BLOCK_N
        sums = STEP(
            sums, queries, keys, full_begin, full_end, score,
            WHAT, False, FULL_FIRST, False, BLOCK_M, BLOCK_N, form,
        )  # fmt: skip
        begin = full_end
    return STEP(
        sums, queries, keys, begin, visit.end, score,
        WHAT, False, False, True, BLOCK_M, EDGE_N, form,
    )  # fmt: skip
