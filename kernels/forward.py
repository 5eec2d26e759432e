"""Forward attention: one program per query tile, online softmax over its key tiles."""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from .configs import TileConfig, tile_config
from .interval import (
    Interval,
    edge_block,
    first_tile,
    prefix_keys_end,
    visited_keys,
)
from .launch import KernelProblem, empty_like
from .parameters import NOT_SPECIALIZED, Sizes
from .score import (
    LARGE,
    NARROW,
    Keys,
    accumulate,
    drop_unseen,
    first_masked_key,
    first_maximum,
    key_bias,
    load_rows,
    log_sum_exp,
    mask_scores,
    online_softmax,
    pair_bias,
    sequence_ptr,
    store_rows,
)
from .terms import Dropout, Score, Terms, kept_pairs, modified, score_factor, with_terms
from .tiles import query_tile, rows_before


@triton.jit
def _attend(
    acc, m_i, l_i, rows, q, keys, begin, end, first_query, head, score,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Folds the key tiles of [begin, end) into (acc, m, l), and returns these.

    rows: None for all rows, or bool [BLOCK_M], those of large scores, which alone see anything.
    """
    NATURAL: tl.constexpr = form.NATURAL or rows is not None
    STAGES: tl.constexpr = None if rows is None else 1
    offs_m = first_query + tl.arange(0, BLOCK_M)
    if begin < end:  # see _accumulate_dkdv
        for n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
            offs_n = n + tl.arange(0, BLOCK_N)
            keep = None
            bias = None
            if MASKED:
                keep = (offs_n >= keys.lo) & (offs_n < keys.hi)
            k = load_rows(keys.k_ptr, n, keys.strides.k.n, keep, BLOCK_N, form)
            s = tl.dot(q, tl.trans(k), input_precision=form.PRECISION)
            s, _ = modified(s, score)
            if MASKED and form.MASK == "keys":
                # Read after the product, so that the mask takes no registers during it.
                column = key_bias(
                    keys.mask_ptr, offs_n, keys.strides.mask.n, keep, form.IS_BIAS, NATURAL
                )
                keep = column != float("-inf")
                if form.IS_BIAS:
                    bias = column[None, :]
            if MASKED:
                s, values = mask_scores(
                    s, offs_m[:, None], offs_n[None, :], keep[None, :],  # type: ignore[index]
                    score.interval, keys.mask_ptr, keys.strides.mask, form,
                )  # fmt: skip
                if form.MASK == "pairs" and form.IS_BIAS:
                    bias = pair_bias(values, NATURAL)
            if rows is not None:
                s = tl.where(rows[:, None], s, float("-inf"))
            if form.TERMS:
                bias = with_terms(bias, offs_m[:, None], offs_n[None, :], head, score, NATURAL)
            factor = score_factor(score, NATURAL)
            p, alpha, m_i = online_softmax(m_i, s, factor, bias, MASKED, NATURAL)
            v = load_rows(keys.v_ptr, n, keys.strides.v.n, keep, BLOCK_N, form, VALUES=True)
            if MASKED and form.MASK == "pairs":
                v = drop_unseen(v, s)
            kept = p
            if score.dropout.seed_ptr is not None:
                is_kept = kept_pairs(first_query, n, head, score.dropout, BLOCK_M, BLOCK_N)
                kept = tl.where(is_kept, p, 0.0)
            acc = accumulate(acc * alpha[:, None], kept.to(v.dtype), v, form)
            l_i = l_i * alpha + tl.sum(p, 1)
    return acc, m_i, l_i


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _forward_kernel(
    inputs, o_ptr, lse_ptr, lse_low_ptr, strides, o_strides,
    num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k,
    window_left, window_right, stride_slopes, relative_far, global_prefix, dropout_bits, factors,
    ANCHORED: tl.constexpr, ONLY_LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Writes o, lse and lse_low. ONLY_LARGE: only the rows that forward_gluon.py left, lse NaN."""
    sizes = Sizes(num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k)
    tile = query_tile(
        tl.program_id(0), inputs, sizes, window_right is not None, ANCHORED, BLOCK_M, form
    )
    batch = tile.batch
    head = tile.head
    first_query = tile.first
    if first_query >= tile.rows:
        return
    if ONLY_LARGE:  # a tile without such a row ends here
        mine = first_query + tl.arange(0, BLOCK_M)
        at = (tl.cast(batch, tl.int64) * num_heads + head) * seqlen_q + mine
        found = tl.load(lse_ptr + at, mask=mine < tile.rows, other=0.0)
        if tl.max((found != found).to(tl.int32), 0) == 0:
            tl.store(lse_low_ptr + at, tl.zeros([BLOCK_M], tl.float32), mask=mine < tile.rows)
            return

    kv_head = head // form.GROUP
    q_ptr = sequence_ptr(inputs.q, batch, head, tile.q_start, strides.q, form.ALIGN)
    k_ptr = sequence_ptr(inputs.k, batch, kv_head, tile.k_start, strides.k, form.ALIGN)
    v_ptr = sequence_ptr(inputs.v, batch, kv_head, tile.k_start, strides.v, form.ALIGN)
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
    keys = Keys(k_ptr, v_ptr, mask_ptr, strides, visit.lo, visit.hi)
    offs_m = first_query + tl.arange(0, BLOCK_M)
    is_query = rows_before(offs_m, tile.num_q, ANCHORED)
    q = load_rows(q_ptr, first_query, strides.q.n, is_query, BLOCK_M, form)
    BLOCK_V: tl.constexpr = form.BLOCK_V
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    m_i = first_maximum(BLOCK_M, form.NATURAL)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    EDGE_N: tl.constexpr = edge_block(BLOCK_N, form.MASK)
    STARTS_MASKED: tl.constexpr = (
        window_left is not None or inputs.lo is not None or form.UNIT is not None
    )
    begin = visit.begin
    full_end = visit.full_end
    if not ONLY_LARGE:
        if global_prefix is not None:
            acc, m_i, l_i = _attend(
                acc, m_i, l_i, None, q, keys,
                first_tile(interval), prefix_keys_end(first_query, visit, interval),
                first_query, head, score, True, BLOCK_M, EDGE_N, form,
            )  # fmt: skip
        if form.MASK != "pairs":
            if STARTS_MASKED:
                acc, m_i, l_i = _attend(
                    acc, m_i, l_i, None, q, keys, begin, visit.full_begin,
                    first_query, head, score, True, BLOCK_M, EDGE_N, form,
                )  # fmt: skip
            if form.MASK == "keys":
                masked = first_masked_key(
                    mask_ptr, strides.mask.n, visit.full_begin, full_end, form.IS_BIAS
                )
                full_end = visit.full_begin + (masked - visit.full_begin) // BLOCK_N * BLOCK_N
            acc, m_i, l_i = _attend(
                acc, m_i, l_i, None, q, keys, visit.full_begin, full_end,
                first_query, head, score, False, BLOCK_M, BLOCK_N, form,
            )  # fmt: skip
            begin = full_end
        acc, m_i, l_i = _attend(
            acc, m_i, l_i, None, q, keys, begin, visit.end,
            first_query, head, score, True, BLOCK_M, EDGE_N, form,
        )  # fmt: skip

    row = (tl.cast(batch, tl.int64) * num_heads + head) * seqlen_q + tile.q_start
    lse_ptr += row
    lse_low_ptr += row
    is_row = rows_before(offs_m, tile.rows, ANCHORED)
    lse, low = log_sum_exp(m_i, l_i, form.NATURAL)
    if not form.NATURAL:
        large = is_query & ~((m_i > -LARGE) & (m_i < LARGE))
        if ONLY_LARGE:
            lse = tl.load(lse_ptr + offs_m, mask=is_query, other=0.0)
            large = lse != lse
        if tl.max(large.to(tl.int32), 0) != 0:
            first = visit.begin
            last = visit.end
            if global_prefix is not None:
                first = first_tile(interval)
                last = tl.maximum(last, prefix_keys_end(first_query, visit, interval))
            acc, m_i, l_i = _attend(
                tl.where(large[:, None], 0.0, acc), tl.where(large, float("-inf"), 0.0),
                tl.where(large, 0.0, l_i), large, q, keys, first, last,
                first_query, head, score, True, BLOCK_M, NARROW, form,
            )  # fmt: skip
            natural, natural_low = log_sum_exp(m_i, l_i, True)
            lse = tl.where(large, natural, lse)
            low = tl.where(large, natural_low, low)

    empty = (l_i == 0.0) | ~rows_before(offs_m, tile.num_q, ANCHORED)
    factor = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, l_i))
    if dropout.seed_ptr is not None:
        factor *= dropout.kept_scale
    o = factor[:, None] * acc
    o_ptr = sequence_ptr(o_ptr, batch, head, tile.q_start, o_strides, form.ALIGN)
    tl.store(lse_low_ptr + offs_m, tl.where(empty, 0.0, low), mask=is_row)
    if ONLY_LARGE:
        is_row = large
    store_rows(o_ptr, first_query, o_strides.n, o, is_row, BLOCK_M, form, VALUES=True)
    tl.store(lse_ptr + offs_m, tl.where(empty, float("-inf"), lse), mask=is_row)


