"""Forward attention of plain 16-bit calls in one loop over key tiles, for warps with roles.

On Hopper one warp group copies key tiles by TMA and two compute (`warp_specialize`), so that the
softmax of one runs beside the products of the other. Triton 3.6 takes this for a kernel of 4 warps
with one loop, no branch or early return around or in it, and operands that come by descriptors.
No call is routed here; attention_forward of forward.py serves every call, and these ones too.
"""

import contextvars
from typing import Any

import torch
import triton
import triton.language as tl

from .configs import TileConfig, block_d
from .launch import NOT_SPECIALIZED, Problem
from .score import log_sum_exp, online_softmax, sequence_ptr, store_rows
from .tiles import packed_rows, packed_tile, query_tile, visible, visited_keys

# Tiles by the columns of a tile; none of them takes stack for sm_90.
TILES = {
    16: (TileConfig(128, 128, 4, 2),),
    32: (TileConfig(128, 128, 4, 2),),
    64: (TileConfig(128, 128, 4, 2), TileConfig(128, 128, 4, 3), TileConfig(128, 64, 4, 4)),
    128: (TileConfig(128, 128, 4, 2), TileConfig(128, 64, 4, 3), TileConfig(128, 64, 4, 4)),
}
# The same loop without roles, for comparison.
TMA_TILES = {
    64: (TileConfig(128, 64, 4, 3),),
    128: (TileConfig(128, 64, 8, 3), TileConfig(64, 64, 4, 3), TileConfig(128, 128, 8, 2)),
}


@triton.jit
def _packed_tiles_kernel(
    tiles_ptr, cu_seqlens_ptr, num_seqs, total, LONGEST_LAST: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Writes (sequence, first query) of every tile slot of a packed batch, as query_tile has them.

    Beside a specialised loop Triton 3.6 takes neither the loop nor the vector loads of the search.
    """
    slot = tl.program_id(0)
    sequence, _, rows, tile = packed_tile(slot, cu_seqlens_ptr, num_seqs, total, BLOCK_M)
    tiles = tl.cdiv(rows, BLOCK_M)
    idle = (tile < 0) | (tile >= tiles)
    if LONGEST_LAST:
        tile = tiles - 1 - tile
    tl.store(tiles_ptr + 2 * slot, sequence)
    tl.store(tiles_ptr + 2 * slot + 1, tl.where(idle, rows, tile * BLOCK_M))


@triton.jit
def rows_descriptor(
    ptr, begin, end, stride, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """A descriptor of rows begin .. end; row n of a matrix is row n - begin, and 0 outside."""
    return tl.make_tensor_descriptor(
        ptr + tl.cast(begin, tl.int64) * stride,
        [tl.maximum(end - begin, 1), HEAD_DIM],
        [stride, 1],
        [BLOCK, BLOCK_D],
    )


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _one_loop_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, o_ptr, lse_ptr, tiles_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr, lo_ptr, hi_ptr,
    times_ptr, decay_ptr, slopes_ptr, relative_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_ob, stride_oh, stride_on, stride_slopes,
    num_tiles, num_heads, num_seqs, seqlen_q, seqlen_k, window_left, window_right, qk_scale,
    cap_scale, relative_far, global_prefix, dropout_bits, kept_scale,
    GROUP: tl.constexpr, IS_PACKED: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    MASK: tl.constexpr, IS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Takes the keywords of every kernel of ours, and uses those of a plain call."""
    if IS_PACKED:
        tile_ptr = tiles_ptr + 2 * (tl.program_id(0) % num_tiles)
        head = tl.program_id(0) // num_tiles
        sequence = tl.load(tile_ptr)
        first_query = tl.load(tile_ptr + 1)
        q_start, rows = packed_rows(sequence, cu_seqlens_q_ptr, num_seqs, seqlen_q)
        k_start, kv_end = packed_rows(sequence, cu_seqlens_k_ptr, num_seqs, seqlen_k)
        kv_end = tl.where(sequence < num_seqs, kv_end, 0)
        batch = 0
        kv_begin = 0
        num_q = rows
    else:
        batch, _, head, first_query, q_start, k_start, rows, num_q, kv_begin, kv_end = query_tile(
            tl.program_id(0), num_tiles, num_heads,
            cu_seqlens_q_ptr, cu_seqlens_k_ptr, q_lengths_ptr, kv_start_ptr, kv_end_ptr,
            num_seqs, seqlen_q, seqlen_k, False, window_right is not None, BLOCK_M,
        )  # fmt: skip
    kv_head = head // GROUP
    q_ptr = sequence_ptr(q_ptr, batch, head, q_start, stride_qb, stride_qh, stride_qn, ALIGN)
    k_ptr = sequence_ptr(k_ptr, batch, kv_head, k_start, stride_kb, stride_kh, stride_kn, ALIGN)
    v_ptr = sequence_ptr(v_ptr, batch, kv_head, k_start, stride_vb, stride_vh, stride_vn, ALIGN)
    o_ptr = sequence_ptr(o_ptr, batch, head, q_start, stride_ob, stride_oh, stride_on, ALIGN)
    lse_ptr += (tl.cast(batch, tl.int64) * num_heads + head) * seqlen_q + q_start

    interval = (
        (kv_end - num_q) if BOTTOM_RIGHT else 0, kv_begin, kv_end, window_left, window_right,
        lo_ptr, hi_ptr, 0, num_q, global_prefix, None,
    )  # fmt: skip
    begin, full_begin, full_end, end, key_lo, key_hi = visited_keys(
        first_query, num_q, interval, BLOCK_M, BLOCK_N
    )
    k_rows = rows_descriptor(k_ptr, key_lo, key_hi, stride_kn, HEAD_DIM, BLOCK_N, BLOCK_D)
    v_rows = rows_descriptor(v_ptr, key_lo, key_hi, stride_vn, HEAD_DIM, BLOCK_N, BLOCK_D)
    offs_m = first_query + tl.arange(0, BLOCK_M)
    q_rows = rows_descriptor(q_ptr, 0, num_q, stride_qn, HEAD_DIM, BLOCK_M, BLOCK_D)
    q = q_rows.load([first_query, 0])
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    for n in tl.range(begin, end, BLOCK_N, warp_specialize=SPECIALIZE):
        k = k_rows.load([n - key_lo, 0])
        s = tl.dot(q, tl.trans(k))
        if MASKED:
            offs_n = n + tl.arange(0, BLOCK_N)
            seen = visible(offs_m[:, None], offs_n[None, :], interval)
            s = tl.where(seen, s, float("-inf"))
        p, alpha, m_i = online_softmax(m_i, s, qk_scale, None, True, EXACT)
        v = v_rows.load([n - key_lo, 0])
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)

    empty = (l_i == 0.0) | (offs_m >= num_q)
    factor = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, l_i))
    lse = tl.where(empty, float("-inf"), log_sum_exp(m_i, l_i, EXACT))
    store_rows(
        o_ptr, first_query, stride_on, factor[:, None] * acc, offs_m < rows,
        ALIGN, HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < rows)


