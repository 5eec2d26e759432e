"""Gradients of a float mask, by its tiles, and of relative biases, by distance."""

from typing import Any

import torch
import triton
import triton.language as tl

from .configs import TileConfig
from .interval import Interval, visited_keys
from .launch import KernelProblem
from .parameters import NOT_SPECIALIZED, Sizes
from .score import Keys, Queries, key_bias, load_low, load_rows, sequence_ptr
from .terms import Dropout, Score, Terms, dropped, kept_pairs
from .tiles import dense_tile, query_tile
from .weights import log_weights

# The constexprs of mask_gradient_kernel that tell which sides of a mask broadcast.
SHARES = ("BATCHES_SHARE", "HEADS_SHARE", "QUERIES_SHARE", "KEYS_SHARE")
# One tile for all cards: these kernels recompute the scores for one number of each pair, and are
# bound by loads. At D 256 a tile of this size does not spill.
TILE = TileConfig(32, 32, 4, 1)
VALUES_TILE = TileConfig(16, 16, 4, 1)  # for values of another width than keys: TILE would spill
COPIES = 16  # of a table of relative biases; tiles of queries add to the copies by turns


@triton.jit
def _score_gradients(
    queries, keys, first_key, score,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Returns ds [BLOCK_M, BLOCK_N] of one tile, 0 for the pairs that are not seen."""
    head = queries.head
    offs_m = queries.first + tl.arange(0, BLOCK_M)
    offs_n = first_key + tl.arange(0, BLOCK_N)
    inside = (offs_n >= keys.lo) & (offs_n < keys.hi)
    bias = None
    if form.MASK == "keys":
        column = key_bias(
            keys.mask_ptr, offs_n, keys.strides.mask.n, inside, form.IS_BIAS, form.NATURAL
        )
        inside = column != float("-inf")
        if form.IS_BIAS:
            bias = column[None, :]
    k = load_rows(keys.k_ptr, first_key, keys.strides.k.n, inside, BLOCK_N, form)
    v = load_rows(keys.v_ptr, first_key, keys.strides.v.n, inside, BLOCK_N, form, VALUES=True)
    s = tl.dot(queries.q, tl.trans(k), input_precision=form.PRECISION)
    dp = tl.dot(queries.do, tl.trans(v), input_precision=form.PRECISION)
    x, s, _ = log_weights(
        s, offs_m[:, None], offs_n[None, :], inside[None, :], bias, queries.shift[:, None],
        queries.low[:, None], head, keys.mask_ptr, keys.strides.mask, score,
        True, form.NATURAL, form,
    )  # fmt: skip
    p = tl.exp2(x)
    if score.dropout.seed_ptr is not None:
        is_kept = kept_pairs(queries.first, first_key, head, score.dropout, BLOCK_M, BLOCK_N)
        dp = dropped(dp, is_kept, score.dropout)
    return tl.where(s == float("-inf"), 0.0, p * (dp - queries.delta[:, None]))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def mask_gradient_kernel(
    inputs, do_ptr, shift_ptr, lse_low_ptr, delta_ptr, dmask_ptr, strides, do_strides,
    num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k,
    window_left, window_right, stride_slopes, relative_far, global_prefix, dropout_bits, factors,
    batches, num_q_tiles, num_k_tiles,
    BATCHES_SHARE: tl.constexpr, HEADS_SHARE: tl.constexpr,
    QUERIES_SHARE: tl.constexpr, KEYS_SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Writes dmask, contiguous (B or 1, H or 1, Nq or 1, Nk or 1), in fp32.

    A program owns a tile of dmask, and sums ds over all pairs that read the tile, in a fixed order.
    """
    sizes = Sizes(num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k)
    own = tl.program_id(0) % num_tiles
    plane = tl.program_id(0) // num_tiles
    own_head = 0
    own_batch = plane
    if not HEADS_SHARE:
        own_head = plane % num_heads
        own_batch = plane // num_heads
    own_q = 0
    own_k = own
    if not QUERIES_SHARE:
        own_q = own
        own_k = 0
        if not KEYS_SHARE:
            own_q = own // num_k_tiles
            own_k = own % num_k_tiles
    tiles_here = num_q_tiles if QUERIES_SHARE else 1
    steps_here = num_k_tiles if KEYS_SHARE else 1
    heads_here = num_heads if HEADS_SHARE else 1
    batches_here = batches if BATCHES_SHARE else 1
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(0, batches_here * heads_here * tiles_here):
        batch = own_batch + at // (heads_here * tiles_here)
        head = own_head + at // tiles_here % heads_here
        first_query = (own_q + at % tiles_here) * BLOCK_M
        tile = dense_tile(batch, head, first_query, inputs, sizes, form)
        if first_query < tile.num_q:
            kv_head = head // form.GROUP
            q_ptr = sequence_ptr(inputs.q, batch, head, 0, strides.q, form.ALIGN)
            k_ptr = sequence_ptr(inputs.k, batch, kv_head, 0, strides.k, form.ALIGN)
            v_ptr = sequence_ptr(inputs.v, batch, kv_head, 0, strides.v, form.ALIGN)
            do_head = sequence_ptr(do_ptr, batch, head, 0, do_strides, form.ALIGN)
            mask_ptr = sequence_ptr(inputs.mask, batch, head, 0, strides.mask, 1)
            row = (tl.cast(batch, tl.int64) * num_heads + head) * seqlen_q
            interval = Interval(
                tile, window_left, window_right, inputs.lo, inputs.hi, global_prefix, form.UNIT
            )
            terms = Terms(inputs, batch, relative_far, stride_slopes)
            dropout = Dropout(inputs.seed, batch, dropout_bits, factors.kept_scale)
            score = Score(interval, terms, dropout, factors)
            visit = visited_keys(first_query, interval, BLOCK_M, BLOCK_N)
            begin = visit.begin
            end = visit.end
            if global_prefix is not None:
                begin = 0
                end = tile.kv_end
            keys = Keys(k_ptr, v_ptr, mask_ptr, strides, visit.lo, visit.hi)
            offs_m = first_query + tl.arange(0, BLOCK_M)
            in_range = offs_m < tile.num_q
            shift = tl.load(shift_ptr + row + offs_m, mask=in_range, other=float("inf"))
            delta = tl.load(delta_ptr + row + offs_m, mask=in_range, other=0.0)
            low = load_low(lse_low_ptr + row, offs_m, in_range)
            sees = shift != float("inf")
            q = load_rows(q_ptr, first_query, strides.q.n, sees, BLOCK_M, form)
            do = load_rows(do_head, first_query, do_strides.n, sees, BLOCK_M, form, VALUES=True)
            queries = Queries(q, do, shift, low, delta, first_query, head)
            for step in range(0, steps_here):
                first_key = (own_k + step) * BLOCK_N
                if (first_key < end) & (first_key + BLOCK_N > begin):
                    total += _score_gradients(
                        queries, keys, first_key, score, BLOCK_M, BLOCK_N, form
                    )
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


def tile_for(problem: KernelProblem) -> TileConfig:
    """Returns the tile of both kernels for a call."""
    layout = problem.layout
    return TILE if layout.value_dim == layout.head_dim else VALUES_TILE


def mask_gradient(problem: KernelProblem, gradient: dict[str, Any]) -> torch.Tensor:
    """Returns dmask in the shape and type of the mask. Memory: one more mask, in fp32."""
    mask = problem.call.mask
    share = [n == 1 for n in mask.shape]
    tile = tile_for(problem)
    q_tiles = -(-problem.layout.seqlen_q // tile.block_m)
    k_tiles = -(-problem.layout.seqlen_k // tile.block_n)
    total = torch.empty(mask.shape, dtype=torch.float32, device=mask.device)
    planes = mask.shape[0] * mask.shape[1]
    num_tiles = (1 if share[2] else q_tiles) * (1 if share[3] else k_tiles)
    arguments = dict(zip(SHARES, share, strict=True))
    problem.launch(
        mask_gradient_kernel,
        tile,
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
    inputs, do_ptr, shift_ptr, lse_low_ptr, delta_ptr, sums_ptr, strides, do_strides,
    num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k,
    window_left, window_right, stride_slopes, relative_far, global_prefix, dropout_bits, factors,
    num_buckets, sums_far, batches,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Sums ds by bucket of distances, into sums (copies, heads, buckets), which starts as 0.

    A program owns a row of sums, and adds every copies-th tile of queries of a head, in order.
    sums_far: the largest distance that has a bucket of its own.
    """
    sizes = Sizes(num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k)
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
        pid = (slot // num_tiles * num_heads + of_head) * num_tiles + slot % num_tiles
        tile = query_tile(pid, inputs, sizes, False, False, BLOCK_M, form)
        batch = tile.batch
        head = tile.head
        first_query = tile.first
        if first_query < tile.num_q:
            kv_head = head // form.GROUP
            q_ptr = sequence_ptr(inputs.q, batch, head, tile.q_start, strides.q, form.ALIGN)
            k_ptr = sequence_ptr(inputs.k, batch, kv_head, tile.k_start, strides.k, form.ALIGN)
            v_ptr = sequence_ptr(inputs.v, batch, kv_head, tile.k_start, strides.v, form.ALIGN)
            do_head = sequence_ptr(do_ptr, batch, head, tile.q_start, do_strides, form.ALIGN)
            row = (tl.cast(batch, tl.int64) * num_heads + head) * seqlen_q + tile.q_start
            mask_ptr = None
            if form.MASK is not None:
                mask_ptr = sequence_ptr(inputs.mask, batch, head, 0, strides.mask, 1)
            interval = Interval(
                tile, window_left, window_right, inputs.lo, inputs.hi, global_prefix, form.UNIT
            )
            terms = Terms(inputs, tile.sequence, relative_far, stride_slopes)
            dropout = Dropout(inputs.seed, tile.sequence, dropout_bits, factors.kept_scale)
            score = Score(interval, terms, dropout, factors)
            visit = visited_keys(first_query, interval, BLOCK_M, BLOCK_N)
            begin = visit.begin
            end = visit.end
            if global_prefix is not None:
                begin = tile.kv_begin
                end = tile.kv_end
            keys = Keys(k_ptr, v_ptr, mask_ptr, strides, visit.lo, visit.hi)
            offs_m = first_query + tl.arange(0, BLOCK_M)
            in_range = offs_m < tile.num_q
            shift = tl.load(shift_ptr + row + offs_m, mask=in_range, other=float("inf"))
            delta = tl.load(delta_ptr + row + offs_m, mask=in_range, other=0.0)
            low = load_low(lse_low_ptr + row, offs_m, in_range)
            sees = shift != float("inf")
            q = load_rows(q_ptr, first_query, strides.q.n, sees, BLOCK_M, form)
            do = load_rows(do_head, first_query, do_strides.n, sees, BLOCK_M, form, VALUES=True)
            queries = Queries(q, do, shift, low, delta, first_query, head)
            for n in range(begin // 16 * 16, end, BLOCK_N):  # kept_pairs takes multiples of 16
                ds = _score_gradients(queries, keys, n, score, BLOCK_M, BLOCK_N, form)
                # With row i turned left by i, column c holds diagonal c of the tile, or diagonal
                # c - SIDE where the turn wrapped around.
                skewed = tl.gather(ds, turned, 1)
                distance = n - first_query - interval.tile.offset
                for wrapped in tl.static_range(2):
                    of_diagonal = tl.sum(tl.where(wraps == (wrapped == 1), skewed, 0.0), 0)
                    d = distance + ring - wrapped * SIDE
                    before += tl.sum(tl.where(d <= -sums_far, of_diagonal, 0.0), 0)
                    beyond = (d >= sums_far) & (d > -sums_far)
                    after += tl.sum(tl.where(beyond, of_diagonal, 0.0), 0)
                    near = (d > -sums_far) & (d < sums_far)
                    at = sums_ptr + d + sums_far
                    tl.debug_barrier()  # for what other threads wrote in the turn before
                    tl.store(at, tl.load(at, mask=near, other=0.0) + of_diagonal, mask=near)
    tl.debug_barrier()
    if sums_far == 0:
        tl.store(sums_ptr, before + after)
    else:
        tl.store(sums_ptr, before)
        tl.store(sums_ptr + 2 * sums_far, after)


def relative_gradient(problem: KernelProblem, gradient: dict[str, Any]) -> torch.Tensor:
    """Returns the gradient of the relative biases (H, 2 L + 1).

    Memory for partial sums: COPIES of that table, cut at the longest sequence, or as many as fit
    into what q takes in fp32, if those are more.
    """
    call, layout, tile = problem.call, problem.layout, tile_for(problem)
    num_tiles = layout.num_tiles(layout.seqlen_q, tile.block_m)
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
        tile,
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
