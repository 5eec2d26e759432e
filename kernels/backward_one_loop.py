"""Backward attention of plain dense 16-bit calls in kernels of one loop each, for warps with roles.

What forward_one_loop.py is to forward.py this is to dq.py and dkdv.py, and what its docstring says
of Triton holds here. The sums of a row are a kernel of their own: beside a specialised loop they
can only be read by descriptors. No call is routed here.
"""

import contextvars
from typing import Any

import torch
import triton
import triton.language as tl

from .configs import TileConfig
from .forward_one_loop import has_edges, rows_descriptor, set_allocator, why_not
from .launch import NOT_SPECIALIZED, Problem
from .score import exponential, load_rows, score_units, sequence_ptr, store_rows
from .tiles import key_tile, query_tile, seen_keys, visible, visited_keys, visiting_queries

# Tiles by head dim, the first one the best by what it compiles to; none takes stack for sm_90.
DQ_TILES = {
    64: (TileConfig(128, 128, 4, 2), TileConfig(128, 64, 4, 3)),
    128: (TileConfig(128, 64, 4, 2), TileConfig(128, 32, 4, 3)),
}
DKDV_TILES = {
    64: (TileConfig(64, 128, 4, 2), TileConfig(64, 128, 4, 3)),
    128: (TileConfig(32, 128, 4, 2), TileConfig(32, 128, 4, 3)),
}
SUMS_TILE = TileConfig(128, 64, 8, 1)
UNIT = 4  # of the rows of a head's sums: descriptors start at multiples of 16 bytes


