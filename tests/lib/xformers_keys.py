"""A bias of each class of xformers whose keys have gaps or lie in pages, with the places of keys.

CASES: name -> ((bias, places of each block's keys, number of keys), the band of each block).
"""

import torch
from xformers_calls import BOTTOM_RIGHT

from clinattn.integrations import xformers as xf

QUERIES, KEYS = [2, 1, 0, 3, 5], [5, 7, 2, 4, 3]
FULL = {}
CAUSAL = {"right": 0, **BOTTOM_RIGHT}
LOCAL = {"left": 2, "right": 1, **BOTTOM_RIGHT}
CAUSAL_LOCAL = {"left": 2, "right": 0, **BOTTOM_RIGHT}


def following(starts):
    """Returns the places of each block's keys, from where it starts."""
    return [list(range(start, start + n)) for start, n in zip(starts, KEYS, strict=True)]


PADDING = 8
PADDED = following(range(0, 40, PADDING))
# In no order, with a gap at either end; the last two blocks have keys in common.
STARTS = [20, 3, 0, 31, 33]
GAPPY, GAPPY_END = following(STARTS), 38

# Of 12 pages, 2 for each sequence; what is not needed leads nowhere.
PAGE = 4
TABLE = torch.tensor([[9, 2], [0, 7], [11, -1], [3, 500], [5, 10]], dtype=torch.int32)
SKIPPED = [1, 0, 3, 2, 5]


def in_pages(starts):
    spans = zip(TABLE.tolist(), starts, KEYS, strict=True)
    return [
        [row[j // PAGE] * PAGE + j % PAGE for j in range(start, start + n)]
        for row, start, n in spans
    ]


FULL_TABLE = torch.tensor([[9, 2], [0, 7], [11, 1], [3, 8], [5, 10]], dtype=torch.int32)


def padded(cls, *window):
    return cls.from_seqlens(QUERIES, PADDING, KEYS), PADDED, 40


def padded_local(cls, *window):
    return cls.from_seqlens_local(QUERIES, PADDING, KEYS, *window), PADDED, 40


def gappy(cls):
    return cls.from_seqlens(QUERIES, [*STARTS, GAPPY_END], KEYS), GAPPY, GAPPY_END


def gappy_local(cls, *window):
    bias = cls.from_seqlens_local_gappy(QUERIES, [*STARTS, GAPPY_END], KEYS, *window)
    return bias, GAPPY, GAPPY_END


def paged(cls):
    return cls.from_seqlens(QUERIES, KEYS, TABLE, PAGE), in_pages([0] * 5), 12 * PAGE


def paged_local(cls, window):
    bias = cls.from_seqlens_local(QUERIES, KEYS, TABLE, PAGE, window)
    return bias, in_pages([0] * 5), 12 * PAGE


def paged_gappy(cls):
    table = FULL_TABLE  # with what is skipped, every sequence but one needs both pages
    bias = cls.from_seqlens(QUERIES, SKIPPED, KEYS, table, PAGE)
    rows = zip(table.tolist(), SKIPPED, KEYS, strict=True)
    places = [
        [row[j // PAGE] * PAGE + j % PAGE for j in range(start, start + n)]
        for row, start, n in rows
    ]
    return bias, places, 12 * PAGE


CASES = {
    "padded": (padded(xf.BlockDiagonalPaddedKeysMask), FULL),
    "padded, causal": (padded(xf.BlockDiagonalCausalWithOffsetPaddedKeysMask), CAUSAL),
    "padded, local": (padded_local(xf.BlockDiagonalLocalAttentionPaddedKeysMask, 2, 1), LOCAL),
    "padded, causal local": (
        padded_local(xf.BlockDiagonalCausalLocalAttentionPaddedKeysMask, 3),
        CAUSAL_LOCAL,
    ),
    "gappy": (gappy(xf.BlockDiagonalGappyKeysMask), FULL),
    "gappy, causal": (gappy(xf.BlockDiagonalCausalWithOffsetGappyKeysMask), CAUSAL),
    "gappy, local": (
        gappy_local(xf.BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask, 2, 1),
        LOCAL,
    ),
    "paged": (paged(xf.PagedBlockDiagonalPaddedKeysMask), FULL),
    "paged, causal": (paged(xf.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask), CAUSAL),
    "paged, causal local": (
        paged_local(xf.PagedBlockDiagonalCausalLocalPaddedKeysMask, 3),
        CAUSAL_LOCAL,
    ),
    "paged, gappy": (paged_gappy(xf.PagedBlockDiagonalGappyKeysMask), FULL),
    "paged, gappy, causal": (
        paged_gappy(xf.PagedBlockDiagonalCausalWithOffsetGappyKeysMask),
        CAUSAL,
    ),
}
