"""Pieces of a tile of scores: loads, masks and the online softmax."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .interval import visible

# From this size on, in base 2, scores c s of 16-bit types are large. With m, the rounded c max(s),
# an fma gives the weights of a row times 2^r, r = c max(s) - m, |r| <= ulp(m) / 2: alike in all of
# the row and in m + log2 of its sum, but out of range from m = 2^31 on. That normaliser, rounded to
# fp32 on its way to the backward pass, is off by 2.5 ulp(m): below 2^12 by 2^-11 of a weight, less
# than 16 bits show. Rows of larger scores get a loop of their own, which takes the maximum off
# natural scores (NATURAL), which is exact for scores near the maximum (Sterbenz), and a normaliser
# in two parts.
LARGE = tl.constexpr(4096.0)
NARROW = tl.constexpr(16)  # side of a tile in the loops over rows of large scores


class Keys(NamedTuple):
    """Pointers to the keys, values and mask of a head of a sequence.

    strides: InputStrides. lo, hi: no key outside [lo, hi) is read.
    """

    k_ptr: Any
    v_ptr: Any
    mask_ptr: Any
    strides: Any
    lo: Any
    hi: Any


class Queries(NamedTuple):
    """A tile of queries of a head in the backward pass, by row.

    shift: their lse in the units of the scores, inf for rows that see nothing. low: None, or what
    rounding took from lse. first: the first of them.
    """

    q: Any
    do: Any
    shift: Any
    low: Any
    delta: Any
    first: Any
    head: Any


@triton.jit
def tile_ptrs(
    ptr, start, stride,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Returns pointers to rows start .. start + BLOCK, [BLOCK, BLOCK_D], with one part constant."""
    first = tl.cast(start, tl.int64) * stride
    rows = tl.arange(0, BLOCK).to(tl.int64)[:, None] * stride
    if ALIGN > 1:
        first = tl.multiple_of(first, ALIGN)
        rows = tl.multiple_of(rows, [ALIGN, ALIGN])
    return (ptr + first) + (rows + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def load_rows(
    ptr, start, stride, keep,
    BLOCK: tl.constexpr, form: tl.constexpr, VALUES: tl.constexpr = False,
):  # fmt: skip
    """Returns rows start .. start + BLOCK of a matrix as [BLOCK, BLOCK_D]; 0 past HEAD_DIM.

    VALUES: rows of v, o or do, of VALUE_DIM numbers in BLOCK_V columns. keep: bool [BLOCK] or None
    for all. Rows not kept are 0 and are not read, so that what lies there (NaN, or nothing) stays
    out.
    """
    DIM: tl.constexpr = form.VALUE_DIM if VALUES else form.HEAD_DIM
    COLUMNS: tl.constexpr = form.BLOCK_V if VALUES else form.BLOCK_D
    cols = tl.arange(0, COLUMNS)[None, :]
    ptrs = tile_ptrs(ptr, start, stride, form.ALIGN, BLOCK, COLUMNS)
    if keep is None:
        if DIM == COLUMNS:
            tile = tl.load(ptrs)
        else:
            tile = tl.load(ptrs, mask=cols < DIM, other=0.0)
    else:
        if DIM == COLUMNS:
            tile = tl.load(ptrs, mask=keep[:, None], other=0.0)
        else:
            tile = tl.load(ptrs, mask=keep[:, None] & (cols < DIM), other=0.0)
    return tile


@triton.jit
def store_rows(
    ptr, start, stride, tile, keep,
    BLOCK: tl.constexpr, form: tl.constexpr, VALUES: tl.constexpr = False,
):  # fmt: skip
    """Writes the kept rows of a tile as load_rows has it, rounded to the type of the matrix."""
    DIM: tl.constexpr = form.VALUE_DIM if VALUES else form.HEAD_DIM
    COLUMNS: tl.constexpr = form.BLOCK_V if VALUES else form.BLOCK_D
    ptrs = tile_ptrs(ptr, start, stride, form.ALIGN, BLOCK, COLUMNS)
    keep = keep[:, None]
    if DIM != COLUMNS:
        keep = keep & (tl.arange(0, COLUMNS)[None, :] < DIM)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=keep)


