"""Pairs that dropout keeps: Philox4x32, a counter-based generator, in int64 arithmetic of torch.

Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011). A pair's fate is a function of
(seed, sequence, head, query, key) alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF
ROUNDS = 7
BITS = 24  # of a dropout probability

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _halves(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of x * multiplier; a product that wraps has the same bits."""
    product = x * multiplier
    return (product >> 32) & WORD, product & WORD


def philox4x32(counter: Words, key: tuple[Tensor, Tensor], rounds: int = ROUNDS) -> Words:
    """Four random words of a counter; words are int64 tensors from 0 to 2^32 - 1 that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _halves(c0, MULTIPLIERS[0])
        high1, low1 = _halves(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & WORD, (k1 + KEY_INCREMENTS[1]) & WORD
    return c0, c1, c2, c3


def threshold_bits(dropout_p: float) -> int:
    """The probability as a multiple of 2^-24."""
    return round(dropout_p * (1 << BITS))


def kept_scale(dropout_p: float) -> float:
    """Factor of what dropout keeps, 1 over the kept share; 0 where nothing is kept."""
    kept = 1 - threshold_bits(dropout_p) / (1 << BITS)
    return 1 / kept if kept > 0 else 0.0


def keep_mask(seed: Tensor, dropout_p: float, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """bool (b, h, i, j): the pairs of sequences, heads, queries and keys that dropout keeps.

    A pair is dropped where its byte is below the threshold of its row. The threshold is the
    probability in 1/256, rounded up or down row by row so that it is right to 2^-24 on average.
    """
    key = seed & WORD, (seed >> 32) & WORD
    b, h, i = b[:, None, None, None], h[:, None, None], i[:, None]
    blocks, of_key = torch.unique_consecutive(j >> 4, return_inverse=True)
    words = torch.broadcast_tensors(*philox4x32((blocks, i, h, b), key))
    words = torch.stack(words, -1).flatten(-2)  # four for each block of 16 keys
    byte = (words[..., 4 * of_key + ((j >> 2) & 3)] >> (8 * (j & 3))) & 0xFF
    base, fraction = divmod(threshold_bits(dropout_p), 1 << (BITS - 8))
    row_word = philox4x32((torch.full_like(i, WORD), i, h, b), key)[0]
    threshold = base + ((row_word & 0xFFFF) < fraction)
    return byte >= threshold
