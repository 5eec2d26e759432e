"""bench/gpu_candidates.py: its walk in Triton's interpreter, and what its tiles compile to."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from clinattn.kernel_report import CARDS, kernel_reports  # noqa: E402

BENCH = Path(__file__).resolve().parents[1] / "bench"
RUN = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"


def test_in_the_interpreter():
    options = ["-q", "-x", "--tb=short", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, "interpreted_candidates.py", *options],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not os.environ.get("CLINATTN_TEST_ALL"), reason="compiles for minutes")
@pytest.mark.parametrize("at", range(7))
def test_tiles_fit(at, monkeypatch):
    """A tile that spills on Hopper would not be shipped if it won."""
    monkeypatch.syspath_prepend(BENCH)
    candidates = importlib.import_module("gpu_candidates")
    assert len(candidates.CONTESTS) == 7
    contest = candidates.CONTESTS[at]
    for mask in contest.masks:
        problem = candidates.Problem(contest.table, contest.dim, mask, 2, 256, torch.device("cpu"))
        problem.o, problem.lse = problem.call.q, torch.zeros(problem.call.q.shape[:3])
        problem.sums = [problem.lse, problem.lse]
        for tile in contest.tiles:
            (report,) = kernel_reports(lambda t=tile, p=problem: candidates.with_tile(p, t), 90)
            assert not report.local and not report.serialized, (mask, tile)
            assert report.shared <= CARDS[90].block_shared, (mask, tile)