@triton.jit
def sums_descriptor(ptr, batch, head, num_heads, row_stride, end, BLOCK: tl.constexpr):
    """A descriptor of one number a query of a head, 0 from query `end` on."""
    ptr += (tl.cast(batch, tl.int64) * num_heads + head) * row_stride
    return tl.make_tensor_descriptor(ptr, [tl.maximum(end, 1)], [1], [BLOCK])


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _sums_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, o_ptr, do_ptr, lse_ptr, shift_ptr, delta_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr, lo_ptr, hi_ptr,
    times_ptr, decay_ptr, slopes_ptr, relative_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_ob, stride_oh, stride_on, stride_dob, stride_doh, stride_don, stride_slopes,
    stride_sums,
    num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k, window_left, window_right, qk_scale,
    cap_scale, relative_far, global_prefix, dropout_bits, kept_scale,
    GROUP: tl.constexpr, IS_PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    MASK: tl.constexpr, IS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """shift and delta of dq_kernel, without dlse."""
    batch, _, head, first_query, _, _, _, num_q, _, _ = query_tile(
        tl.program_id(0), num_tiles, num_heads,
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr,
        num_seqs, seqlen_q, seqlen_k, IS_PACKED, False, BLOCK_M,
    )  # fmt: skip
    o_ptr = sequence_ptr(o_ptr, batch, head, 0, stride_ob, stride_oh, stride_on, ALIGN)
    do_ptr = sequence_ptr(do_ptr, batch, head, 0, stride_dob, stride_doh, stride_don, ALIGN)
    row = tl.cast(batch, tl.int64) * num_heads + head
    offs_m = first_query + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + row * seqlen_q + offs_m, mask=offs_m < num_q, other=float("-inf"))
    sees = lse != float("-inf")
    do = load_rows(do_ptr, first_query, stride_don, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)
    o = load_rows(o_ptr, first_query, stride_on, sees, ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D)
    shift = tl.where(sees, score_units(lse, EXACT), float("inf"))
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(shift_ptr + row * stride_sums + offs_m, shift, mask=offs_m < seqlen_q)
    tl.store(delta_ptr + row * stride_sums + offs_m, delta, mask=offs_m < seqlen_q)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _one_loop_dq_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, do_ptr, shift_ptr, delta_ptr, dq_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr, lo_ptr, hi_ptr,
    times_ptr, decay_ptr, slopes_ptr, relative_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_ob, stride_oh, stride_on, stride_dob, stride_doh, stride_don, stride_slopes,
    stride_sums,
    num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k, window_left, window_right, qk_scale, scale,
    cap_scale, relative_far, global_prefix, dropout_bits, kept_scale,
    GROUP: tl.constexpr, IS_PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    MASK: tl.constexpr, IS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """dq = scale ds k, laid out as o."""
    batch, _, head, first_query, _, _, rows, num_q, kv_begin, kv_end = query_tile(
        tl.program_id(0), num_tiles, num_heads,
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr,
        num_seqs, seqlen_q, seqlen_k, IS_PACKED, window_right is not None, BLOCK_M,
    )  # fmt: skip
    kv_head = head // GROUP
    q_ptr = sequence_ptr(q_ptr, batch, head, 0, stride_qb, stride_qh, stride_qn, ALIGN)
    k_ptr = sequence_ptr(k_ptr, batch, kv_head, 0, stride_kb, stride_kh, stride_kn, ALIGN)
    v_ptr = sequence_ptr(v_ptr, batch, kv_head, 0, stride_vb, stride_vh, stride_vn, ALIGN)
    do_ptr = sequence_ptr(do_ptr, batch, head, 0, stride_dob, stride_doh, stride_don, ALIGN)
    dq_ptr = sequence_ptr(dq_ptr, batch, head, 0, stride_ob, stride_oh, stride_on, ALIGN)
    interval = (
        (kv_end - num_q) if BOTTOM_RIGHT else 0, kv_begin, kv_end, window_left, window_right,
        lo_ptr, hi_ptr, 0, num_q, global_prefix, None,
    )  # fmt: skip
    begin, _, _, end, key_lo, key_hi = visited_keys(first_query, num_q, interval, BLOCK_M, BLOCK_N)
    k_rows = rows_descriptor(k_ptr, key_lo, key_hi, stride_kn, HEAD_DIM, BLOCK_N, BLOCK_D)
    v_rows = rows_descriptor(v_ptr, key_lo, key_hi, stride_vn, HEAD_DIM, BLOCK_N, BLOCK_D)
    q_rows = rows_descriptor(q_ptr, 0, num_q, stride_qn, HEAD_DIM, BLOCK_M, BLOCK_D)
    do_rows = rows_descriptor(do_ptr, 0, num_q, stride_don, HEAD_DIM, BLOCK_M, BLOCK_D)
    shifts = sums_descriptor(shift_ptr, batch, head, num_heads, stride_sums, num_q, BLOCK_M)
    deltas = sums_descriptor(delta_ptr, batch, head, num_heads, stride_sums, num_q, BLOCK_M)
    q = q_rows.load([first_query, 0])
    do = do_rows.load([first_query, 0])
    shift = shifts.load([first_query])
    delta = deltas.load([first_query])
    offs_m = first_query + tl.arange(0, BLOCK_M)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in tl.range(begin, end, BLOCK_N, warp_specialize=True):
        k = k_rows.load([n - key_lo, 0])
        s = tl.dot(q, tl.trans(k))
        if MASKED:
            offs_n = n + tl.arange(0, BLOCK_N)
            seen = visible(offs_m[:, None], offs_n[None, :], interval)
            s = tl.where(seen, s, float("-inf"))
        p = exponential(s, qk_scale, None, shift[:, None], EXACT)
        v = v_rows.load([n - key_lo, 0])
        dp = tl.dot(do, tl.trans(v))
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    store_rows(
        dq_ptr, first_query, stride_on, dq * scale, offs_m < rows,
        ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _one_loop_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, do_ptr, shift_ptr, delta_ptr, dk_ptr, dv_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr, lo_ptr, hi_ptr,
    times_ptr, decay_ptr, slopes_ptr, relative_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_dob, stride_doh, stride_don, stride_dkb, stride_dkh, stride_dkn, stride_slopes,
    stride_sums,
    num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k, window_left, window_right, qk_scale, scale,
    cap_scale, relative_far, global_prefix, dropout_bits, kept_scale,
    GROUP: tl.constexpr, IS_PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    MASK: tl.constexpr, IS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """dk = scale ds^T q and dv = p^T do, of calls with as many heads of queries as of keys."""
    batch, _, head, first_key, _, _, rows, num_q, kv_begin, kv_end = key_tile(
        tl.program_id(0), num_tiles, num_heads,
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr,
        num_seqs, seqlen_q, seqlen_k, IS_PACKED, False, BLOCK_N,
    )  # fmt: skip
    q_ptr = sequence_ptr(q_ptr, batch, head, 0, stride_qb, stride_qh, stride_qn, ALIGN)
    k_ptr = sequence_ptr(k_ptr, batch, head, 0, stride_kb, stride_kh, stride_kn, ALIGN)
    v_ptr = sequence_ptr(v_ptr, batch, head, 0, stride_vb, stride_vh, stride_vn, ALIGN)
    do_ptr = sequence_ptr(do_ptr, batch, head, 0, stride_dob, stride_doh, stride_don, ALIGN)
    dk_ptr = sequence_ptr(dk_ptr, batch, head, 0, stride_dkb, stride_dkh, stride_dkn, ALIGN)
    dv_ptr = sequence_ptr(dv_ptr, batch, head, 0, stride_dkb, stride_dkh, stride_dkn, ALIGN)
    interval = (
        (kv_end - num_q) if BOTTOM_RIGHT else 0, kv_begin, kv_end, window_left, window_right,
        lo_ptr, hi_ptr, 0, num_q, global_prefix, None,
    )  # fmt: skip
    _, begin, _, _, end = visiting_queries(first_key, num_q, interval, False, BLOCK_M, BLOCK_N)
    seen_lo, seen_hi = seen_keys(num_q, interval)
    k_rows = rows_descriptor(k_ptr, 0, seen_hi, stride_kn, HEAD_DIM, BLOCK_N, BLOCK_D)
    v_rows = rows_descriptor(v_ptr, 0, seen_hi, stride_vn, HEAD_DIM, BLOCK_N, BLOCK_D)
    q_rows = rows_descriptor(q_ptr, 0, num_q, stride_qn, HEAD_DIM, BLOCK_M, BLOCK_D)
    do_rows = rows_descriptor(do_ptr, 0, num_q, stride_don, HEAD_DIM, BLOCK_M, BLOCK_D)
    shifts = sums_descriptor(shift_ptr, batch, head, num_heads, stride_sums, num_q, BLOCK_M)
    deltas = sums_descriptor(delta_ptr, batch, head, num_heads, stride_sums, num_q, BLOCK_M)
    k = k_rows.load([first_key, 0])
    v = v_rows.load([first_key, 0])
    offs_n = first_key + tl.arange(0, BLOCK_N)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for m in tl.range(begin, end, BLOCK_M, warp_specialize=True):
        q = q_rows.load([m, 0])
        shift = shifts.load([m])
        s_t = tl.dot(k, tl.trans(q))
        if MASKED:
            offs_m = m + tl.arange(0, BLOCK_M)
            seen = visible(offs_m[None, :], offs_n[:, None], interval)
            s_t = tl.where(seen, s_t, float("-inf"))
        p_t = exponential(s_t, qk_scale, None, shift[None, :], EXACT)
        do = do_rows.load([m, 0])
        delta = deltas.load([m])
        dv = tl.dot(p_t.to(do.dtype), do, dv)
        dp_t = tl.dot(v, tl.trans(do))
        ds_t = p_t * (dp_t - delta[None, :])
        dk = tl.dot(ds_t.to(q.dtype), q, dk)
    inside = (offs_n >= 0) & (offs_n < rows)
    keep = (offs_n >= seen_lo) & (offs_n < seen_hi)
    dv = tl.where(keep[:, None], dv, 0.0)
    store_rows(dv_ptr, first_key, stride_dkn, dv, inside, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)
    dk = tl.where(keep[:, None], dk * scale, 0.0)
    store_rows(dk_ptr, first_key, stride_dkn, dk, inside, ALIGN, HEAD_DIM, BLOCK_N, BLOCK_D)


Sums = tuple[torch.Tensor, torch.Tensor]


def why_not_backward(do: torch.Tensor, call: Any) -> str | None:
    """What of a backward pass this file does not serve; None if it serves it."""
    if call.cu_seqlens_q is not None or call.kv_start is not None:
        return "packed sequences, and keys that start late"
    if call.q.shape[1] != call.k.shape[1]:
        return "groups of heads"
    if do.stride(-1) != 1 or do.data_ptr() % 16 or any(x % 8 for x in do.stride()[:-1]):
        return "rows of do that do not start at multiples of 16 bytes"
    return why_not(call)


def row_sums(do: torch.Tensor, o: torch.Tensor, lse: torch.Tensor, call: Any) -> Sums:
    """(shift, delta), each (B, H, Nq rounded up): what the two kernels read of a query."""
    problem = Problem(call, others=(do,))
    layout = problem.layout
    shape = (*layout.lse_shape[:2], -(-layout.seqlen_q // UNIT) * UNIT)
    shift, delta = (lse.new_empty(shape) for _ in range(2))
    problem.launch(
        _sums_kernel,
        SUMS_TILE,
        layout.num_tiles(layout.seqlen_q, SUMS_TILE.block_m),
        layout.num_heads,
        o_ptr=o,
        lse_ptr=lse,
        **_gradient(problem, do, (shift, delta)),
        **layout.o_strides,
    )
    return shift, delta


def dq_one_loop(
    do: torch.Tensor, sums: Sums, call: Any, config: TileConfig | None = None
) -> torch.Tensor:
    """dq of attention_backward, of the calls that why_not_backward has nothing against."""
    problem = Problem(call, others=(do,))
    layout = problem.layout
    dq = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    config = config or DQ_TILES[layout.arguments["BLOCK_D"]][0]
    _launch(
        problem,
        _one_loop_dq_kernel,
        config,
        layout.num_tiles(layout.seqlen_q, config.block_m),
        dq_ptr=dq,
        scale=abs(call.scale),
        MASKED=has_edges(problem, config),
        **_gradient(problem, do, sums),
        **layout.o_strides,
    )
    return dq.neg_() if problem.negative else dq


def dkdv_one_loop(
    do: torch.Tensor, sums: Sums, call: Any, config: TileConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dk, dv) of attention_backward, of the calls that why_not_backward has nothing against."""
    problem = Problem(call, others=(do,))
    layout = problem.layout
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (call.k, call.v))
    config = config or DKDV_TILES[layout.arguments["BLOCK_D"]][0]
    _launch(
        problem,
        _one_loop_dkdv_kernel,
        config,
        layout.num_tiles(layout.seqlen_k, config.block_n),
        dk_ptr=dk,
        dv_ptr=dv,
        scale=abs(call.scale),
        MASKED=has_edges(problem, config),
        **_gradient(problem, do, sums),
        **layout.dk_strides,
    )
    return dk, dv


def _gradient(problem: Problem, do: torch.Tensor, sums: Sums) -> dict[str, Any]:
    shift, delta = sums
    return dict(
        do_ptr=do,
        shift_ptr=shift,
        delta_ptr=delta,
        stride_sums=shift.shape[-1],
        **problem.layout.do_strides,
    )


def _launch(
    problem: Problem, kernel: Any, config: TileConfig, num_tiles: int, **arguments: Any
) -> None:
    def launch() -> None:
        set_allocator(problem.device)
        problem.launch(kernel, config, num_tiles, problem.layout.num_heads, **arguments)

    contextvars.copy_context().run(launch)
