"""Dropout's random bits by the definition, in numpy's 64-bit integers: what every backend draws.

Philox4x32 as in Salmon et al. (2011). A number of 32 bits stands in 64, where no product of two
overflows.
"""

import numpy as np
import torch

LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox4x32(counter, key, rounds):
    """Four words for each place; the words of counter broadcast against each other."""
    c0, c1, c2, c3 = (np.asarray(x, np.uint64) for x in counter)
    k0, k1 = (np.uint64(x) for x in key)
    for _ in range(rounds):
        a, b = np.uint64(0xCD9E8D57) * c2, np.uint64(0xD2511F53) * c0
        c0, c1, c2, c3 = a >> HALF ^ c1 ^ k0, a & LOW, b >> HALF ^ c3 ^ k1, b & LOW
        k0, k1 = k0 + np.uint64(0x9E3779B9) & LOW, k1 + np.uint64(0xBB67AE85) & LOW
    return c0, c1, c2, c3


def keep_mask(seed, dropout_p, sequences, heads, queries, keys):
    """bool (b, h, i, j) for lists of indices."""
    key = (seed % 2**32, seed >> 32)
    b, h, i = np.ix_(*(np.asarray(x, np.uint64) for x in (sequences, range(heads), queries)))
    whole, part = divmod(round(dropout_p * 2**24), 2**16)
    of_query = philox4x32((LOW, i, h, b), key, rounds=7)[0]
    threshold = np.uint64(whole) + (of_query % np.uint64(2**16) < np.uint64(part)).astype(np.uint64)
    j = np.asarray(keys, np.uint64)
    counter = (j // np.uint64(16), i[..., None], h[..., None], b[..., None])
    drawn = philox4x32(counter, key, rounds=7)
    words = np.stack(np.broadcast_arrays(*drawn), -1)  # (b, h, i, j, 4)
    place = (j // np.uint64(4) % np.uint64(4)).astype(np.int64)
    word = np.take_along_axis(words, place.reshape(1, 1, 1, -1, 1), -1)[..., 0]
    byte = word >> np.uint64(8) * (j % np.uint64(4)) & np.uint64(255)
    return torch.from_numpy(byte >= threshold[..., None])
