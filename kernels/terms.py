"""The score of a pair besides q.k: a soft cap, added terms, and dropout of its weight."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .score import score_units
from .tiles import clamp


class Terms(NamedTuple):
    """The terms that with_terms adds to the scores of a sequence.

    inputs: those of the call, of which decay, slopes and relative are None where they add nothing.
    far: a relative bias has 2 far + 1 values for each head. stride_slopes: from the slopes of a
    sequence to those of the next, 0 where all share them.
    """

    inputs: Any
    sequence: Any
    far: Any
    stride_slopes: Any


class Dropout(NamedTuple):
    """The dropout of a sequence; seed_ptr: None without dropout.

    bits: the probability in 2^-24. kept_scale: the weight of a pair that is kept.
    """

    seed_ptr: Any
    sequence: Any
    bits: Any
    kept_scale: Any


class Score(NamedTuple):
    """The rules by which q and k give the score of a pair, and the score a weight."""

    interval: Any
    terms: Any
    dropout: Any
    factors: Any


@triton.jit
def score_factor(score, NATURAL: tl.constexpr):
    """Returns the factor from modified q.k to a score: natural where NATURAL, else base 2."""
    if NATURAL:
        factor = score.factors.natural_scale
    else:
        factor = score.factors.qk_scale
    return factor


@triton.jit
def modified(s, score):
    """Returns (s', ds'/ds), where s' is what becomes of s = q.k before its factor."""
    gain = 1.0
    if score.factors.cap_scale is not None:
        s = softcapped(s, score.factors.cap_scale)
        gain = 1.0 - s * s
    return s, gain


@triton.jit
def softcapped(s, cap_scale):
    """Returns tanh(s cap_scale), to some ulp also near 0, by the polynomial of Cephes' tanhf."""
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
def with_terms(bias, i, j, head, score, NATURAL: tl.constexpr):
    """Returns bias, None for 0, with the relative biases, slopes and decay of i and j added.

    A call without these three must not come here: Triton 3.6 lets no function return None.
    """
    interval = score.interval
    terms = score.terms
    inputs = terms.inputs
    if inputs.relative is not None:
        at = head * (2 * terms.far + 1)
        at = at + clamp(j - i - interval.tile.offset, -terms.far, terms.far) + terms.far
        bias = plus(bias, score_units(tl.load(inputs.relative + at), NATURAL))
    if inputs.slopes is not None:
        slope = tl.load(inputs.slopes + terms.sequence * terms.stride_slopes + head)
        slope = score_units(slope, NATURAL)
        bias = plus(bias, -slope * position_distance(i, j, interval))
    if inputs.decay is not None:
        decay = score_units(tl.load(inputs.decay + head), NATURAL)
        bias = plus(bias, -decay * time_distance(i, j, inputs.times, interval))
    return bias


@triton.jit
def plus(x, y):
    """Returns x + y, where x can be None for 0."""
    if x is None:
        total = y
    else:
        total = x + y
    return total


@triton.jit
def position_distance(i, j, interval):
    """Returns |i - j|, aligned as the interval is."""
    return tl.abs(i + interval.tile.offset - j).to(tl.float32)


@triton.jit
def time_distance(i, j, times_ptr, interval):
    """Returns |t_i - t_j|, with 0 for the times of padding, which can be anything."""
    times_ptr += interval.tile.first_row
    is_query = (i >= 0) & (i < interval.tile.num_q)
    is_key = (j >= interval.tile.kv_begin) & (j < interval.tile.kv_end)
    of_query = tl.load(times_ptr + i, mask=is_query, other=0.0)
    of_key = tl.load(times_ptr + j, mask=is_key, other=0.0)
    return tl.abs(of_query - of_key)


@triton.jit
def kept_pairs(first_query, first_key, head, dropout, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns bool [BLOCK_M, BLOCK_N], the pairs that dropout keeps. first_key: a multiple of 16.

    One Philox4x32-7 (Salmon et al., 2011) gives the bytes of 16 keys of a query. A byte below the
    threshold of its row is dropped; thresholds are dithered by row, right to 2^-24 on average.
    """
    sequence = dropout.sequence
    seed = tl.load(dropout.seed_ptr)
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
    threshold = dropout.bits >> 16
    threshold += ((word & 0xFFFF).to(tl.int32) < (dropout.bits & 0xFFFF)).to(tl.int32)
    return byte >= threshold


@triton.jit
def dropped(x, keep, dropout):
    """Returns x kept_scale for the pairs that are kept, else 0."""
    return tl.where(keep, x * dropout.kept_scale, 0.0)


LOG2E = 1.4426950408889634
SMALLEST_SCALE = 2.0**-126  # not 0: a hidden score is -inf, and 0 * -inf is NaN
LARGEST = 3.4028234663852886e38  # of fp32
DROPOUT_BITS = 24


class Factors(NamedTuple):
    """The floats of a call, None for a step that it leaves out.

    scale: of dq and dk. qk_scale, natural_scale: what takes q.k, or its softcapped value, to a
    score in the kernel's units, and to a natural one. cap_scale: what takes q.k to the argument of
    tanh. kept_scale: the weight of a pair that dropout keeps.
    """

    scale: float
    qk_scale: float
    natural_scale: float
    cap_scale: float | None
    kept_scale: float | None


def dropout_bits(call: Any) -> int | None:
    """Returns the probability of dropout in 2^-24; None without dropout."""
    return None if call.seed is None else round(call.dropout_p * (1 << DROPOUT_BITS))


def factors(call: Any, natural: bool) -> Factors:
    """Returns the Factors of a call with scale >= 0. natural: NATURAL of Form."""
    factor = call.softcap or call.scale
    natural_scale = max(factor, SMALLEST_SCALE)
    bits = dropout_bits(call)
    kept = None if bits is None else 1 - bits / (1 << DROPOUT_BITS)
    return Factors(
        scale=call.scale,
        qk_scale=natural_scale if natural else max(factor * LOG2E, SMALLEST_SCALE),
        natural_scale=natural_scale,
        cap_scale=min(call.scale / call.softcap, LARGEST) if call.softcap else None,
        kept_scale=None if kept is None else 1 / kept if kept > 0 else 0.0,
    )
