"""Chooses the tests of a run: all, or in `make test` the fast ones and one in twelve of the others.

The tier of a test follows from its folder. CLINATTN_TESTS=sample takes every fast test, and of each
file of the tiers "device" and "slow" one test in twelve, in the order of a hash of the names. Where
it begins moves on by one with each commit, so that twelve commits in a row run every test.
CLINATTN_TESTS_ONE_IN takes another number for twelve. CLINATTN_TESTS=every adds variants,
compilers and cards to some tests, for an hour or more.
"""

from __future__ import annotations

import os
import subprocess
import zlib
from collections import defaultdict
from pathlib import Path

import pytest
from places import ROOT, TESTS

# Folders that are not fast. "device": kernels of GPUs, emulated, interpreted and compiled ahead of
# time; "slow": what takes seconds or minutes each: it installs, builds, compiles or trains models,
# tries every number there is, or starts processes.
TIERS = {
    "cuda": "device",
    "triton": "device",
    "tools/gpu": "device",
    "cpu/exhaustive": "slow",
    "operator/compiled": "slow",
    "training/compiled": "slow",
    "training/learning": "slow",
    "explain/learning": "slow",
    "training/processes": "slow",
    "workloads/store/processes": "slow",
    "tools/commands": "slow",
    "parallel/processes": "slow",
    "packaging": "slow",
}
# Folders whose tests judge by time: they run one after the other, and only where all tests do.
TIMED = "timed"
ONE_IN = int(os.environ.get("CLINATTN_TESTS_ONE_IN", "12"))


def tier(path: Path) -> str:
    """The tier of a test file: "fast", "device", "slow" or "timed"."""
    parts = path.relative_to(TESTS).parts[:-1]
    if TIMED in parts:
        return TIMED
    folders = ("/".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((TIERS[folder] for folder in folders if folder in TIERS), "fast")


def turn() -> int:
    """The number of commits up to this one; 0 where that is not known."""
    given = os.environ.get("CLINATTN_TESTS_TURN")
    if given is None:
        command = ["git", "-C", str(ROOT), "rev-list", "--count", "HEAD"]
        try:
            given = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "0"
        except FileNotFoundError:
            given = "0"
        os.environ["CLINATTN_TESTS_TURN"] = given  # for the processes of pytest-xdist
    return int(given)


def sampled(items: list[pytest.Item]) -> list[pytest.Item]:
    """The tests of a fair sample, in their order."""
    others = defaultdict(list)
    kept = set()
    for item in items:
        if (of := tier(item.path)) == "fast":
            kept.add(item.nodeid)
        elif of != TIMED:
            others[item.path].append(item.nodeid)
    for path, names in others.items():
        # Small files begin at places of their own: else all their tests would fall in one turn.
        first = turn() + zlib.crc32(path.name.encode())
        names.sort(key=lambda name: zlib.crc32(name.encode()))
        kept.update(name for at, name in enumerate(names) if (at + first) % ONE_IN == 0)
    return [item for item in items if item.nodeid in kept]
