"""Tile configurations by compute capability, head dim and type, one table for each pass.

Never keyed by batch or length: the bits of a result must not depend on its neighbours. Every row
compiles for its card without spilling and within its shared memory (tests/test_triton_aot.py).
Nothing in this file has been measured on a device yet; each row says where it comes from.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class TileConfig:
    """A query-by-key tile, and how many warps and pipeline stages work on it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def block_d(head_dim: int) -> int:
    """Columns of a tile: the next power of two, at least the 16 that a tensor-core dot needs."""
    return max(16, 1 << (head_dim - 1).bit_length())


# (block_m, block_n, num_warps, num_stages) by card, then by bits of the type, then by block_d.
Table = dict[int, dict[int, dict[int, tuple[int, int, int, int]]]]

FORWARD: Table = {
    80: {
        16: {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (32, 64, 4, 3)},
        32: {64: (64, 32, 4, 2), 128: (32, 32, 4, 2), 256: (32, 16, 4, 2)},
    },
    90: {
        16: {64: (128, 128, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 4, 3)},
        32: {64: (64, 32, 4, 2), 128: (32, 32, 4, 2), 256: (32, 16, 4, 2)},
    },
    100: {
        16: {64: (128, 128, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 4, 3)},
        32: {64: (64, 32, 4, 2), 128: (32, 32, 4, 2), 256: (32, 16, 4, 2)},
    },
}
DKDV: Table = {
    80: {
        16: {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (32, 32, 4, 2)},
        32: {64: (32, 32, 4, 2), 128: (16, 32, 4, 2), 256: (16, 16, 4, 2)},
    },
    90: {
        16: {64: (64, 128, 8, 3), 128: (64, 128, 8, 3), 256: (64, 64, 4, 2)},
        32: {64: (32, 32, 4, 2), 128: (16, 32, 4, 2), 256: (16, 16, 4, 2)},
    },
    100: {
        16: {64: (64, 128, 8, 3), 128: (64, 128, 8, 3), 256: (64, 64, 4, 2)},
        32: {64: (32, 32, 4, 2), 128: (16, 32, 4, 2), 256: (16, 16, 4, 2)},
    },
}
DQ: Table = {
    80: {
        16: {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (32, 32, 4, 2)},
        32: {64: (32, 32, 4, 2), 128: (32, 16, 4, 2), 256: (16, 16, 4, 2)},
    },
    90: {
        16: {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 4, 2)},
        32: {64: (32, 32, 4, 2), 128: (32, 16, 4, 2), 256: (16, 16, 4, 2)},
    },
    100: {
        16: {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 4, 2)},
        32: {64: (32, 32, 4, 2), 128: (32, 16, 4, 2), 256: (16, 16, 4, 2)},
    },
}


@lru_cache
def tile_config(
    table: str, capability: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> TileConfig:
    """The row for the newest listed card that is not newer than this one, and the next head dim."""
    rows = {"forward": FORWARD, "dkdv": DKDV, "dq": DQ}[table]
    card = max((c for c in rows if c <= capability[0] * 10 + capability[1]), default=min(rows))
    by_dim = rows[card][dtype.itemsize * 8]
    return TileConfig(*by_dim[min(d for d in by_dim if d >= head_dim)])
