"""The keys that a query sees, and the tiles that a tile of queries or keys visits for that."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import Tile, aligned_origin, clamp


class Interval(NamedTuple):
    """The keys that the queries of a tile's sequence see.

    A side or pointer is None where it bounds nothing, prefix where there is none. unit: None, or
    what first_tile rounds to.
    """

    tile: Tile
    window_left: Any
    window_right: Any
    lo_ptr: Any
    hi_ptr: Any
    prefix: Any
    unit: Any


class KeyRange(NamedTuple):
    """The keys that a tile of queries visits: the tiles over [begin, end).

    Tiles in [full_begin, full_end) need no mask. No key outside [lo, hi) is read.
    """

    begin: Any
    full_begin: Any
    full_end: Any
    end: Any
    lo: Any
    hi: Any


class QueryRange(NamedTuple):
    """The queries that a tile of keys visits: the tiles over [begin, end), counted from origin.

    Tiles in [full_begin, full_end) need no mask.
    """

    origin: Any
    begin: Any
    full_begin: Any
    full_end: Any
    end: Any


@triton.constexpr_function
def edge_block(block, mask):
    """Returns the side of a tile that needs masks: fewer hidden pairs, and registers for masks.

    Which tiles are edges depends on the sequence alone, and so do the order of sums and the bits.
    A tile of 128 keys stays whole, as in forward_gluon.py, which has to give the same bits.
    """
    return block // 2 if 16 < block < 128 and mask != "pairs" else block


@triton.jit
def first_tile(interval):
    """Returns where the first key tile starts: at kv_begin, or at a multiple of `unit` before it.

    Dropout draws its bytes for 16 keys at a time, and its tiles do not follow kv_start.
    """
    start = interval.tile.kv_begin
    if interval.unit is not None:
        start = start // interval.unit * interval.unit
    return start


@triton.jit
def key_interval(i, interval):
    """Returns [lo, hi), the keys that queries i see besides a global prefix; i: index or tensor."""
    lo = interval.tile.kv_begin
    hi = interval.tile.kv_end
    if interval.window_left is not None:
        lo = tl.maximum(lo, i + interval.tile.offset - interval.window_left)
    if interval.window_right is not None:
        hi = tl.minimum(hi, i + interval.tile.offset + interval.window_right + 1)
    if interval.lo_ptr is not None:
        inside = (i >= 0) & (i < interval.tile.num_q)
        lo_ptrs = interval.lo_ptr + interval.tile.first_row + i
        hi_ptrs = interval.hi_ptr + interval.tile.first_row + i
        lo = tl.maximum(lo, tl.load(lo_ptrs, mask=inside, other=0))
        hi = tl.minimum(hi, tl.load(hi_ptrs, mask=inside, other=0))
    return lo, hi


@triton.jit
def visible(i, j, interval):
    """Returns whether queries i see keys j: i [M, 1] and j [1, N], or i [1, M] and j [N, 1]."""
    lo, hi = key_interval(i, interval)
    seen = j < hi
    # Tiles start at kv_begin unless one of these is there.
    if (
        interval.window_left is not None
        or interval.lo_ptr is not None
        or interval.prefix is not None
        or interval.unit is not None
    ):
        seen = seen & (j >= lo)
    if interval.prefix is not None:
        prefix_end = interval.tile.kv_begin + interval.prefix
        in_prefix = (j < prefix_end) | (i + interval.tile.offset < prefix_end)
        seen = seen | (in_prefix & (j >= interval.tile.kv_begin) & (j < interval.tile.kv_end))
    return seen


@triton.jit
def split_range(lo, hi, full_lo, full_hi, origin, BLOCK: tl.constexpr):
    """Returns (begin, full_begin, full_end, end) of the tiles over [lo, hi), from origin <= lo.

    The tiles in [full_begin, full_end) lie inside [full_lo, full_hi) and need no mask; the others
    are edges. full_hi <= hi.
    """
    begin = origin + (lo - origin) // BLOCK * BLOCK
    end = tl.maximum(hi, begin)
    full_begin = origin + tl.cdiv(full_lo - origin, BLOCK) * BLOCK
    full_begin = clamp(full_begin, begin, end)
    full_end = origin + tl.maximum(full_hi - origin, 0) // BLOCK * BLOCK
    return begin, full_begin, tl.maximum(full_end, full_begin), end


@triton.jit
def visited_keys(first_query, interval, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the KeyRange of a tile of queries.

    With a prefix the range leaves out the keys that are seen for that alone, unless a query of the
    prefix is in the tile: then it is all keys, and all of them edges.
    """
    last_query = tl.minimum(first_query + BLOCK_M, interval.tile.num_q) - 1
    lo, full_hi = key_interval(first_query, interval)
    full_lo, hi = key_interval(last_query, interval)
    if interval.prefix is not None:
        sees_all = first_query + interval.tile.offset < interval.tile.kv_begin + interval.prefix
        lo = tl.where(sees_all, interval.tile.kv_begin, lo)
        full_lo = tl.where(sees_all, interval.tile.kv_begin, full_lo)
        full_hi = tl.where(sees_all, interval.tile.kv_begin, full_hi)
        hi = tl.where(sees_all, interval.tile.kv_end, hi)
    hi = tl.where((last_query >= first_query) & (hi > lo), hi, 0)
    begin, full_begin, full_end, end = split_range(
        lo, hi, full_lo, tl.minimum(full_hi, hi), first_tile(interval), BLOCK_N
    )
    if interval.prefix is not None:
        lo = interval.tile.kv_begin
        hi = interval.tile.kv_end
    return KeyRange(begin, full_begin, full_end, end, lo, hi)


