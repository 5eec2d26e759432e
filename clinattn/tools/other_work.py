"""Detects other work beside a measurement, by process time against wall time.

A share of the CPUs below one has two reasons: threads that had nothing to do, and other work that
had their CPUs. What the CPUs themselves count, less what this process took, tells them apart.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from clinattn.tools.environment import cpu_count

STAT = Path("/proc/stat")
IDLE = {3, 4}  # columns of a CPU there: idle, and waiting for a disk
GUEST = 8  # from here on time that is in other columns already


class Spent(NamedTuple):
    """Seconds of a measurement: of the clock, of this process, of others on its CPUs.

    process: of all its threads. others: None where nothing tells.
    """

    wall: float
    process: float
    others: float | None


class Watch:
    """Starts when it is made."""

    def __init__(self) -> None:
        self.started = time.perf_counter(), time.process_time(), busy_seconds()

    def spent(self, child: float = 0.0) -> Spent:
        """child: seconds of process time that a child has had meanwhile."""
        now = time.perf_counter(), time.process_time(), busy_seconds()
        wall, process = now[0] - self.started[0], now[1] - self.started[1] + child
        if now[2] is None or self.started[2] is None:
            return Spent(wall, process, None)
        return Spent(wall, process, now[2] - self.started[2] - process)


def busy_seconds() -> float | None:
    """Seconds that all processes, and the host of a virtual machine, have used this one's CPUs."""
    try:
        own = {f"cpu{i}" for i in os.sched_getaffinity(0)}
        lines = [line.split() for line in STAT.read_text().splitlines()]
        tick = 1 / os.sysconf("SC_CLK_TCK")
        rows = [[int(x) for x in values] for name, *values in lines if name in own]
    except (OSError, AttributeError, ValueError):  # no Linux
        return None
    busy = sum(x for row in rows for i, x in enumerate(row[:GUEST]) if i not in IDLE)
    return tick * busy if busy else None


def noted_from(threads: int, cpus: int) -> float:
    """CPUs of other work from which on a result says so.

    Half of what one busy process takes from these threads: it has the CPUs that they leave free,
    and on as many CPUs as threads, shared evenly, as much as one of threads + 1.
    """
    used = min(threads, cpus)
    return cpus - used + used / (used + 1) / 2


def disturbance(rows: Sequence[dict[str, Any]]) -> str | None:
    """A line on the rows that other work has slowed down; None where there are none."""
    slowed = [row for row in rows if row.get("disturbed")]
    if not slowed:
        return None
    most = max(slowed, key=lambda row: row["other_cpus"])
    return (
        f"other work kept up to {most['other_cpus']:.2f} of the {most['cpus']} CPUs busy "
        "meanwhile, so these rows are slower than this machine is (noted from "
        f"{most['noted_from']:.2f} CPUs on: half of what one busy process would take)"
    )


def load(rows: Sequence[dict[str, Any]]) -> str | None:
    """A sentence on other work beside the rows; None where no row tells."""
    found = [row for row in rows if row.get("other_cpus") is not None]
    if not found:
        return None
    shares = [row["other_cpus"] for row in found]
    cpus = max(row["cpus"] for row in found)
    return (
        f"Other work kept {median(shares):.2f} of the {cpus} CPUs busy beside the measurements: "
        f"the median of {len(shares)} rows, of which the busiest says {max(shares):.2f}."
    )


def here(spent: Sequence[Spent], device: torch.device) -> dict[str, Any]:
    """`beside` for the threads of this process; a GPU's work is begun by one."""
    threads = 1 if device.type == "cuda" else torch.get_num_threads()
    return beside(spent, threads, cpu_count())


def beside(spent: Sequence[Spent], threads: int, cpus: int) -> dict[str, Any]:
    """Fields of a row that tell of other work beside its measurements.

    cpu_share: process time over wall time, and over the CPUs that the threads can have.
    other_cpus: how many the rest kept busy, None if unknown. disturbed: whether that is more than
    noted_from, the CPUs' ticks of each measurement left out.
    """
    limit = noted_from(threads, cpus)
    used = min(threads, cpus)
    wall = sum(s.wall for s in spent)
    known = [s.others for s in spent if s.others is not None]
    others = sum(known) if len(known) == len(spent) else None
    unsure = cpus * len(spent) / os.sysconf("SC_CLK_TCK")
    return {
        "cpu_share": sum(s.process for s in spent) / (wall * used),
        "other_cpus": None if others is None else max(0.0, others / wall),
        "cpus": cpus,
        "noted_from": limit,
        "disturbed": others is not None and others - unsure > limit * wall,
    }
