"""Tile configurations by card, head dim and type, one table for each pass.

Never keyed by batch or length: the bits of a result must not depend on its neighbours. A comment
above a row says what was measured for a kind of call. The other kinds were chosen by what they
compile to (tests/triton/test_triton_aot.py): no spills, shared memory that fits, and products that
overlap. They start from flex_attention's published tiles for these cards; bench/gpu/run.py times
the alternatives.
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


@dataclass(frozen=True)
class Rows:
    """(block_m, block_n, num_warps, num_stages) for each kind of call, `plain` where none is given.

    window: with a bound on the left, whose kernels have one loop more and few tiles to visit.
    pairs: with something that differs from pair to pair, which takes registers of its own.
    keys: with a mask that is the same for all queries, and no such bound.
    terms: with what terms.py does to scores, which takes more of them; `pairs` by default.
    values: with values of another width than keys, so that tiles of the two, and of their
        gradients, have addresses of their own; `pairs` by default.
    values_pairs: with such values and what `pairs` or `terms` are for; `terms` by default.
    """

    plain: tuple[int, int, int, int]
    window: tuple[int, int, int, int] | None = None
    pairs: tuple[int, int, int, int] | None = None
    terms: tuple[int, int, int, int] | None = None
    keys: tuple[int, int, int, int] | None = None
    values: tuple[int, int, int, int] | None = None
    values_pairs: tuple[int, int, int, int] | None = None


# The kind whose row serves one that has none; `plain` where no other is named.
DEFAULTS = {"terms": "pairs", "values": "pairs", "values_pairs": "terms"}

# By card, then bits of the type, then largest head dim.
Table = dict[int, dict[int, dict[int, Rows]]]

FP32_FORWARD_AMPERE = {
    64: Rows((64, 32, 8, 2), window=(32, 32, 8, 2), pairs=(32, 32, 8, 2)),
    128: Rows((16, 32, 8, 2), pairs=(16, 16, 4, 2), terms=(16, 16, 8, 2)),
    256: Rows((16, 16, 4, 2), window=(16, 32, 8, 2), pairs=(16, 16, 8, 2)),
}
FP32_FORWARD_HOPPER = {
    64: Rows((32, 32, 8, 2), pairs=(32, 64, 8, 2)),
    128: Rows((16, 32, 8, 2), pairs=(16, 16, 8, 2)),
    256: Rows((16, 16, 8, 2), window=(32, 16, 8, 2), pairs=(32, 16, 8, 2)),
}
FP32_DKDV_AMPERE = {
    64: Rows((32, 32, 8, 3), pairs=(16, 32, 4, 2)),
    128: Rows((16, 16, 4, 2), window=(16, 16, 4, 3), pairs=(16, 32, 8, 1)),
    256: Rows((16, 16, 8, 2), pairs=(16, 16, 8, 1), values=(16, 16, 8, 2)),
}
FP32_DKDV_HOPPER = {
    64: Rows((16, 32, 8, 2), pairs=(16, 32, 4, 2)),
    128: Rows((16, 32, 8, 2), pairs=(16, 32, 8, 1), keys=(16, 32, 8, 1)),
    256: Rows((16, 16, 8, 2), window=(16, 32, 8, 2), pairs=(16, 16, 8, 1), values=(16, 32, 8, 2)),
}
FP32_DQ_AMPERE = {
    64: Rows((32, 32, 8, 2), window=(32, 32, 8, 1), pairs=(32, 16, 4, 3)),
    128: Rows((32, 16, 4, 2), values_pairs=(16, 16, 8, 2)),
    256: Rows((16, 16, 4, 2), window=(16, 16, 4, 3), pairs=(16, 16, 8, 2)),
}
FP32_DQ_HOPPER = {
    64: Rows((32, 32, 8, 2), pairs=(32, 16, 4, 2)),
    128: Rows((32, 16, 8, 2), window=(16, 16, 4, 2), pairs=(16, 16, 8, 2)),
    256: Rows((16, 16, 4, 2), window=(16, 16, 8, 2), pairs=(32, 16, 8, 2), values=(16, 16, 8, 3)),
}

# The rows of 80 keep to the 99 KiB of shared memory that 8.6, 8.9 and 12.0 have.
FORWARD: Table = {
    80: {
        16: {
            64: Rows((128, 64, 8, 3), window=(128, 64, 8, 2), pairs=(128, 32, 8, 2)),
            128: Rows((128, 32, 8, 2), window=(64, 32, 4, 2), pairs=(64, 16, 4, 2)),
            256: Rows((32, 32, 4, 2), window=(64, 32, 8, 2), pairs=(32, 16, 4, 2)),
        },
        32: FP32_FORWARD_AMPERE,
    },
    90: {
        16: {
            # plain: 1.10 times as fast as (128, 64, 4, 3) (H200, 2026-11-27)
            64: Rows((64, 64, 4, 3), window=(64, 64, 4, 3), pairs=(128, 32, 8, 3)),
            # plain: 1.10 times as fast as (128, 64, 8, 3) (H200, 2026-11-27), and (64, 64, 4, 3) is
            # 1.13 times; but forward_gluon.py, 1.49 times, has tiles of 128 keys, and the same bits
            128: Rows((128, 128, 8, 3), window=(128, 64, 8, 3), pairs=(128, 32, 8, 3)),
            256: Rows((128, 32, 8, 2)),
        },
        32: FP32_FORWARD_HOPPER,
    },
    100: {
        16: {
            64: Rows((128, 64, 4, 3), window=(128, 64, 8, 2), pairs=(128, 32, 8, 2)),
            128: Rows((128, 64, 8, 3), window=(128, 64, 8, 2), pairs=(128, 32, 8, 2)),
            256: Rows((64, 32, 8, 2), window=(128, 32, 8, 2)),
        },
        32: FP32_FORWARD_HOPPER,
    },
}
DKDV: Table = {
    80: {
        16: {
            64: Rows((32, 64, 4, 3), pairs=(32, 64, 4, 2)),
            128: Rows(
                (64, 64, 8, 2),
                pairs=(32, 64, 8, 2),
                values=(16, 128, 8, 2),
                values_pairs=(64, 32, 8, 2),
            ),
            256: Rows((32, 64, 8, 1), pairs=(32, 32, 8, 2)),
        },
        32: FP32_DKDV_AMPERE,
    },
    90: {
        16: {
            # plain: 1.23 times as fast as (64, 128, 8, 3) (H200, 2026-11-27)
            64: Rows((32, 64, 4, 3), pairs=(64, 128, 8, 2), terms=(32, 128, 8, 3)),
            # keys: 1.50 times as fast as (32, 128, 8, 1) (H200, 2026-11-27)
            # plain: 1.16 times as fast as (32, 128, 8, 3) (H200, 2026-11-27)
            128: Rows(
                (32, 64, 4, 3), pairs=(32, 128, 8, 2), terms=(32, 64, 8, 2), keys=(32, 128, 8, 3)
            ),
            256: Rows(
                (16, 128, 8, 2),
                window=(32, 128, 8, 2),
                pairs=(32, 128, 8, 2),
                values_pairs=(16, 128, 8, 2),
            ),
        },
        32: FP32_DKDV_HOPPER,
    },
    100: {
        16: {
            64: Rows((64, 64, 4, 2), pairs=(32, 64, 4, 2)),
            128: Rows(
                (64, 128, 8, 2),
                pairs=(32, 64, 8, 2),
                values=(64, 128, 8, 2),
                values_pairs=(64, 64, 8, 2),
            ),
            256: Rows((32, 128, 8, 2), values_pairs=(32, 64, 8, 2)),
        },
        32: FP32_DKDV_HOPPER,
    },
}
DQ: Table = {
    80: {
        16: {
            64: Rows((64, 64, 4, 3), pairs=(128, 32, 8, 2)),
            128: Rows((64, 64, 8, 2), window=(64, 32, 8, 2), pairs=(64, 32, 8, 2)),
            256: Rows((32, 32, 8, 2), pairs=(32, 16, 8, 2)),
        },
        32: FP32_DQ_AMPERE,
    },
    90: {
        16: {
            # plain: no tile that was timed is 1.03 times as fast (H200, 2026-11-27)
            64: Rows((128, 64, 8, 3), window=(64, 64, 4, 3), pairs=(128, 32, 8, 3)),
            # plain: 1.22 times as fast as (128, 64, 8, 2) (H200, 2026-11-27)
            128: Rows((128, 64, 8, 3), window=(128, 32, 8, 3), pairs=(128, 32, 8, 2)),
            256: Rows((128, 32, 8, 2), window=(128, 16, 8, 2), pairs=(128, 16, 8, 2)),
        },
        32: FP32_DQ_HOPPER,
    },
    100: {
        16: {
            64: Rows((128, 64, 8, 3), pairs=(128, 32, 8, 2)),
            128: Rows((128, 32, 8, 2), window=(64, 32, 8, 2), pairs=(64, 32, 8, 2)),
            256: Rows((128, 32, 8, 2), pairs=(128, 16, 8, 2)),
        },
        32: FP32_DQ_HOPPER,
    },
}
TABLES = {"forward": FORWARD, "dkdv": DKDV, "dq": DQ}

# The kernels of summaries hold no sums as wide as a head, so that few rows serve all kinds of
# calls. They form q k' alone, or do v' too.
FP32_SUMMARY_AMPERE = {
    64: Rows((32, 32, 4, 2)),
    128: Rows((32, 32, 8, 2)),
    256: Rows((16, 16, 8, 2)),
}
FP32_SUMMARY_HOPPER = FP32_SUMMARY_AMPERE | {128: Rows((16, 32, 8, 2))}
NARROW_SUMMARY = dict.fromkeys((64, 128), Rows((64, 64, 4, 2), terms=(64, 64, 8, 2)))
SUMMARY_HOPPER = {16: NARROW_SUMMARY | {256: Rows((64, 64, 8, 2))}, 32: FP32_SUMMARY_HOPPER}
ONE_PRODUCT: Table = {
    80: {16: NARROW_SUMMARY | {256: Rows((32, 64, 4, 2))}, 32: FP32_SUMMARY_AMPERE},
    90: SUMMARY_HOPPER,
    100: SUMMARY_HOPPER,
}
TWO_PRODUCTS: Table = {
    80: {
        16: {
            64: Rows((64, 128, 8, 2)),
            128: Rows((32, 64, 4, 2)),
            256: Rows((32, 64, 8, 1)),
        },
        32: FP32_SUMMARY_AMPERE,
    },
    90: SUMMARY_HOPPER,
    100: SUMMARY_HOPPER,
}
SUMMARY_TABLES = {"one product": ONE_PRODUCT, "two products": TWO_PRODUCTS}


def block_d(head_dim: int) -> int:
    """Columns of a tile: the next power of two, at least the 16 that a tensor-core dot needs."""
    return max(16, 1 << (head_dim - 1).bit_length())


@lru_cache
def tile_config(
    table: str,
    capability: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    kind: str = "plain",
) -> TileConfig:
    """The row of a table for a kind of call, as Rows names them."""
    # 12.x is named after 10.x but has the tensor cores and the shared memory of 8.x.
    card = {9: 90, 10: 100, 11: 100}.get(capability[0], 80)
    by_dim = (TABLES | SUMMARY_TABLES)[table][card][dtype.itemsize * 8]
    rows = by_dim[min(d for d in by_dim if d >= head_dim)]
    while getattr(rows, kind) is None:
        kind = DEFAULTS.get(kind, "plain")
    return TileConfig(*getattr(rows, kind))
