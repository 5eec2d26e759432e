"""The weights of a tile of pairs, formed again from q.k and the normalisers of the queries."""

import triton
import triton.language as tl

from .score import exponent, mask_scores, pair_bias
from .terms import modified, score_factor, with_terms


@triton.jit
def log_weights(
    s, i, j, keep, bias, shift, low, head, mask_ptr, mask_strides, score,
    MASKED: tl.constexpr, NATURAL: tl.constexpr, form: tl.constexpr,
):  # fmt: skip
    """Returns (x, s', ds'/ds) from s = q.k: the weights are 2^x, and s' is modified(s).

    Queries i and keys j are [M, 1] and [1, N] for s [M, N], or [1, M] and [N, 1] for s [N, M]. keep
    and bias are like j: the keys that a key mask leaves, and what it adds, None for 0. shift and
    low are like i: lse in the units of scores, inf where all weights are 0, and what rounding took
    from it, None for 0. MASKED: s' is -inf, and weights are 0, for the pairs that are not seen.
    """
    s, gain = modified(s, score)
    if MASKED:
        s, values = mask_scores(s, i, j, keep, score.interval, mask_ptr, mask_strides, form)
        if form.MASK == "pairs" and form.IS_BIAS:
            bias = pair_bias(values, NATURAL)
    if form.TERMS:
        bias = with_terms(bias, i, j, head, score, NATURAL)
    return exponent(s, score_factor(score, NATURAL), bias, shift, low, NATURAL), s, gain
