"""Small training runs: presets of width 32 that ask for one thing more each, and what is written.

As a script, the clinattn command with these presets.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from clinattn.encoder import PRESETS
from clinattn.training.checkpoint import checkpoints, load_checkpoint
from clinattn.training.settings import TrainingSettings

SMALL = replace(
    PRESETS["tiny"],
    hidden_size=32,
    num_heads=2,
    intermediate_size=48,
    windows=(None, 8, 8),
    embedding_dropout=0.1,
    hidden_dropout=0.1,
    attention_dropout=0.1,
)
SMALL_PRESETS = {
    "tiny": SMALL,
    "timed": replace(SMALL, positions="rotary_time"),
    "timed-causal": replace(SMALL, positions="rotary_time", causal=True, pooling="last"),
    "timed-valued": replace(SMALL, positions="rotary_time", numeric_values=True),
    "valued": replace(SMALL, numeric_values=True),
    "typed": replace(SMALL, token_types=2),
    "typed-valued": replace(SMALL, token_types=2, numeric_values=True),
    "signal": replace(SMALL, channels=2, vocab_size=0),
}


def small_run(task: str = "mlm", **changes) -> TrainingSettings:
    """Eight steps of short sequences."""
    given = {"label_code": "ALARM*"} if task == "classify" else {}
    given |= {"max_tokens": 64, "batch_tokens": 128, "steps": 8, "eval_every": 3, "save_every": 100}
    return TrainingSettings(task=task, **given | changes)


CLOCKED = {"tokens_per_s", "idle_share"}


def rows_of(output) -> list[dict]:
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in lines]


def assert_same_bits(one: Path, two: Path) -> None:
    """Weights, moments, counters and metrics, but the speed."""
    a, b = (load_checkpoint(checkpoints(Path(p))[-1]) for p in (one, two))
    assert a.keys() == b.keys() and (a["step"], a["epoch"], a["place"]) == (
        b["step"],
        b["epoch"],
        b["place"],
    )
    for name, weight in a["model"].items():
        assert torch.equal(weight, b["model"][name]), name
    for index, state in a["optimiser"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b["optimiser"]["state"][index][name]), (index, name)
    assert rows_of(one) == rows_of(two)


if __name__ == "__main__":
    from clinattn.tools.cli import app

    PRESETS.update(SMALL_PRESETS)
    app()