def why_not(call: Any) -> str | None:
    """What of a call attention_forward_one_loop does not serve; None if it serves it."""
    others = ("mask", "lo", "hi", "times", "decay", "slopes", "relative", "seed")
    found = [name for name in others if getattr(call, name) is not None]
    found += [name for name in ("softcap", "global_prefix") if getattr(call, name)]
    if found:
        return " ".join(found)
    if call.q.dtype.itemsize != 2:
        return "a type that is not of 16 bits"
    if not 16 <= block_d(call.q.shape[-1]) <= 128:
        return "a head dim over 128"
    if Problem(call).layout.arguments["ALIGN"] == 1 or any(
        x.data_ptr() % 16 for x in (call.q, call.k, call.v)
    ):
        return "rows that do not start at multiples of 16 bytes"
    return None


def attention_forward_one_loop(
    call: Any, config: TileConfig | None = None, specialize: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """attention_forward of forward.py, for the calls that `why_not` has nothing against.

    specialize: give warps their roles; otherwise the kernel is that loop with copies by TMA.
    """
    problem, q = Problem(call), call.q
    o, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), problem.empty_lse()
    if o.numel() > 0:
        config = config or TILES[problem.layout.arguments["BLOCK_D"]][0]
        # What set_allocator sets is a context variable: in a copy it holds for this launch alone.
        contextvars.copy_context().run(_launch, problem, config, o, lse, specialize)
    return o, lse


def _launch(
    problem: Problem, config: TileConfig, o: torch.Tensor, lse: torch.Tensor, specialize: bool
) -> None:
    layout, device = problem.layout, problem.device
    num_tiles, tiles = layout.num_tiles(layout.seqlen_q, config.block_m), None
    if layout.packed:
        tiles = torch.empty(num_tiles, 2, dtype=torch.int32, device=device)
        with problem.on_device():
            _packed_tiles_kernel[(num_tiles,)](
                tiles_ptr=tiles,
                cu_seqlens_ptr=problem.call.cu_seqlens_q,
                num_seqs=layout.num_seqs,
                total=layout.seqlen_q,
                LONGEST_LAST=layout.arguments["window_right"] is not None,
                BLOCK_M=config.block_m,
            )
    set_allocator(device)
    problem.launch(
        _one_loop_kernel,
        config,
        num_tiles,
        layout.num_heads,
        o_ptr=o,
        lse_ptr=lse,
        tiles_ptr=tiles,
        MASKED=has_edges(problem, config),
        SPECIALIZE=specialize,
        **layout.o_strides,
    )


def has_edges(problem: Problem, config: TileConfig) -> bool:
    """Whether some tile can hold a hidden pair; where none can, masks would change no bit."""
    call = problem.call
    bounds = (call.q_lengths, call.kv_start, call.kv_end, call.cu_seqlens_k)
    return (
        any(x is not None for x in bounds)
        or max(call.window_left, call.window_right) >= 0
        or problem.layout.seqlen_k % config.block_n > 0
    )


def set_allocator(device: torch.device) -> None:
    """Gives Triton the memory in which a kernel makes its descriptors, in this context."""
    triton.set_allocator(
        lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device)
    )
