"""A process of a measurement: steps of training, and sums of as many bytes as gradients have.

Started by run.py. Rank 0 writes what it found to the file that it is given.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from clinattn.training import batches, loop
from clinattn.training.ranks import joined
from clinattn.training.settings import TrainingSettings


class Rows:
    """Takes the rows of a run in place of a file."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def as_drawn() -> None:
    """Batches cut where the next sequence is too long, to one rank after the other.

    So it was before balance.py.
    """
    batches.filled = batches.consecutive
    loop.balanced = lambda drawn, *rest: list(drawn)  # type: ignore[assignment]
    loop.shares = lambda costs, ranks: [  # type: ignore[assignment]
        list(range(rank, len(costs), ranks)) for rank in range(ranks)
    ]


def main() -> None:
    given = json.loads(sys.argv[1])
    if not given["balanced"]:
        as_drawn()
    torch.set_num_threads(1)
    settings = TrainingSettings(**given["settings"])
    with joined(settings.device) as (ranks, device):
        trainer = loop.Trainer(settings, ranks, device)
        found = Rows()
        if ranks.rank == 0:
            trainer.metrics = found  # type: ignore[assignment]
        weights = sum(p.numel() for p in trainer.model.parameters())
        sums = {"gradients_s": timed(ranks, weights), "message_s": timed(ranks, 1)}
        trainer.advance(given["warm_up"] + given["steps"])
        if ranks.rank == 0:
            steps = found.rows[given["warm_up"] :]
            content = {"weights": weights, "sums": sums, "steps": steps}
            Path(given["output"]).write_text(json.dumps(content))
        del trainer


def timed(ranks: Any, numbers: int) -> float:
    """Seconds in which fp32 numbers are summed over the ranks: the median of 15."""
    x = torch.ones(numbers)
    taken = []
    for _ in range(15):
        started = time.perf_counter()
        ranks.sum(x)
        taken.append(time.perf_counter() - started)
        x.fill_(1)
    return median(taken)


if __name__ == "__main__":
    main()
