"""Small classifiers for tests of clinattn predict, and what is in its files."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import SMALL_PRESETS, small_run

from clinattn.encoder import PRESETS
from clinattn.training.checkpoint import checkpoints
from clinattn.training.loop import Trainer


def trained(output: Path, task: str = "classify", **changes):
    """The settings and the checkpoint of a run of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        for name, config in SMALL_PRESETS.items():
            patch.setitem(PRESETS, name, config)
        settings = small_run(task, **{"steps": 2, "threads": 1} | changes, output=output)
        Trainer(settings).run()
    return settings, checkpoints(output)[-1]


def facts_of(path: Path) -> dict:
    """The metadata of a file of predictions or embeddings."""
    return json.loads(pq.read_schema(path).metadata[b"clinattn"])


def bits_of(path: Path) -> pa.Table:
    """The table without its metadata, to compare bit by bit."""
    return pq.read_table(path).replace_schema_metadata(None)
