"""Replaces a tile of kernels/configs.py, for the stages that try others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from clinattn.kernels import backward, configs, forward

Tile = tuple[int, int, int, int]  # block_m, block_n, num_warps, num_stages

MODULES = {"forward": forward, "dkdv": backward, "dq": backward}
MASKS = {"full": -1, "causal": 0}  # window_right


@contextmanager
def tile_of(table: str, tile: Tile) -> Iterator[None]:
    """Within the block, the kernel of `table` takes `tile`; other kernels keep theirs."""
    module: Any = MODULES[table]
    shipped, asked = module.tile_config, set()

    def chosen(name: str, *key: Any) -> configs.TileConfig:
        asked.add(name)
        return configs.TileConfig(*tile) if name == table else shipped(name, *key)

    no_gluon = {"gains_by_gluon": lambda problem: False} if table == "forward" else {}
    with mock.patch.multiple(module, tile_config=chosen, **no_gluon):
        yield
    if table not in asked:  # what ran had another tile
        raise RuntimeError(f"the launcher did not ask for the tile of {table}")
