"""The tile that a program owns."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """A tile of the rows of one head, queries or keys, and the sequence that it belongs to.

    first: its first row, counted within the sequence as num_q, kv_begin and kv_end are; there is no
    tile where first >= rows. q_start, k_start: rows of q and of k where the sequence starts. rows:
    those of the sequence, padding included. first_row: where its bounds and times start. offset:
    key at which query 0 stands.
    """

    batch: Any
    sequence: Any
    head: Any
    first: Any
    q_start: Any
    k_start: Any
    rows: Any
    num_q: Any
    kv_begin: Any
    kv_end: Any
    first_row: Any
    offset: Any


@triton.jit
def clamp(x, low, high):
    """Returns x limited to [low, high]; low where low > high."""
    return tl.maximum(tl.minimum(x, high), low)


@triton.jit
def packed_tile(slot, cu_seqlens_ptr, num_seqs, total, BLOCK: tl.constexpr):
    """Returns (sequence, its first row, its rows, tile) of a tile slot in a packed batch.

    Sequence s owns the slots from cu_seqlens[s] // BLOCK + s on: at least as many as it has tiles,
    known without a scan or a copy to the host. A slot beyond its tiles has tile * BLOCK >= rows.
    The rows after cu_seqlens[-1] form one more sequence, number num_seqs, so that its rows get
    written.
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
    """Returns (first row, rows) of a sequence, inside [0, total) whatever cu_seqlens holds."""
    start = clamp(tl.load(cu_seqlens_ptr + sequence), 0, total)
    end = tl.load(cu_seqlens_ptr + tl.minimum(sequence + 1, num_seqs))
    end = tl.where(sequence < num_seqs, end, total)
    return start, clamp(end - start, 0, total - start)


@triton.jit
def dense_lengths(batch, inputs, sizes):
    """Returns (queries, first key, end of keys) of a batch entry, always inside the tensors."""
    num_q = sizes.seqlen_q
    if inputs.q_lengths is not None:
        num_q = clamp(tl.load(inputs.q_lengths + batch), 0, sizes.seqlen_q)
    kv_end = sizes.seqlen_k
    if inputs.kv_end is not None:
        kv_end = clamp(tl.load(inputs.kv_end + batch), 0, sizes.seqlen_k)
    kv_begin = 0
    if inputs.kv_start is not None:
        kv_begin = clamp(tl.load(inputs.kv_start + batch), 0, kv_end)
    return num_q, kv_begin, kv_end


@triton.jit
def first_key(num_q, kv_end, form: tl.constexpr):
    """Returns the key at which query 0 stands."""
    key = 0
    if form.BOTTOM_RIGHT:
        key = kv_end - num_q
    return key


@triton.jit
def dense_tile(batch, head, first, inputs, sizes, form: tl.constexpr):
    """Returns the Tile of the queries of a batch entry from row `first` on."""
    num_q, kv_begin, kv_end = dense_lengths(batch, inputs, sizes)
    return Tile(
        batch, batch, head, first, 0, 0, sizes.seqlen_q, num_q, kv_begin, kv_end,
        tl.cast(batch, tl.int64) * sizes.seqlen_q, first_key(num_q, kv_end, form),
    )  # fmt: skip


