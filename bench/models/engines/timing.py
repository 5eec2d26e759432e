"""Ways that take turns: seconds of every batch in every round."""

from __future__ import annotations

import time
from collections.abc import Sequence

from engines.batches import Batch
from engines.engine import Run

# Threads that an engine left spinning are asleep after this pause.
PAUSE_S = 0.05


def one_pass(batches: Sequence[Batch], run: Run) -> list[float]:
    """Seconds of each batch."""
    seconds = []
    for batch in batches:
        started = time.perf_counter()
        run(batch)
        seconds.append(time.perf_counter() - started)
    return seconds


def in_turns(
    ways: Sequence[tuple[Sequence[Batch], Run]], rounds: range, budget: float
) -> list[list[list[float]]]:
    """Seconds by way, round and batch. Rounds rotate, so that no way always follows the same one.

    rounds: the fewest and the most, as many as fit into `budget` seconds between these.
    """
    found: list[list[list[float]]] = [[] for _ in ways]
    started = time.perf_counter()
    for turn in range(rounds.stop):
        spent = time.perf_counter() - started
        if turn >= rounds.start and spent + spent / turn > budget:
            break
        for i in range(len(ways)):
            way = (i + turn) % len(ways)
            time.sleep(PAUSE_S)
            found[way].append(one_pass(*ways[way]))
    return found
