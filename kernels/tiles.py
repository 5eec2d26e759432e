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


@triton.jit
def key_interval(i, interval):
    """[lo, hi), the keys that query i sees; i is one index or a tensor of them.

    interval: (offset, kv_begin, kv_end, window_left, window_right), a side None where unbounded.
    """
    offset, lo, hi, window_left, window_right = interval
    if window_left is not None:
        lo = tl.maximum(lo, i + offset - window_left)
    if window_right is not None:
        hi = tl.minimum(hi, i + offset + window_right + 1)
    return lo, hi


@triton.jit
def visible(i, j, interval):
    """Which queries i see which keys j: i [M, 1] and j [1, N], or i [1, M] and j [N, 1].

    Key tiles start at kv_begin, so without a left window no key lies before lo.
    """
    lo, hi = key_interval(i, interval)
    seen = j < hi
    if interval[3] is not None:
        seen = seen & (j >= lo)
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
    """split_range over the keys that the queries of a tile see, then the first and last of them."""
    last_query = tl.minimum(first_query + BLOCK_M, num_q) - 1
    lo, full_hi = key_interval(first_query, interval)
    full_lo, hi = key_interval(last_query, interval)
    hi = tl.where((last_query >= first_query) & (hi > lo), hi, 0)
    begin, full_begin, full_end, end = split_range(
        lo, hi, full_lo, tl.minimum(full_hi, hi), interval[1], BLOCK_N
    )
    return begin, full_begin, full_end, end, lo, hi


@triton.jit
def seen_keys(num_q, interval):
    """[lo, hi), the keys that some query sees."""
    lo, _ = key_interval(0, interval)
    _, hi = key_interval(num_q - 1, interval)
    return lo, hi


@triton.jit
def visiting_queries(
    first_key, num_q, interval, ANCHORED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """split_range over the queries that see some key of a tile.

    ANCHORED: query tiles are counted from the query that stands at kv_begin, as they would be if
    the keys before it were not there; the first tile can then start before query 0.
    """
    offset, kv_begin, kv_end, window_left, window_right = interval
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
    origin = 0
    if ANCHORED:
        origin = aligned_origin(kv_begin - offset, BLOCK_M)
    hi = tl.where((hi > lo) & (first_key >= kv_begin) & (first_key < kv_end), hi, origin)
    return split_range(lo, hi, full_lo, tl.minimum(full_hi, hi), origin, BLOCK_M)


@triton.jit
def query_tile(
    pid, num_tiles, num_heads,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr,
    num_seqs, seqlen_q, seqlen_k,
    IS_PACKED: tl.constexpr, LONGEST_LAST: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(batch, head, first query, row and key where the sequence starts, rows, queries, kv_begin,
    kv_end) of a program over queries. Tiles of a head are neighbours, so that they share K and V
    in L2. LONGEST_LAST: later tiles have more keys, so they go first. No tile: first query >= rows.
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
    else:
        batch = head // num_heads
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
    return batch, head, first, q_start, k_start, rows, num_q, kv_begin, kv_end


@triton.jit
def key_tile(
    pid, num_tiles, num_heads,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr,
    num_seqs, seqlen_q, seqlen_k,
    IS_PACKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As query_tile, for a program over keys; the first key can be negative, with kv_start, since
    tiles are counted from kv_begin and also cover the rows before it, to write their zeros.
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
    else:
        batch = head // num_heads
        head = head % num_heads
        q_start = 0
        k_start = 0
        rows = seqlen_k
        num_q, kv_begin, kv_end = dense_lengths(
            batch, q_lengths_ptr, kv_start_ptr, kv_end_ptr, seqlen_q, seqlen_k
        )
        first = tile * BLOCK_N
        if kv_start_ptr is not None:
            first += aligned_origin(kv_begin, BLOCK_N)
    return batch, head, first, q_start, k_start, rows, num_q, kv_begin, kv_end


@triton.jit
def aligned_origin(anchor, BLOCK: tl.constexpr):
    """The tile start in (-BLOCK, 0] of the tiling in which a tile starts at anchor."""
    remainder = anchor % BLOCK
    remainder = tl.where(remainder < 0, remainder + BLOCK, remainder)
    return tl.where(remainder > 0, remainder - BLOCK, 0)