@triton.jit
def prefix_keys_end(first_query, keys, interval):
    """Returns the end of the key tiles that a query tile visits for the prefix, before `keys`."""
    stop = tl.minimum(interval.tile.kv_begin + interval.prefix, interval.tile.kv_end)
    stop = tl.where(keys.begin < keys.end, tl.minimum(stop, keys.begin), stop)
    return tl.where(first_query < interval.tile.num_q, stop, 0)


@triton.jit
def prefix_queries_end(begin, end, interval):
    """Returns the end of the tiles over the queries of the prefix, which see every key, before the
    [begin, end) that a key tile visits.
    """
    tile = interval.tile
    stop = clamp(tile.kv_begin + interval.prefix - tile.offset, 0, tile.num_q)
    return tl.where(begin < end, tl.minimum(stop, begin), stop)


@triton.jit
def count_at_most(ptr, count, value):
    """Returns how many of the `count` numbers at ptr, which never decrease, are at most value."""
    WIDTH: tl.constexpr = 128
    found = 0
    while count > 0:
        step = tl.cdiv(count, WIDTH)
        last = tl.arange(0, WIDTH) * step + step - 1
        inside = last < count
        x = tl.load(ptr + found + last, mask=inside, other=0)
        skipped = tl.sum((inside & (x <= value)).to(tl.int32), 0) * step
        found += skipped
        count = tl.minimum(step - 1, count - skipped)
    return found


@triton.jit
def unless_hidden(visit, column):
    """Returns the QueryRange of a tile of keys, empty if the key mask `column` hides all of them.

    In a full tile every query sees a key otherwise.
    """
    end = tl.where(tl.max(column, 0) != float("-inf"), visit.end, visit.begin)
    return QueryRange(
        visit.origin, visit.begin,
        tl.minimum(visit.full_begin, end), tl.minimum(visit.full_end, end), end,
    )  # fmt: skip


@triton.jit
def seen_keys(interval):
    """Returns [lo, hi), the keys that some query sees."""
    lo, _ = key_interval(0, interval)
    _, hi = key_interval(interval.tile.num_q - 1, interval)
    if interval.prefix is not None:
        lo = interval.tile.kv_begin
        hi = tl.where(interval.tile.num_q > 0, interval.tile.kv_end, interval.tile.kv_begin)
    return lo, hi


@triton.jit
def visiting_queries(
    first_key, interval, ANCHORED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Returns the QueryRange of a tile of keys.

    ANCHORED: query tiles are counted from the query that stands at kv_begin, as they would be if
    the keys before it were not there; the first tile can then start before query 0.
    """
    num_q = interval.tile.num_q
    last_key = tl.minimum(first_key + BLOCK_N, interval.tile.kv_end) - 1
    lo = 0
    hi = num_q
    full_lo = 0
    full_hi = num_q
    if interval.window_right is not None:
        lo = tl.maximum(first_key - interval.tile.offset - interval.window_right, 0)
        full_lo = tl.maximum(last_key - interval.tile.offset - interval.window_right, 0)
    if interval.window_left is not None:
        hi = tl.minimum(last_key - interval.tile.offset + interval.window_left + 1, num_q)
        full_hi = tl.minimum(first_key - interval.tile.offset + interval.window_left + 1, num_q)
    if interval.lo_ptr is not None:
        lo_ptr = interval.lo_ptr + interval.tile.first_row
        hi_ptr = interval.hi_ptr + interval.tile.first_row
        lo = tl.maximum(lo, count_at_most(hi_ptr, num_q, first_key))
        full_lo = tl.maximum(full_lo, count_at_most(hi_ptr, num_q, last_key))
        hi = tl.minimum(hi, count_at_most(lo_ptr, num_q, last_key))
        full_hi = tl.minimum(full_hi, count_at_most(lo_ptr, num_q, first_key))
    if interval.prefix is not None:
        seen_by_all = first_key < interval.tile.kv_begin + interval.prefix
        lo = tl.where(seen_by_all, 0, lo)
        full_lo = tl.where(seen_by_all, 0, full_lo)
        full_hi = tl.where(seen_by_all, 0, full_hi)
        hi = tl.where(seen_by_all, num_q, hi)
    origin = 0
    if ANCHORED:
        origin = aligned_origin(interval.tile.kv_begin - interval.tile.offset, BLOCK_M)
    reached = (first_key + BLOCK_N > interval.tile.kv_begin) & (first_key < interval.tile.kv_end)
    hi = tl.where((hi > lo) & reached, hi, origin)
    begin, full_begin, full_end, end = split_range(
        lo, hi, full_lo, tl.minimum(full_hi, hi), origin, BLOCK_M
    )
    return QueryRange(origin, begin, full_begin, full_end, end)
