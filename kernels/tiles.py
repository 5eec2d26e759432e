"""Which tile a program owns, and which tiles it has to visit."""

import triton
import triton.language as tl


@triton.jit
def clamp(x, low, high):
    """x limited to [low, high]; low wins where they cross."""
    return tl.maximum(tl.minimum(x, high), low)


@triton.jit
def packed_tile(slot, cu_seqlens_ptr, num_seqs, total, BLOCK: tl.constexpr):
    """(sequence, its first row, its rows, tile) of a tile slot in a packed batch.

    Sequence s owns the slots from cu_seqlens[s] // BLOCK + s on: at least as many as it has tiles,
    known without a scan or a copy to the host. A slot beyond its tiles has tile * BLOCK >= rows.
    The rows after cu_seqlens[-1] form one more sequence, number num_seqs, so that they get written.
    """
    WIDTH: tl.constexpr = 128
    first = 0
    count = num_seqs + 1
    while count > 1:
        step = tl.cdiv(count, WIDTH)
        s = first + tl.arange(0, WIDTH) * step
        inside = s < first + count
        start = tl.load(cu_seqlens_ptr + s, mask=inside, other=0)
        started = inside & (start // BLOCK + s <= slot)
        skipped = tl.maximum(tl.sum(started.to(tl.int32), 0) - 1, 0) * step
        first += skipped
        count = tl.minimum(step, count - skipped)
    start, rows = packed_rows(first, cu_seqlens_ptr, num_seqs, total)
    return first, start, rows, slot - (start // BLOCK + first)


@triton.jit
def packed_rows(sequence, cu_seqlens_ptr, num_seqs, total):
    """(first row, number of rows) of a sequence, inside [0, total) whatever cu_seqlens holds."""
    start = clamp(tl.load(cu_seqlens_ptr + sequence), 0, total)
    end = tl.load(cu_seqlens_ptr + tl.minimum(sequence + 1, num_seqs))
    end = tl.where(sequence < num_seqs, end, total)
    return start, clamp(end - start, 0, total - start)


@triton.jit
def dense_lengths(batch, q_lengths_ptr, kv_start_ptr, kv_end_ptr, seqlen_q, seqlen_k):
    """(queries, first key, end of keys) of a batch entry, inside the tensors whatever is stored."""
    num_q = seqlen_q
    if q_lengths_ptr is not None:
        num_q = clamp(tl.load(q_lengths_ptr + batch), 0, seqlen_q)
    kv_end = seqlen_k
    if kv_end_ptr is not None:
        kv_end = clamp(tl.load(kv_end_ptr + batch), 0, seqlen_k)
    kv_begin = 0
    if kv_start_ptr is not None:
        kv_begin = clamp(tl.load(kv_start_ptr + batch), 0, kv_end)
    return num_q, kv_begin, kv_end


@triton.constexpr_function
def edge_block(block, mask):
    """Side of a tile that needs masks: fewer hidden pairs, and registers for the masks.

    Which tiles are edges depends on the sequence alone, and so do the order of sums and the bits.
    A tile of 128 keys stays whole, as in forward_gluon.py, which has to give the same bits.
    """
    return block // 2 if 16 < block < 128 and mask != "pairs" else block


@triton.jit
def first_tile(interval):
    """Where the first key tile starts: at kv_begin, or a multiple of `unit` before it.

    Dropout draws its bytes for 16 keys at a time, and its tiles do not follow kv_start.
    """
    start = interval[1]
    if interval[10] is not None:
        start = start // interval[10] * interval[10]
    return start


@triton.jit
def key_interval(i, interval):
    """[lo, hi), the keys that query i sees besides a global prefix; i is one index or a tensor.

    interval: (offset, kv_begin, kv_end, window_left, window_right, lo_ptr, hi_ptr, first_row,
    num_q, prefix, unit). A side or pointer is None where it bounds nothing, prefix where there is
    none; bounds and times of the sequence start at first_row; unit is that of first_tile.
    """
    offset, lo, hi, window_left, window_right, lo_ptr, hi_ptr, first_row, num_q, _, _ = interval
    if window_left is not None:
        lo = tl.maximum(lo, i + offset - window_left)
    if window_right is not None:
        hi = tl.minimum(hi, i + offset + window_right + 1)
    if lo_ptr is not None:
        inside = (i >= 0) & (i < num_q)
        lo = tl.maximum(lo, tl.load(lo_ptr + first_row + i, mask=inside, other=0))
        hi = tl.minimum(hi, tl.load(hi_ptr + first_row + i, mask=inside, other=0))
    return lo, hi


@triton.jit
def visible(i, j, interval):
    """Which queries i see which keys j: i [M, 1] and j [1, N], or i [1, M] and j [N, 1]."""
    offset, kv_begin, kv_end, window_left, _, lo_ptr, _, _, _, prefix, unit = interval
    lo, hi = key_interval(i, interval)
    seen = j < hi
    if window_left is not None or lo_ptr is not None or prefix is not None or unit is not None:
        seen = seen & (j >= lo)  # otherwise tiles start at kv_begin
    if prefix is not None:
        in_prefix = (j < kv_begin + prefix) | (i + offset < kv_begin + prefix)
        seen = seen | (in_prefix & (j >= kv_begin) & (j < kv_end))
    return seen


@triton.jit
def split_range(lo, hi, full_lo, full_hi, origin, BLOCK: tl.constexpr):
    """(begin, full_begin, full_end, end) of the tiles over [lo, hi), counted from origin <= lo.

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
def visited_keys(first_query, num_q, interval, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """split_range over the keys that the queries of a tile see, then the first and last of them.

    With a prefix the range leaves out the keys that are seen for that alone, unless a query of the
    prefix is in the tile: then it is all keys, and all of them edges.
    """
    offset, kv_begin, kv_end, _, _, _, _, _, _, prefix, _ = interval
    last_query = tl.minimum(first_query + BLOCK_M, num_q) - 1
    lo, full_hi = key_interval(first_query, interval)
    full_lo, hi = key_interval(last_query, interval)
    if prefix is not None:
        sees_all = first_query + offset < kv_begin + prefix
        lo = tl.where(sees_all, kv_begin, lo)
        full_lo = tl.where(sees_all, kv_begin, full_lo)
        full_hi = tl.where(sees_all, kv_begin, full_hi)
        hi = tl.where(sees_all, kv_end, hi)
    hi = tl.where((last_query >= first_query) & (hi > lo), hi, 0)
    begin, full_begin, full_end, end = split_range(
        lo, hi, full_lo, tl.minimum(full_hi, hi), first_tile(interval), BLOCK_N
    )
    if prefix is not None:
        lo = kv_begin
        hi = kv_end
    return begin, full_begin, full_end, end, lo, hi


@triton.jit
def prefix_keys_end(first_query, begin, end, interval):
    """Where the key tiles end that a query tile visits for the prefix, before [begin, end)."""
    _, kv_begin, kv_end, _, _, _, _, _, num_q, prefix, _ = interval
    stop = tl.minimum(kv_begin + prefix, kv_end)
    stop = tl.where(begin < end, tl.minimum(stop, begin), stop)
    return tl.where(first_query < num_q, stop, 0)


@triton.jit
def prefix_queries_end(begin, end, interval):
    """As prefix_keys_end, for a key tile and the queries of the prefix, which see every key."""
    offset, kv_begin, _, _, _, _, _, _, num_q, prefix, _ = interval
    stop = clamp(kv_begin + prefix - offset, 0, num_q)
    return tl.where(begin < end, tl.minimum(stop, begin), stop)


@triton.jit
def count_at_most(ptr, count, value):
    """How many of the first `count` numbers at ptr, which never decrease, are at most value."""
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
def seen_keys(num_q, interval):
    """[lo, hi), the keys that some query sees."""
    _, kv_begin, kv_end, _, _, _, _, _, _, prefix, _ = interval
    lo, _ = key_interval(0, interval)
    _, hi = key_interval(num_q - 1, interval)
    if prefix is not None:
        lo = kv_begin
        hi = tl.where(num_q > 0, kv_end, kv_begin)
    return lo, hi


@triton.jit
def visiting_queries(
    first_key, num_q, interval, ANCHORED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where query tiles are counted from, and split_range over those that see some key of a tile.

    ANCHORED: query tiles are counted from the query that stands at kv_begin, as they would be if
    the keys before it were not there; the first tile can then start before query 0.
    """
    (
        offset, kv_begin, kv_end, window_left, window_right, lo_ptr, hi_ptr, first_row, _, prefix, _
    ) = interval  # fmt: skip
    last_key = tl.minimum(first_key + BLOCK_N, kv_end) - 1
    lo = 0
    hi = num_q
    full_lo = 0
    full_hi = num_q
    if window_right is not None:
        lo = tl.maximum(first_key - offset - window_right, 0)
        full_lo = tl.maximum(last_key - offset - window_right, 0)
    if window_left is not None:
        hi = tl.minimum(last_key - offset + window_left + 1, num_q)
        full_hi = tl.minimum(first_key - offset + window_left + 1, num_q)
    if lo_ptr is not None:
        lo = tl.maximum(lo, count_at_most(hi_ptr + first_row, num_q, first_key))
        full_lo = tl.maximum(full_lo, count_at_most(hi_ptr + first_row, num_q, last_key))
        hi = tl.minimum(hi, count_at_most(lo_ptr + first_row, num_q, last_key))
        full_hi = tl.minimum(full_hi, count_at_most(lo_ptr + first_row, num_q, first_key))
    if prefix is not None:
        seen_by_all = first_key < kv_begin + prefix
        lo = tl.where(seen_by_all, 0, lo)
        full_lo = tl.where(seen_by_all, 0, full_lo)
        full_hi = tl.where(seen_by_all, 0, full_hi)
        hi = tl.where(seen_by_all, num_q, hi)
    origin = 0
    if ANCHORED:
        origin = aligned_origin(kv_begin - offset, BLOCK_M)
    reached = (first_key + BLOCK_N > kv_begin) & (first_key < kv_end)
    hi = tl.where((hi > lo) & reached, hi, origin)
    begin, full_begin, full_end, end = split_range(
        lo, hi, full_lo, tl.minimum(full_hi, hi), origin, BLOCK_M
    )
    return origin, begin, full_begin, full_end, end


@triton.jit
def query_tile(
    pid, num_tiles, num_heads,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr,
    num_seqs, seqlen_q, seqlen_k, IS_PACKED: tl.constexpr, LONGEST_LAST: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, ANCHORED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(batch, sequence, head, first query, row and key where the sequence starts, rows, queries,
    kv_begin, kv_end) of a program over queries. No tile: first query >= rows.

    Tiles of a head are neighbours, so that they share K and V in L2. LONGEST_LAST: later tiles have
    more keys, so they go first. ANCHORED: as in visiting_queries, the first tile can start before
    query 0; which tiles of keys are edges then depends on the sequence, not on what stands before.
    """
    tile = pid % num_tiles
    head = pid // num_tiles
    if IS_PACKED:
        batch = 0
        sequence, q_start, rows, tile = packed_tile(
            tile, cu_seqlens_q_ptr, num_seqs, seqlen_q, BLOCK_M
        )
        k_start, kv_end = packed_rows(sequence, cu_seqlens_k_ptr, num_seqs, seqlen_k)
        kv_end = tl.where(sequence < num_seqs, kv_end, 0)
        kv_begin = 0
        num_q = rows
        tiles = tl.cdiv(rows, BLOCK_M)
        idle = (tile < 0) | (tile >= tiles)
        if LONGEST_LAST:
            tile = tiles - 1 - tile
        first = tl.where(idle, rows, tile * BLOCK_M)
        sequence = clamp(sequence, 0, num_seqs - 1)
    else:
        batch = head // num_heads
        sequence = batch
        head = head % num_heads
        q_start = 0
        k_start = 0
        rows = seqlen_q
        num_q, kv_begin, kv_end = dense_lengths(
            batch, q_lengths_ptr, kv_start_ptr, kv_end_ptr, seqlen_q, seqlen_k
        )
        if LONGEST_LAST:
            tile = num_tiles - 1 - tile
        first = tile * BLOCK_M
        if ANCHORED:
            offset = 0
            if BOTTOM_RIGHT:
                offset = kv_end - num_q
            first += aligned_origin(kv_begin - offset, BLOCK_M)
    return batch, sequence, head, first, q_start, k_start, rows, num_q, kv_begin, kv_end


@triton.jit
def key_tile(
    pid, num_tiles, num_heads,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr,
    num_seqs, seqlen_q, seqlen_k,
    IS_PACKED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As query_tile, for a program over keys; the first key can be negative, with kv_start, since
    tiles are counted from kv_begin and also cover the rows before it, to write their zeros.
    ALIGNED: they are counted from a multiple of 16 instead.
    """
    tile = pid % num_tiles
    head = pid // num_tiles
    if IS_PACKED:
        batch = 0
        sequence, k_start, rows, tile = packed_tile(
            tile, cu_seqlens_k_ptr, num_seqs, seqlen_k, BLOCK_N
        )
        q_start, num_q = packed_rows(sequence, cu_seqlens_q_ptr, num_seqs, seqlen_q)
        kv_begin = 0
        kv_end = tl.where(sequence < num_seqs, rows, 0)
        first = tl.where(tile < 0, rows, tile * BLOCK_N)
        sequence = clamp(sequence, 0, num_seqs - 1)
    else:
        batch = head // num_heads
        sequence = batch
        head = head % num_heads
        q_start = 0
        k_start = 0
        rows = seqlen_k
        num_q, kv_begin, kv_end = dense_lengths(
            batch, q_lengths_ptr, kv_start_ptr, kv_end_ptr, seqlen_q, seqlen_k
        )
        first = tile * BLOCK_N
        if kv_start_ptr is not None:
            anchor = kv_begin
            if ALIGNED:
                anchor = kv_begin // 16 * 16
            first += aligned_origin(anchor, BLOCK_N)
    return batch, sequence, head, first, q_start, k_start, rows, num_q, kv_begin, kv_end


@triton.jit
def rows_before(offs, end, ANCHORED: tl.constexpr):
    """Which of the rows are before `end`, and not before row 0, where ANCHORED tiles can start."""
    inside = offs < end
    if ANCHORED:
        inside = inside & (offs >= 0)
    return inside


@triton.jit
def aligned_origin(anchor, BLOCK: tl.constexpr):
    """The tile start in (-BLOCK, 0] of the tiling in which a tile starts at anchor."""
    remainder = anchor % BLOCK
    remainder = tl.where(remainder < 0, remainder + BLOCK, remainder)
    return tl.where(remainder > 0, remainder - BLOCK, 0)
