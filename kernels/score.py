"""The pieces of the score tile: loads, masks and the base-2 online softmax."""

import triton
import triton.language as tl

from .tiles import visible


@triton.jit
def tile_ptrs(
    ptr, start, stride,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pointers to rows start .. start + BLOCK, [BLOCK, BLOCK_D]."""
    first = tl.cast(start, tl.int64) * stride
    rows = tl.arange(0, BLOCK).to(tl.int64)[:, None] * stride
    if ALIGN > 1:
        first = tl.multiple_of(first, ALIGN)
        rows = tl.multiple_of(rows, [ALIGN, ALIGN])
    return (ptr + first) + (rows + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def load_rows(
    ptr, start, stride, keep, ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + BLOCK of a matrix as [BLOCK, BLOCK_D]; 0 past HEAD_DIM.

    keep: bool [BLOCK] or None for all. Rows not kept are 0 and are not read, so that what lies
    there (NaN, or nothing) stays out.
    """
    cols = tl.arange(0, BLOCK_D)[None, :]
    ptrs = tile_ptrs(ptr, start, stride, ALIGN, BLOCK, BLOCK_D)
    if keep is None:
        if HEAD_DIM == BLOCK_D:
            tile = tl.load(ptrs)
        else:
            tile = tl.load(ptrs, mask=cols < HEAD_DIM, other=0.0)
    else:
        if HEAD_DIM == BLOCK_D:
            tile = tl.load(ptrs, mask=keep[:, None], other=0.0)
        else:
            tile = tl.load(ptrs, mask=keep[:, None] & (cols < HEAD_DIM), other=0.0)
    return tile


@triton.jit
def store_rows(
    ptr, start, stride, tile, keep, ALIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the kept rows of a [BLOCK, BLOCK_D] tile, rounded to the matrix's type."""
    ptrs = tile_ptrs(ptr, start, stride, ALIGN, BLOCK, BLOCK_D)
    keep = keep[:, None]
    if HEAD_DIM != BLOCK_D:
        keep = keep & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=keep)


@triton.jit
def shown(x, IS_BIAS: tl.constexpr):
    """Which pairs the mask values x leave visible."""
    if IS_BIAS:
        seen = x != float("-inf")
    else:
        seen = x != 0
    return seen


@triton.jit
def base2_bias(x):
    """Mask values as base-2 scores; 0 for -inf, whose pairs are hidden by `shown`."""
    LOG2E: tl.constexpr = 1.4426950408889634
    x = x.to(tl.float32)
    return tl.where(x == float("-inf"), 0.0, x * LOG2E)


@triton.jit
def edge_keys(
    n, key_lo, key_hi, first_query, num_q, interval, mask_ptr, stride_mm, stride_mn,
    MASK: tl.constexpr, IS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(keys to read [BLOCK_N], pairs seen [BLOCK_M, BLOCK_N], mask values) of a masked tile."""
    offs_m = first_query + tl.arange(0, BLOCK_M)
    offs_n = n + tl.arange(0, BLOCK_N)
    keep = (offs_n >= key_lo) & (offs_n < key_hi)
    values = keep
    if MASK == "keys":
        values = tl.load(mask_ptr + offs_n.to(tl.int64) * stride_mn, mask=keep, other=0)
        keep = keep & shown(values, IS_BIAS)
        values = values[None, :]
    seen = keep[None, :] & visible(offs_m[:, None], offs_n[None, :], interval)
    if MASK == "pairs":
        seen = seen & (offs_m < num_q)[:, None]
        rows = offs_m.to(tl.int64)[:, None] * stride_mm
        cols = offs_n.to(tl.int64)[None, :] * stride_mn
        values = tl.load(mask_ptr + rows + cols, mask=seen, other=0)
        seen = seen & shown(values, IS_BIAS)
    return keep, seen, values


@triton.jit
def key_bias(
    mask_ptr, batch, head, offs_n, inside, stride_mb, stride_mh, stride_mn, IS_BIAS: tl.constexpr
):
    """Base-2 bias of keys [N] by a key mask, -inf where hidden or not inside."""
    mask_ptr = sequence_ptr(mask_ptr, batch, head, 0, stride_mb, stride_mh, 0, 1)
    values = tl.load(mask_ptr + offs_n.to(tl.int64) * stride_mn, mask=inside, other=0)
    bias = 0.0
    if IS_BIAS:
        bias = base2_bias(values)
    return tl.where(inside & shown(values, IS_BIAS), bias, float("-inf"))


@triton.jit
def drop_unseen(tile, seen):
    """Zero the keys [N, D] that no query of the tile sees: 0 * NaN would reach the product."""
    return tl.where((tl.max(seen.to(tl.int32), 0) > 0)[:, None], tile, 0.0)


@triton.jit
def first_masked_key(mask_ptr, stride, begin, end, IS_BIAS: tl.constexpr):
    """First key in [begin, end) that a key mask hides or biases; end if there is none."""
    WIDTH: tl.constexpr = 1024
    found = tl.zeros([WIDTH], tl.int32) + end
    for n in tl.range(begin, end, WIDTH):
        offs = n + tl.arange(0, WIDTH)
        ptrs = mask_ptr + offs.to(tl.int64) * stride
        x = tl.load(ptrs, mask=offs < end, other=0)
        if IS_BIAS:
            plain = x == 0
        else:
            plain = x != 0
        found = tl.minimum(found, tl.where(plain, end, offs))
    return tl.min(found, 0)


@triton.jit
def online_softmax(m_i, s, qk_scale, bias, MASKED: tl.constexpr):
    """(p, alpha, m): fold a tile of scores into the running base-2 maximum.

    s [M, N] = q.k, -inf where invisible; the score is s * qk_scale + bias, qk_scale > 0, bias None
    or base-2. The fma forms are the same with and without masks, so both give the same bits.
    """
    if bias is None:
        m_new = tl.maximum(m_i, tl.max(s, 1) * qk_scale)
    else:
        m_new = tl.maximum(m_i, tl.max(tl.fma(s, qk_scale, bias), 1))
    m_safe = m_new
    if MASKED:
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # an empty row would give inf - inf
    p = probabilities(s, qk_scale, bias, m_safe[:, None])
    return p, tl.exp2(m_i - m_safe), m_new


@triton.jit
def probabilities(s, qk_scale, bias, shift):
    """2^(s * qk_scale + bias - shift)."""
    if bias is None:
        p = tl.exp2(tl.fma(s, qk_scale, -shift))
    else:
        p = tl.exp2(tl.fma(s, qk_scale, bias - shift))
    return p


@triton.jit
def sequence_ptr(ptr, batch, head, row, stride_b, stride_h, stride_n, ALIGN: tl.constexpr):
    """Where a head of a sequence starts; every stride is a multiple of ALIGN elements."""
    offset = (
        tl.cast(batch, tl.int64) * stride_b
        + tl.cast(head, tl.int64) * stride_h
        + tl.cast(row, tl.int64) * stride_n
    )
    if ALIGN > 1:
        offset = tl.multiple_of(offset, ALIGN)
    return ptr + offset