def attention_forward(call: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (o, lse, lse_low) of dense (B, H, N, D) or packed (T, H, D) attention.

    call has the fields of backends.call.Arguments. o has q's type and the width
    of v, lse is fp32 (B, H, Nq) or (H, T), natural log; a query that sees no key gives 0 and -inf.
    lse_low is what rounding took from lse, 0 in 16 bits where no score is large.
    """
    problem = KernelProblem(call)
    if gains_by_gluon(problem):
        o, lse = gluon_module().launch_forward(problem)
        return o, lse, _launch(problem, LARGE_ROWS, o, lse, only_large=True)
    o, lse = problem.empty_output(), problem.empty_lse()
    config = tile_config("forward", *problem.layout.config_key)
    return o, lse, _launch(problem, config, o, lse, only_large=False)


def _launch(
    problem: KernelProblem, config: TileConfig, o: torch.Tensor, lse: torch.Tensor, only_large: bool
) -> torch.Tensor:
    """Writes o and lse, or their rows that forward_gluon.py has left; returns lse_low."""
    layout = problem.layout
    lse_low = empty_like(lse)
    if o.numel() > 0:
        problem.launch(
            _forward_kernel,
            config,
            layout.num_query_tiles(config.block_m),
            layout.num_heads,
            o_ptr=o,
            lse_ptr=lse,
            lse_low_ptr=lse_low,
            o_strides=layout.o_strides,
            ANCHORED=layout.anchors_queries,
            ONLY_LARGE=only_large,
        )
    return lse_low


# The tile of the launch after forward_gluon.py. Most programs of that launch end at once, which a
# small tile suits: four or more share a multiprocessor. Rows are spread over warps as in
# forward_gluon.py, for the same bits.
LARGE_ROWS = TileConfig(128, 32, 8, 1)

# FLOP from which forward_gluon.py serves a call. Its descriptors and its launch cost the host some
# 0.25 ms: on an H200 a call of 2^37 FLOP (N 1024, full) was 1.14 times as fast as by forward.py,
# one of 2^36 (N 512, full, or N 1024, causal) 0.8 times.
LEAST_WORK = 2**37


def gains_by_gluon(problem: KernelProblem) -> bool:
    """Returns whether forward_gluon.py takes a call and is faster; it gives the same bits."""
    layout, call = problem.layout, problem.call
    capability, head_dim, dtype, kind = layout.config_key
    if kind != "plain" or layout.packed or head_dim != 128 or dtype.itemsize != 2:
        return False
    pairs = layout.seqlen_q * layout.seqlen_k // (1 if call.window_right < 0 else 2)
    work = 4 * head_dim * pairs * layout.num_heads * layout.batch
    if capability[0] != 9 or work < LEAST_WORK:
        return False
    gluon = gluon_module()
    return gluon is not None and gluon.unsupported(call) is None


@lru_cache
def gluon_module() -> Any:
    """Returns forward_gluon.py, or None where Triton is too old for it or interprets kernels."""
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < (3, 6) or not isinstance(_forward_kernel, JITFunction):
        return None
    try:
        from . import forward_gluon
    except ImportError:
        return None
    return forward_gluon
