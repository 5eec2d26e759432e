"""What the score of a pair can have besides q.k: a soft cap, added terms, and dropout."""

import triton
import triton.language as tl

from .score import score_units
from .tiles import clamp


@triton.jit
def softcapped(s, cap_scale):
    """tanh(s cap_scale), to some ulp also near 0; its polynomial there is that of Cephes' tanhf."""
    x = s * cap_scale
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(size * 2.8853900817779268) + 1.0)
    z = x * x
    near = -5.70498872745e-3 * z + 2.06390887954e-2
    near = near * z - 5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = near * z - 3.33332819422e-1
    return tl.where(size < 0.625, near * z * x + x, tl.where(x < 0, -far, far))


@triton.jit
def with_terms(bias, i, j, terms, interval, NATURAL: tl.constexpr):
    """bias, None for 0, and what relative biases, slopes and decay add to the scores of i and j.

    terms: (sequence, head, relative_ptr, far, slopes_ptr, stride_slopes, decay_ptr, times_ptr),
    pointers None for what is not there, but not all of them: Triton 3.6 lets no function return
    None. A relative bias has 2 far + 1 values for each head.
    """
    sequence, head, relative_ptr, far, slopes_ptr, stride_slopes, decay_ptr, _ = terms
    if relative_ptr is not None:
        at = head * (2 * far + 1) + clamp(j - i - interval[0], -far, far) + far
        bias = plus(bias, score_units(tl.load(relative_ptr + at), NATURAL))
    if slopes_ptr is not None:
        slope = score_units(tl.load(slopes_ptr + sequence * stride_slopes + head), NATURAL)
        bias = plus(bias, -slope * position_distance(i, j, interval))
    if decay_ptr is not None:
        decay = score_units(tl.load(decay_ptr + head), NATURAL)
        bias = plus(bias, -decay * time_distance(i, j, terms, interval))
    return bias


@triton.jit
def plus(x, y):
    """x + y, where x can be None for 0."""
    if x is None:
        total = y
    else:
        total = x + y
    return total


@triton.jit
def position_distance(i, j, interval):
    """|i - j|, aligned as the interval is."""
    return tl.abs(i + interval[0] - j).to(tl.float32)


@triton.jit
def time_distance(i, j, terms, interval):
    """|t_i - t_j|, with 0 for the times of padding, which can be anything."""
    _, kv_begin, kv_end, _, _, _, _, first_row, num_q, _, _ = interval
    times_ptr = terms[7] + first_row
    of_query = tl.load(times_ptr + i, mask=(i >= 0) & (i < num_q), other=0.0)
    of_key = tl.load(times_ptr + j, mask=(j >= kv_begin) & (j < kv_end), other=0.0)
    return tl.abs(of_query - of_key)


@triton.jit
def kept_pairs(first_query, first_key, dropout, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """bool [BLOCK_M, BLOCK_N]: what dropout keeps; first_key is a multiple of 16.

    One Philox4x32-7 (Salmon et al., 2011) gives the bytes of 16 keys of a query. A byte below the
    threshold of its row is dropped; thresholds are dithered by row, right to 2^-24 on average.
    dropout: (seed_ptr, sequence, head, probability in 2^-24, factor of what is kept).
    """
    seed_ptr, sequence, head, bits, _ = dropout
    seed = tl.load(seed_ptr)
    BLOCKS: tl.constexpr = BLOCK_N // 16
    i = (first_query + tl.arange(0, BLOCK_M))[:, None].to(tl.uint32)
    block = (first_key // 16 + tl.arange(0, BLOCKS))[None, :].to(tl.uint32)
    row, column = tl.broadcast(i, block)
    zero = column * 0
    w0, w1, w2, w3 = tl.philox(seed, column, row, zero + head, zero + sequence, 7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    words = tl.reshape(words, (BLOCK_M, BLOCKS * 4))
    shift = (8 * tl.arange(0, 4)).to(tl.uint32)[None, None, :]
    byte = tl.reshape((words[:, :, None] >> shift) & 0xFF, (BLOCK_M, BLOCK_N)).to(tl.int32)
    zero = i * 0
    word, _, _, _ = tl.philox(seed, zero + 0xFFFFFFFF, i, zero + head, zero + sequence, 7)
    threshold = (bits >> 16) + ((word & 0xFFFF).to(tl.int32) < (bits & 0xFFFF)).to(tl.int32)
    return byte >= threshold


@triton.jit
def dropped(x, keep, dropout):
    """x where it is kept, scaled by what makes up for the rest, else 0."""
    return tl.where(keep, x * dropout[4], 0.0)
