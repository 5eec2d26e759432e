"""Dropout's random bits in plain Python integers, one pair at a time: what every backend must draw.

Philox4x32 as in Salmon et al. (2011).
"""

import functools

import torch


def philox4x32(counter, key, rounds):
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        a, b = 0xCD9E8D57 * c2, 0xD2511F53 * c0
        c0, c1, c2, c3 = a >> 32 ^ c1 ^ k0, a % 2**32, b >> 32 ^ c3 ^ k1, b % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@functools.lru_cache(maxsize=1 << 16)
def words(seed, counter):
    return philox4x32(counter, (seed % 2**32, seed >> 32), rounds=7)


def is_kept(seed, dropout_p, b, h, i, j):
    whole, part = divmod(round(dropout_p * 2**24), 2**16)
    threshold = whole + (words(seed, (0xFFFFFFFF, i, h, b))[0] % 2**16 < part)
    word = words(seed, (j // 16, i, h, b))[j // 4 % 4]
    return word // 2 ** (8 * (j % 4)) % 256 >= threshold


def keep_mask(seed, dropout_p, sequences, heads, queries, keys):
    """bool (b, h, i, j) for lists of indices."""
    return torch.tensor(
        [
            [
                [[is_kept(seed, dropout_p, b, h, i, j) for j in keys] for i in queries]
                for h in range(heads)
            ]
            for b in sequences
        ]
    )
