"""Process time against wall time, and what other work takes from a measurement."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from clinattn.tools import other_work
from clinattn.tools.other_work import Spent, Watch, beside, disturbance, noted_from

TICK = 1 / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("threads", "cpus", "expected"),
    [(1, 1, 1 / 4), (2, 2, 1 / 3), (16, 16, 8 / 17), (1, 2, 1 + 1 / 4), (8, 2, 1 / 3)],
)
def test_half_of_what_a_busy_process_takes_is_noted(threads, cpus, expected):
    """One more busy thread on n CPUs with n threads gets n / (n + 1) of a CPU."""
    assert noted_from(threads, cpus) == pytest.approx(expected)


def test_a_row_tells_idle_threads_from_other_work():
    idle = beside([Spent(10.0, 12.0, 0.1), Spent(10.0, 12.0, 0.1)], threads=2, cpus=2)
    assert idle["cpu_share"] == pytest.approx(0.6) and not idle["disturbed"]
    slowed = beside([Spent(10.0, 13.0, 6.5)], threads=2, cpus=2)
    assert slowed["other_cpus"] == pytest.approx(0.65) and slowed["disturbed"]
    assert disturbance([slowed | {"cpus": 2}, idle | {"cpus": 2}]).startswith(
        "other work kept up to 0.65 of the 2 CPUs busy"
    )
    assert disturbance([idle]) is None


def test_ticks_alone_are_no_other_work():
    """A measurement as short as a tick may have one of each CPU too many."""
    short = beside([Spent(TICK, TICK, 2 * TICK)], threads=2, cpus=2)
    assert not short["disturbed"]


def test_other_work_is_none_where_nothing_tells(monkeypatch, tmp_path):
    monkeypatch.setattr(other_work, "STAT", tmp_path / "stat")
    assert Watch().spent().others is None
    (tmp_path / "stat").write_text("cpu0 0 0 0 0 0 0 0 0 0 0\n")  # as some sandboxes have it
    row = beside([Watch().spent()], threads=1, cpus=1)
    assert row["other_cpus"] is None and not row["disturbed"]


def test_the_cpus_of_this_process_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr(other_work, "STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1}, raising=False)
    lines = ["cpu" + 10 * " 9", "cpu0" + 10 * " 9", "cpu1 1 2 4 800 900 8 16 32 5 6"]
    (tmp_path / "stat").write_text("\n".join([*lines, "intr 5", "ctxt 7"]))
    assert other_work.busy_seconds() == pytest.approx((1 + 2 + 4 + 8 + 16 + 32) * TICK)


@pytest.mark.skipif(other_work.busy_seconds() is None, reason="/proc/stat of Linux is missing")
def test_busy_processes_are_seen():
    cpus = len(os.sched_getaffinity(0))
    burn = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    others = [subprocess.Popen(burn, stdout=subprocess.PIPE) for _ in range(cpus)]
    try:
        for other in others:
            other.stdout.readline()
        watch = Watch()
        while time.perf_counter() < watch.started[0] + 1:
            pass
        row = beside([watch.spent()], threads=cpus, cpus=cpus)
    finally:
        for other in others:
            other.kill()
            other.communicate()
    assert row["disturbed"] and row["other_cpus"] > noted_from(cpus, cpus)