@triton.jit
def mask_scores(s, i, j, keep, interval, mask_ptr, strides, form: tl.constexpr):
    """Returns (s, mask values), s with -inf for the pairs that are not seen.

    Queries i and keys j are [M, 1] and [1, N] for s [M, N], or [1, M] and [N, 1] for s [N, M]; keep
    is like j, the keys that a key mask leaves.
    """
    seen = visible(i, j, interval)
    if form.MASK == "keys":
        seen = seen & keep
    values = s
    if form.MASK == "pairs":
        seen = seen & (i >= 0) & (i < interval.tile.num_q)
        at = i.to(tl.int64) * strides.m + j.to(tl.int64) * strides.n
        values = tl.load(mask_ptr + at, mask=seen, other=0)
        if form.IS_BIAS:
            seen = seen & (values != float("-inf"))
        else:
            seen = seen & (values != 0)
    return tl.where(seen, s, float("-inf")), values


@triton.jit
def score_units(x, NATURAL: tl.constexpr):
    """Returns float mask values, or lse, as scores: natural where NATURAL, else base 2."""
    LOG2E: tl.constexpr = 1.4426950408889634
    x = x.to(tl.float32)
    if not NATURAL:
        x = x * LOG2E
    return x


@triton.jit
def pair_bias(values, NATURAL: tl.constexpr):
    """Returns the bias of loaded mask values; 0 for -inf, which mask_scores puts into scores."""
    return tl.where(values == float("-inf"), 0.0, score_units(values, NATURAL))


@triton.jit
def key_bias(mask_ptr, offs_n, stride, inside, IS_BIAS: tl.constexpr, NATURAL: tl.constexpr):
    """Returns the bias of keys [N] by a mask that all queries share; -inf if hidden or outside."""
    values = tl.load(mask_ptr + offs_n.to(tl.int64) * stride, mask=inside, other=0)
    if IS_BIAS:
        bias = score_units(values, NATURAL)
    else:
        bias = tl.where(values != 0, 0.0, float("-inf"))
    return tl.where(inside, bias, float("-inf"))


@triton.jit
def drop_unseen(tile, s):
    """Returns the keys [N, D], 0 for a key that no query of the tile sees in s [M, N].

    A key that is hidden from every query can hold NaN, and 0 * NaN would reach the product.
    """
    return tl.where((tl.max(s, 0) != float("-inf"))[:, None], tile, 0.0)


@triton.jit
def first_masked_key(mask_ptr, stride, begin, end, IS_BIAS: tl.constexpr):
    """Returns the first key in [begin, end) that a key mask hides or biases; end for none."""
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
def online_softmax(m_i, s, scale, bias, MASKED: tl.constexpr, NATURAL: tl.constexpr):
    """Folds a tile of s [M, N] = q.k, -inf where invisible, into m; returns (p, alpha, m).

    scale > 0 takes s to a score, natural or base 2; bias is None or, only where NATURAL, in the
    same units. The arithmetic is the same with and without masks, so both give the same bits.
    """
    if bias is None:
        m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
    else:
        m_new = tl.maximum(m_i, tl.max(s * scale + bias, 1))
    m_safe = m_new
    if MASKED and NATURAL:
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # an empty row would give inf - inf
    p = exponential(s, scale, bias, m_safe[:, None], None, NATURAL)
    alpha = exponential(m_i, 1.0, None, m_safe, None, NATURAL)
    return p, alpha, m_new


@triton.jit
def first_maximum(BLOCK: tl.constexpr, NATURAL: tl.constexpr):
    """Returns the running maximum [BLOCK] of rows that have met no key.

    In base 2 a maximum is never below -LARGE: weights before its next rise would be inf.
    """
    if NATURAL:
        m = tl.full([BLOCK], float("-inf"), tl.float32)
    else:
        m = tl.full([BLOCK], -LARGE, tl.float32)
    return m


@triton.jit
def has_large_scores(lse):
    """Returns whether rows with this normaliser have large scores; rows that see nothing do not."""
    size = tl.abs(score_units(lse, False))
    return (size >= LARGE) & (lse != float("-inf"))