@triton.jit
def query_tile(
    pid, inputs, sizes, LONGEST_LAST: tl.constexpr, ANCHORED: tl.constexpr,
    BLOCK_M: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Returns the Tile of a program over queries.

    Tiles of a head are neighbours, so that they share K and V in L2. LONGEST_LAST: later tiles have
    more keys, and go first. ANCHORED: as in visiting_queries, the first tile can start before
    query 0; which tiles of keys are edges then depends on the sequence, not on what stands before.
    """
    tile = pid % sizes.num_tiles
    head = pid // sizes.num_tiles
    if form.IS_PACKED:
        batch = 0
        sequence, q_start, rows, tile = packed_tile(
            tile, inputs.cu_seqlens_q, sizes.num_seqs, sizes.seqlen_q, BLOCK_M
        )
        k_start, kv_end = packed_rows(sequence, inputs.cu_seqlens_k, sizes.num_seqs, sizes.seqlen_k)
        kv_end = tl.where(sequence < sizes.num_seqs, kv_end, 0)
        kv_begin = 0
        num_q = rows
        tiles = tl.cdiv(rows, BLOCK_M)
        idle = (tile < 0) | (tile >= tiles)
        if LONGEST_LAST:
            tile = tiles - 1 - tile
        first = tl.where(idle, rows, tile * BLOCK_M)
        sequence = clamp(sequence, 0, sizes.num_seqs - 1)
    else:
        batch = head // sizes.num_heads
        sequence = batch
        head = head % sizes.num_heads
        q_start = 0
        k_start = 0
        rows = sizes.seqlen_q
        num_q, kv_begin, kv_end = dense_lengths(batch, inputs, sizes)
        if LONGEST_LAST:
            tile = sizes.num_tiles - 1 - tile
        first = tile * BLOCK_M
        if ANCHORED:
            first += aligned_origin(kv_begin - first_key(num_q, kv_end, form), BLOCK_M)
    return Tile(
        batch, sequence, head, first, q_start, k_start, rows, num_q, kv_begin, kv_end,
        tl.cast(batch, tl.int64) * sizes.seqlen_q + q_start, first_key(num_q, kv_end, form),
    )  # fmt: skip


@triton.jit
def key_tile(pid, inputs, sizes, BLOCK_N: tl.constexpr, form: tl.constexpr):
    """Returns the Tile of a program over keys.

    With kv_start the first key can be negative: tiles are counted from kv_begin, or with dropout
    from a multiple of 16 before kv_begin, and also cover the rows before kv_begin, to write zeros.
    """
    tile = pid % sizes.num_tiles
    head = pid // sizes.num_tiles
    if form.IS_PACKED:
        batch = 0
        sequence, k_start, rows, tile = packed_tile(
            tile, inputs.cu_seqlens_k, sizes.num_seqs, sizes.seqlen_k, BLOCK_N
        )
        q_start, num_q = packed_rows(sequence, inputs.cu_seqlens_q, sizes.num_seqs, sizes.seqlen_q)
        kv_begin = 0
        kv_end = tl.where(sequence < sizes.num_seqs, rows, 0)
        first = tl.where(tile < 0, rows, tile * BLOCK_N)
        sequence = clamp(sequence, 0, sizes.num_seqs - 1)
    else:
        batch = head // sizes.num_heads
        sequence = batch
        head = head % sizes.num_heads
        q_start = 0
        k_start = 0
        rows = sizes.seqlen_k
        num_q, kv_begin, kv_end = dense_lengths(batch, inputs, sizes)
        first = tile * BLOCK_N
        if inputs.kv_start is not None:
            anchor = kv_begin
            if inputs.seed is not None:
                anchor = kv_begin // 16 * 16
            first += aligned_origin(anchor, BLOCK_N)
    return Tile(
        batch, sequence, head, first, q_start, k_start, rows, num_q, kv_begin, kv_end,
        tl.cast(batch, tl.int64) * sizes.seqlen_q + q_start, first_key(num_q, kv_end, form),
    )  # fmt: skip


@triton.jit
def rows_before(offs, end, ANCHORED: tl.constexpr):
    """Returns whether rows are before `end`, and not before row 0, as those of ANCHORED can be."""
    inside = offs < end
    if ANCHORED:
        inside = inside & (offs >= 0)
    return inside


@triton.jit
def aligned_origin(anchor, BLOCK: tl.constexpr):
    """Returns the tile start in (-BLOCK, 0] of the tiling in which a tile starts at anchor."""
    remainder = anchor % BLOCK
    remainder = tl.where(remainder < 0, remainder + BLOCK, remainder)
    return tl.where(remainder > 0, remainder - BLOCK, 0)
