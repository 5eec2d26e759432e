"""The CPUs that a process may use: of its affinity mask, of its control group's quota, by core."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TOPOLOGY = Path("/sys/devices/system/cpu")
GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


class Cpus(NamedTuple):
    """allowed: CPUs of the affinity mask. cores: those among them, two threads of one counted once.

    quota: CPUs' worth of time that the control group has, as a container's limit sets it; None
    without a limit.
    """

    allowed: int
    cores: int
    quota: float | None

    @property
    def useful(self) -> int:
        """The largest number of threads of which each has a core, and time on it."""
        return self.cores if self.quota is None else max(1, min(self.cores, int(self.quota)))


def cpus() -> Cpus:
    """The CPUs of this process. Where the system does not tell, each CPU is a core of its own."""
    if hasattr(os, "sched_getaffinity"):
        numbers = sorted(os.sched_getaffinity(0))
    else:
        numbers = list(range(os.cpu_count() or 1))
    return Cpus(len(numbers), len({_siblings(number) for number in numbers}), quota())


def _siblings(number: int) -> str:
    found = _text(TOPOLOGY / f"cpu{number}/topology/thread_siblings_list")
    return str(number) if found is None else found.strip()


def quota() -> float | None:
    """The smallest quota of this process's control group and of those that hold it."""
    limits = [_limit(folder) for folder in _own_folders()]
    return min((limit for limit in limits if limit is not None), default=None)


def _own_folders() -> Iterator[Path]:
    """Folders of the groups, from the process's own to the topmost one that is seen here."""
    for line in (_text(OWN_GROUPS) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = GROUPS / controllers  # version 2 has one tree, and names no controllers
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            yield folder
            if folder == top:
                break


def _limit(folder: Path) -> float | None:
    """CPUs by the files of a group: cpu.max, or in version 1 cpu.cfs_quota_us and _period_us."""
    words = (_text(folder / "cpu.max") or "").split()
    if not words:
        parts = (_text(folder / f"cpu.cfs_{part}_us") for part in ("quota", "period"))
        words = [part.strip() for part in parts if part is not None]
    if len(words) != 2 or words[0] in ("max", "-1"):
        return None
    return int(words[0]) / int(words[1])


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