@triton.jit
def any_large_scores(lse_ptr, begin, end, stride_h, HEADS: tl.constexpr):
    """Returns whether some row of [begin, end) of some head has large scores."""
    WIDTH: tl.constexpr = 1024
    found = tl.zeros([WIDTH], tl.int32)
    for head in tl.range(0, HEADS):
        of_head = lse_ptr + tl.cast(head, tl.int64) * stride_h
        for m in tl.range(begin, end, WIDTH):
            offs = m + tl.arange(0, WIDTH)
            lse = tl.load(of_head + offs, mask=(offs >= 0) & (offs < end), other=0.0)
            found |= has_large_scores(lse).to(tl.int32)
    return tl.max(found, 0) != 0


@triton.jit
def exponential(s, scale, bias, shift, low, NATURAL: tl.constexpr):
    """Returns 2^exponent(...)."""
    return tl.exp2(exponent(s, scale, bias, shift, low, NATURAL))


@triton.jit
def exponent(s, scale, bias, shift, low, NATURAL: tl.constexpr):
    """Returns (s scale + bias - shift) log2(e) - low where NATURAL, else s scale - shift.

    bias, low: None for 0.

    NATURAL rounds the score before the shift is taken off, as plain maths does, so that the largest
    score of a row cancels against its lse even if both are huge, and what is added to scores stays
    finite if it is. One fma has less error on average and is the fast way for 16-bit types, whose
    own rounding is larger than what is lost of scores below LARGE.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    if NATURAL:
        score = s * scale
        if bias is not None:
            score += bias
        if low is None:
            x = (score - shift) * LOG2E
        else:
            x = tl.fma(score - shift, LOG2E, -low)
    else:
        x = tl.fma(s, scale, -shift)
    return x


@triton.jit
def exact_sum(x, y):
    """Returns x + y, and what rounding took from it (Knuth, TAOCP 2, 4.2.2)."""
    total = x + y
    added = total - x
    return total, (x - (total - added)) + (y - added)


@triton.jit
def log_sum_exp(m, l, NATURAL: tl.constexpr):
    """Returns (lse, low): the natural logarithm of the sum l, taken with the shift m, and where
    NATURAL what rounding took from that logarithm, else 0.
    """
    LN2: tl.constexpr = 0.6931471805599453
    if NATURAL:
        lse, low = exact_sum(m, tl.log2(l) * LN2)
    else:
        lse = (m + tl.log2(l)) * LN2
        low = tl.zeros_like(lse)
    return lse, low


@triton.jit
def load_by_row(ptr, offs_m, keep, other):
    """Returns a number for each row [M]. keep: bool [M], else `other`; or None to load all."""
    if keep is None:
        x = tl.load(ptr + offs_m)
    else:
        x = tl.load(ptr + offs_m, mask=keep, other=other)
    return x


@triton.jit
def load_low(ptr, offs_m, keep):
    """Returns what rounding took from lse, [M] in base 2. keep: bool [M], or None to load all."""
    LOG2E: tl.constexpr = 1.4426950408889634
    return load_by_row(ptr, offs_m, keep, 0.0) * LOG2E


@triton.jit
def sequence_ptr(ptr, batch, head, row, strides, ALIGN: tl.constexpr):
    """Returns where a head of a sequence starts; all strides are multiples of ALIGN elements."""
    offset = (
        tl.cast(batch, tl.int64) * strides.b
        + tl.cast(head, tl.int64) * strides.h
        + tl.cast(row, tl.int64) * strides.n
    )
    if ALIGN > 1:
        offset = tl.multiple_of(offset, ALIGN)
    return ptr + offset


@triton.jit
def accumulate(acc, a, b, form: tl.constexpr):
    """Returns acc + a b, where acc is the sum over the tiles before.

    Products of fp32 are chains of multiply-adds. One chain over all tiles would round to the size
    of the whole sum at each step; so each tile is summed first, where there are registers for it. A
    plain addition would be taken back into the chain by the compiler.
    """
    if form.EXACT and form.PRECISION == "ieee" and acc.shape[1] <= 128:
        acc = tl.fma(tl.dot(a, b, input_precision=form.PRECISION), 1.0, acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=form.PRECISION)
    return acc
